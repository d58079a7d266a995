"""How much each KV head retrieves (section 2.2 of the paper ranks heads so): the attention that falls on the needle
while its answer is emitted, computed with the oracle of `elastic.attention.reference`.

Legend: L layers, H query heads, K KV heads, S tokens, A answer tokens.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.attention.head_plan import HeadPlan
from elastic.attention.reference import attention, dense_mask
from elastic.attention.routed import Routed
from elastic.attention.row_slice import RowSlice
from elastic.files import write_atomic
from elastic.model.attach import override_routes, set_row_slice
from elastic.protocols import CausalLM, Tokenizer

NEEDLE_TASKS = ("niah_single_1", "niah_multikey_2")  # without outside data, one needle asked for


class _Watch(RowSlice):
    """Attention as ever; on the side, the mass that each KV head's queries put on the needle."""

    def __init__(self, needle_S: Tensor, answers: int) -> None:
        self.needle_S, self.answers = needle_S, answers
        self.mass_LK: list[Tensor] = []

    def attend(
        self, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, route_NK: Tensor, plan: HeadPlan, scale: float
    ) -> Routed:
        kv_heads, length = k_BKSD.shape[1:3]
        mask = dense_mask(length, "full", plan.sparse, self.answers).to(q_BHSD.device)
        needle_BKS1 = self.needle_S.to(q_BHSD.device, torch.float32).expand(1, kv_heads, length)[..., None]
        mass_BHA1 = attention(q_BHSD[:, :, -self.answers :], k_BKSD, needle_BKS1, mask, scale)
        self.mass_LK.append(mass_BHA1[0, :, :, 0].mean(-1).view(kv_heads, -1).amax(-1).cpu())
        return super().attend(q_BHSD, k_BKSD, v_BKSD, route_NK, plan, scale)


@torch.no_grad()
def retrieval_scores(model: CausalLM, tokenizer: Tokenizer, docs: Sequence[dict[str, Any]]) -> Tensor:
    """Retrieval score [L, K] of the dense model: over samples and answer tokens, the mean attention from the position
    that emits the token to the needle's sentence, of the query head of the group that has most of it.

    Args:
        model: attached, in eval mode.
        docs: samples of `NEEDLE_TASKS`; their answers are given to the model, not generated.

    Raises:
        ValueError: no samples, or one whose needle is not found in its prompt.
    """
    if not docs:
        raise ValueError("no samples to rank heads by; give at least one")
    total: Tensor | float = 0.0
    for doc in docs:
        ids, needle_S, answers = _tokens(doc, tokenizer)
        watch = _Watch(needle_S, answers)
        previous = set_row_slice(model, watch)
        try:
            with override_routes(model, 0):
                model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
        finally:
            set_row_slice(model, previous)
        total = total + torch.stack(watch.mass_LK)
    assert isinstance(total, Tensor)
    return total / len(docs)


def _tokens(doc: dict[str, Any], tokenizer: Tokenizer) -> tuple[list[int], Tensor, int]:
    """Ids of prompt and answer without its last token, which of them are the needle [S], and the answer's length."""
    prompt, answer = f"{doc['input']} {doc['gen_prefix']}", doc["outputs"][0]
    value = prompt.find(answer)
    begin = prompt.rfind("One of the special magic", 0, max(0, value))
    if value < 0 or begin < 0:
        raise ValueError(f"the needle with {answer!r} is not in its prompt; expected a sample of a needle task")
    end = value + len(answer)
    encoded = tokenizer(prompt, return_offsets_mapping=True)
    emitted = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    ids = encoded["input_ids"] + emitted[:-1]
    needle = [first < end and last > begin for first, last in encoded["offset_mapping"]]
    return ids, torch.tensor(needle + [False] * (len(ids) - len(needle))), len(emitted)


def write_ranking(score_LK: Tensor, file: Path, origin: dict[str, Any]) -> None:
    """A pattern file for the method `static` (each head's place among all, from 0 to 1), and beside it as JSON the
    scores with what they were made from.
    """
    heads = score_LK.numel()
    place = torch.empty(heads)
    place[score_LK.flatten().argsort(stable=True)] = (torch.arange(heads) + 0.5) / heads
    file.parent.mkdir(parents=True, exist_ok=True)
    details = {**origin, "score": [[round(x, 6) for x in row] for row in score_LK.tolist()]}
    write_atomic(file.with_suffix(".json"), json.dumps(details, indent=1) + "\n")
    lines = ["\t".join(f"{x:.5f}" for x in row) for row in place.view_as(score_LK).tolist()]
    write_atomic(file, "\n".join(lines) + "\n")
