"""Queries and keys whose attention lies in few blocks, as a long document of several topics would have it.

Every block of 128 tokens has a topic, the same for queries and keys, and neighbouring blocks share a slowly turning
direction: a query attends to the blocks of its topic and to those close by. Legend: S tokens, heads, D head dim.
"""

import torch
from torch import Tensor

from elastic.bench.cases import BLOCK

TOPICS = 5
TOPIC_LOGIT, LOCAL_LOGIT = 4.0, 2.0  # of a query and a key of one topic; of one place
MEMORY = 0.97  # cosine between the directions of two blocks side by side


def structured(length: int, heads: int, kv_heads: int, dim: int, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """q [1, S, heads, D] and k [1, S, kv_heads, D] in fp32, for the usual scale D ** -0.5; S a multiple of 128."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    blocks = length // BLOCK
    topic_TKD = torch.nn.functional.normalize(normal(TOPICS, kv_heads, dim), dim=-1)
    topic_of = torch.randint(TOPICS, (blocks,), generator=generator, device=device)
    steps_NKD = normal(blocks, kv_heads, dim)
    place_NKD = torch.empty_like(steps_NKD)
    place = steps_NKD[0]
    for n in range(blocks):
        place = MEMORY * place + (1 - MEMORY**2) ** 0.5 * steps_NKD[n]
        place_NKD[n] = torch.nn.functional.normalize(place, dim=-1)
    strength = dim**0.25
    meaning_NKD = TOPIC_LOGIT**0.5 * topic_TKD[topic_of] + LOCAL_LOGIT**0.5 * place_NKD
    meaning_SKD = (strength * meaning_NKD).repeat_interleave(BLOCK, dim=0)
    k = meaning_SKD + normal(length, kv_heads, dim)
    q = meaning_SKD.repeat_interleave(heads // kv_heads, dim=1) + normal(length, heads, dim)
    return q[None], k[None]
