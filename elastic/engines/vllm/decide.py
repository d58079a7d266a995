"""A request's decision in one layer, from the keys in its pages and its new queries.

Engines hand attention its keys after RoPE. Routers that look at keys before it get them rotated back, which costs a
rounding and needs no hook into the model.
Legend: P pooled positions, K KV heads, G = H / K, D head dim, Q queries, R numbers of reach in the layers so far.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.attention.row_slice import RowSlice
from elastic.config import ElasticConfig, SparseConfig
from elastic.engines.vllm.paged import Pages
from elastic.engines.vllm.shards import Shard
from elastic.engines.vllm.table import RoutedRequest
from elastic.kernels import Pattern
from elastic.kernels.params import REACH_QUERIES, REACH_RECENT
from elastic.kernels.reach_oracle import hidden_mass
from elastic.routing.decision import decide_from_keys
from elastic.routing.level import LevelRouter
from elastic.routing.pooling import BoundarySlots, Pooling
from elastic.routing.reach_router import ReachRouter
from elastic.routing.relaxation import decide
from elastic.routing.router import Router, StaticRouter


@dataclass(frozen=True)
class Rotation:
    """A layer's rotary embedding.

    Attributes:
        cos_sin_SR: by position, cosines and then sines of R / 2 frequencies; a scaled rotation holds its scale.
        halves: whether a rotated pair is (i, i + R / 2) as in Llama, or (2 i, 2 i + 1).
    """

    cos_sin_SR: Tensor
    halves: bool = True

    def undo(self, k_PKD: Tensor, position_P: Tensor) -> Tensor:
        """Keys before RoPE, fp32 [P, K, D]; dimensions after the first R are not rotated."""
        cos, sin = self.cos_sin_SR[position_P][:, None].float().chunk(2, dim=-1)
        size = 2 * cos.shape[-1]
        turned, rest = k_PKD.float().split([size, k_PKD.shape[-1] - size], dim=-1)
        one, two = turned.chunk(2, dim=-1) if self.halves else (turned[..., ::2], turned[..., 1::2])
        scale = cos.square() + sin.square()
        pair = ((one * cos + two * sin) / scale, (two * cos - one * sin) / scale)
        back = torch.cat(pair, dim=-1) if self.halves else torch.stack(pair, dim=-1).flatten(-2)
        return torch.cat([back, rest], dim=-1)


@dataclass(frozen=True)
class LayerRouter:
    """What decides in one layer for the KV heads of this process.

    Attributes:
        number: of the layer, from 0.
        router: the layer's.
        rotation: of its keys.
        config: settings.
        kv_heads: K.
        scale: softmax scale.
        shard: where this process's heads are among all.
    """

    number: int
    router: Router
    rotation: Rotation
    config: ElasticConfig
    kv_heads: int
    scale: float
    shard: Shard

    @torch.no_grad()
    def route(self, request: RoutedRequest, q_QHD: Tensor, pages: Pages) -> None:
        """Decide for a request whose prompt ends in this step, and remember it.

        Args:
            q_QHD: after RoPE, of the request's last Q tokens.
            pages: with these tokens' keys.

        Raises:
            RuntimeError: an earlier layer is not decided.
        """
        if len(request.layers) != self.number:
            raise RuntimeError(
                f"layer {self.number} of request {request.name} was to be decided after {len(request.layers)} layers; "
                "each is decided once, in order"
            )
        if isinstance(self.router, StaticRouter):
            route_K = decide(self.router.logits.detach(), self.config.sparsity_bias)
        elif isinstance(self.router, LevelRouter | ReachRouter):
            route_K = self._from_reach(self.router, request, q_QHD, pages)
        else:
            route_K = self._from_keys(request, pages)
        request.layers.append(route_K)

    @torch.no_grad()
    def look(self, request: RoutedRequest, q_QHD: Tensor, pages: Pages) -> None:
        """Remember what queries of a chunk before the prompt's end show to routers by reach; keys stay in the pages."""
        if isinstance(self.router, LevelRouter | ReachRouter):
            self._mass(request, q_QHD, pages)

    def _from_keys(self, request: RoutedRequest, pages: Pages) -> Tensor:
        if request.pooling is None:
            request.pooling = self._pooling(request, pages.cache_NKTE.device)
        pooling = request.pooling
        k_PKD = pages.read_at(pooling.token_M)[0].transpose(0, 1)
        keys_1PKD = self.rotation.undo(k_PKD, pooling.token_M)[None]
        decision, _ = decide_from_keys(
            self.router, keys_1PKD, pooling, self.config, None, row_slice=RowSlice(), fused=False
        )
        return decision.route_NK[0]

    def _pooling(self, request: RoutedRequest, device: torch.device) -> Pooling:
        config = self.config.router
        span = request.user if config.pool_over == "user" else (0, request.prompt_tokens)
        begin, end = (torch.full((1,), place, device=device) for place in span)
        slots = BoundarySlots.of(begin, end, config.pool_tokens)
        weight = slots.weight_N2P
        counts = *weight.unflatten(1, (2, -1)).sum(2).unbind(1), weight.sum(1).clamp_min(1.0)[:, None, None]
        return Pooling(slots.index_N2P[0], weight, *counts)

    def _from_reach(
        self, router: LevelRouter | ReachRouter, request: RoutedRequest, q_QHD: Tensor, pages: Pages
    ) -> Tensor:
        mass_KGQ = self._mass(request, q_QHD, pages)
        del request.mass[self.number]
        seen_2K = torch.stack([mass_KGQ.amax(2).mean(1), mass_KGQ[:, :, -REACH_RECENT:].mean((1, 2))])
        level = isinstance(router, LevelRouter)
        largest, recent = (self.shard.gather(seen_2K) if level else seen_2K).unbind(0)
        earlier = None if request.reach_R is None else request.reach_R[None]
        reached = router.with_earlier(largest[None], recent[None], earlier, None)
        request.reach_R = reached[0]
        length = torch.full((1,), request.user[1], device=reached.device)
        logits = router(router.features(reached, length, self.config.sparse))
        route = decide(logits, self.config.sparsity_bias)[0]
        return self.shard.own(route) if level else route

    def _mass(self, request: RoutedRequest, q_QHD: Tensor, pages: Pages) -> Tensor:
        """Attention that the last queries of the user's words put on hidden keys, [K, G, at most 32]: those of this
        step beside those of earlier chunks. Queries of tokens from the prefix cache were never here and do not count:
        up to sink + window, where shared prefixes end (`Routing.shared_prefix`), nothing is hidden from them.
        """
        begin, end = request.user
        first, past = max(begin, end - REACH_QUERIES), pages.length - q_QHD.shape[0]
        groups, sparse = q_QHD.shape[1] // self.kv_heads, self.config.sparse
        if first < request.cached and request.cached > sparse.sink + sparse.window:
            raise RuntimeError(
                f"{request.cached} tokens came from the prefix cache, among them queries that routers by reach look "
                f"at; expected at most {sparse.sink + sparse.window}"
            )
        if self.number not in request.mass:
            request.mass[self.number] = q_QHD.new_zeros((self.kv_heads, groups, end - first), dtype=torch.float32)
        mass_KGQ, here, stop = request.mass[self.number], max(first, past), min(end, pages.length)
        if here < stop:
            q_KGQD = q_QHD[here - past : stop - past].float().permute(1, 0, 2).unflatten(0, (self.kv_heads, -1))
            k_KSD, _ = pages.read(length=stop)
            found = hidden_mass(q_KGQD, k_KSD, _pattern(sparse, self.scale))
            mass_KGQ[:, :, here - first : stop - first] = found
        return mass_KGQ


def _pattern(sparse: SparseConfig, scale: float) -> Pattern:
    return Pattern(sparse.sink, sparse.window, sparse.granule, sparse.block, scale)
