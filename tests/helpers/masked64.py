"""The reference of the random cases: one sample at a time in fp64, without padding, cache, chunks or batch, every key
kept, under a dense mask for each KV head. Written out from docs/design.md sections 2, 3 and 7; of the package it calls
the routers' own networks, and neither its attention nor its caches, pooling or reach. (Norms round to fp32 on the way,
as transformers writes them.)

Legend: S tokens, L layers, H query heads, K KV heads, D head dim, V vocabulary.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from elastic.config import ElasticConfig
from elastic.model.families import key_projection
from elastic.model.layer_types import routed_layers, stock_layers
from elastic.routing.router import STEEPNESS
from tests.helpers.models import doubled

NAME = "masked64"


@dataclass
class Turn:
    """A prompt or later turn.

    Attributes:
        begin, end: its tokens, of those that its sample holds.
        user: [A, E), what the user wrote, as far as it is still there.
        dropped: whether sparse heads of the turn before have dropped keys when it begins.
        given: routes [L, K] that were given for it, if any.
        route: [L, K] in {0, 1}, as the report states it.
    """

    begin: int
    end: int
    user: tuple[int, int]
    dropped: bool = False
    given: Tensor | None = None
    route: Tensor | None = None


@dataclass
class Sample:
    """A conversation.

    Attributes:
        ids: its tokens so far, the last of them perhaps not read yet.
        turns: in order.
        of_turn: of every token that was read, the turn whose routes it was read under.
        answer: of every token that was read, whether it was read as decode steps read.
        given: of every token of an answer, the routes [L, K] that were given for it instead of its turn's, if any.
    """

    ids: list[int]
    turns: list[Turn] = field(default_factory=list)
    of_turn: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)
    given: list[Tensor | None] = field(default_factory=list)


class Reference:
    """A stock model in fp64 under the routes of a sample.

    Args:
        model: in fp32, without routers; it is copied.
    """

    def __init__(self, model: Any) -> None:
        AttentionInterface.register(NAME, _attend)
        self.model = doubled(copy.deepcopy(model))
        self.model.set_attn_implementation(NAME)
        self.given: Tensor | None = None
        self.keys: dict[int, Tensor] = {}  # of every layer, before RoPE and after the norm
        self.windows = stock_layers(model.config)
        self.places = {layer: place for place, layer in enumerate(routed_layers(model.config))}
        for number, block in enumerate(self.model.model.layers):
            if not hasattr(block, "self_attn"):  # linear attention, which runs as it is
                continue
            attn = block.self_attn
            attn.reference = self
            if number in self.windows:
                continue
            layer = self.places[number]
            keys = attn.k_norm if hasattr(attn, "k_norm") else key_projection(attn)
            keys.register_forward_hook(lambda _, __, found, layer=layer: self.keys.update({layer: found}))
            if hasattr(attn, "qkv_proj"):  # queries, keys, values
                heads, width = model.config.num_attention_heads, model.config.num_key_value_heads * attn.head_dim
                first = heads * attn.head_dim
                keys.register_forward_hook(
                    lambda _, __, found, layer=layer, first=first, width=width: self.keys.update(
                        {layer: found[..., first : first + width]}
                    )
                )

    def prepare(self, config: ElasticConfig, routers: list[Any], sample: Sample, decide: bool) -> None:
        """Say what the next call is about, and whether to decide the sample's last turn."""
        self.config, self.routers, self.sample, self.decide = config, routers, sample, decide
        self.margin: list[Tensor] = []
        self.reach: list[Tensor] = []

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[S, V] after every token that the sample has read; `margin` [L][K] is by how much heads would run sparse."""
        return self.model(torch.tensor([self.sample.ids[: len(self.sample.answer)]]), use_cache=False).logits[0]

    @torch.no_grad()
    def beams(self, steps: int, beams: int, given: Tensor | None) -> tuple[list[int], float]:
        """Tokens of the best beam and its score, where all tokens have been read; `given` are their routes, if any."""
        self.given = given
        ids = torch.tensor([self.sample.ids])
        found = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, num_beams=beams, do_sample=False,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        return found.sequences[0].tolist(), float(found.sequences_scores[0])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """[B, Lq, H, D] of the last Lq queries in a decoder layer."""
        group = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * scale
        number = layer
        if layer in self.windows:  # the backbone's own
            i, j = torch.arange(k.shape[2])[:, None], torch.arange(k.shape[2])[None]
            seen = ((j <= i) & (j > i - self.windows[layer]))[None, -q.shape[2] :]
            weights = self._weights(number, scores.masked_fill(~seen, float("-inf")))
            return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2)
        layer = self.places[layer]
        full, few = self._masks(k.shape[2])
        if self.decide and q.shape[2] == k.shape[2]:
            decide = self._from_keys if self.config.router.kind == "paper" else self._from_reach
            margin = decide(layer, scores[0].masked_fill(~full, float("-inf")).softmax(-1).masked_fill(few, 0.0))
            self.margin.append(margin + self.config.sparsity_bias)
        seen = torch.where(self._streaming(layer, k.shape[2]).T[..., None], few, full)[:, -q.shape[2] :]
        weights = self._weights(number, scores.masked_fill(~seen.repeat_interleave(group, 0), float("-inf")))
        return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2)

    def _weights(self, number: int, scores: Tensor) -> Tensor:
        """Softmax of a decoder layer, with its attention sinks if it has them."""
        sinks = getattr(self.model.model.layers[number].self_attn, "sinks", None)
        if sinks is None:
            return scores.softmax(-1)
        sink = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]

    def _masks(self, length: int) -> tuple[Tensor, Tensor]:
        """Bool [S, S] each: what the queries of full and of streaming heads see."""
        sparse = self.config.sparse
        i, j = torch.arange(length)[:, None], torch.arange(length)[None]
        low = i - sparse.window + 1
        if sparse.granule == "block":
            low = (i // sparse.block - sparse.window // sparse.block + 1) * sparse.block
        return j <= i, (j <= i) & ((j < sparse.sink) | (j >= low))

    def _streaming(self, layer: int, length: int) -> Tensor:
        """Bool [S, K]: which heads every query runs as streaming; those after the sample's tokens are its beams'."""
        sample, more = self.sample, length - len(self.sample.answer)
        turn = torch.tensor(sample.of_turn + [len(sample.turns) - 1] * more)
        dense = torch.tensor(sample.answer + [True] * more) & self.config.dense_decode
        routes = torch.stack([turn.route[layer] for turn in sample.turns if turn.route is not None])[turn]
        for token, given in enumerate([*sample.given, *[self.given] * more]):
            if given is not None:
                routes[token] = given[layer]
        return (routes == 1) & ~dense[:, None]

    def _from_keys(self, layer: int, _hidden: Tensor) -> Tensor:
        """Margin [K] from keys that are pooled afresh."""
        first, last, pool = [], [], self.config.router.pool_tokens
        for turn in self.sample.turns:
            start, stop = turn.user
            new = range(max(turn.begin, start), stop)
            first += [i for i in new if i < start + pool]
            last = [i for i in new if i >= max(start + pool, stop - pool)]
        keys, router = self.keys[layer][0], self.routers[layer]
        if self.model.config.model_type == "gemma3_text":  # which norms them after it has parted the heads
            keys = keys.transpose(0, 1)
        pooled = keys.reshape(len(keys), router.kv_heads, -1)[first + last].mean(0)
        return _margin(router, pooled[None].float())

    def _from_reach(self, layer: int, hidden_HSS: Tensor) -> Tensor:
        """Margin [K] from the attention of all queries on what streaming heads hide."""
        turn, router = self.sample.turns[-1], self.routers[layer]
        mass = hidden_HSS.sum(-1)[:, max(turn.begin, turn.user[0], turn.user[1] - 32) : turn.user[1]]
        found = torch.stack([mass.amax(1), mass[:, -8:].mean(1)]).unflatten(1, (router.kv_heads, -1)).mean(2)
        alone = self.config.router.kind == "reach"
        if turn.dropped:  # heads whose keys are gone count as usual ones, or as those that reach nothing
            before = self.sample.turns[-2].route
            assert before is not None
            usual = torch.zeros(2, 1) if alone else router.mean[:-1].unflatten(0, (-1, 2, router.kv_heads))[-1]
            found = torch.where(before[layer] == 1, usual, found)
        if alone:
            return STEEPNESS * (0.5 - found[0].float())
        self.reach.append(found.flatten().float())
        sparse = self.config.sparse
        length = torch.tensor([turn.user[1] / (sparse.sink + sparse.window)]).log().clamp_min(0.0)
        return _margin(router, torch.cat([*self.reach, length])[None])


def _margin(router: Any, features: Tensor) -> Tensor:
    logits = router(features)[0]
    return logits[:, 1] - logits[:, 0]


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float | None = None, **_options: Any
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return module.reference.attend(module.layer_idx, query, key, value, scale), None
