"""What a routed model answers when the first part of a prompt runs dense and the decision is made at its end: stock
transformers with every head's mask written out, the whole sequence read again for each token.

Legend: S tokens, H query heads, K KV heads, G = H / K, D head dim, L layers, Q queries that reach looks at.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from elastic.data.prompts import EncodedPrompt
from elastic.kernels.params import REACH_QUERIES, REACH_RECENT
from elastic.model.attach import elastic_config, routers
from elastic.model.loading import load_backbone
from elastic.routing.relaxation import decide
from elastic.visibility import visible
from tests.helpers.vllm_engine import Routed

_NAME = "written_out"


class DenseThenRouted:
    """The reference for one routed model, whose routers and settings it reads.

    Args:
        routed: in transformers; its backbone is loaded once more, without anything attached.
    """

    def __init__(self, routed: Routed) -> None:
        AttentionInterface.register(_NAME, self._attend)
        AttentionMaskInterface.register(_NAME, lambda *_, **__: None)
        self.model: Any = load_backbone(str(routed.folder))[0].eval()
        self.model.config._attn_implementation = _NAME
        self.routers, self.config = routers(routed.model), elastic_config(routed.model)
        self.known: dict[tuple[Any, ...], tuple[list[int], list[list[int]]]] = {}
        self.seen: list[tuple[Tensor, Tensor]] = []  # by layer, queries and keys after RoPE
        self.keys: list[Tensor] = []  # by layer, keys before RoPE [S, K, D]
        for layer in self.model.model.layers:
            layer.self_attn.k_proj.register_forward_hook(lambda _, __, found: self.keys.append(found[0]))
            norm = getattr(layer.self_attn, "k_norm", None)
            if norm is not None:
                norm.register_forward_hook(self._normed)

    def _normed(self, _module: Any, _given: Any, found: Tensor) -> None:
        self.keys[-1] = found[0]

    def answer(self, prompt: EncodedPrompt, cut: int, tokens: int) -> tuple[list[int], list[list[int]]]:
        """`tokens` greedy ones, and the routes [L][K], of a prompt whose first `cut` tokens run dense."""
        key = (tuple(prompt.ids), cut)
        if key not in self.known or len(self.known[key][0]) < tokens:
            self.known[key] = self._answer(prompt, cut, tokens)
        found, routes = self.known[key]
        return found[:tokens], routes

    @torch.no_grad()
    def _answer(self, prompt: EncodedPrompt, cut: int, tokens: int) -> tuple[list[int], list[list[int]]]:
        layers, ids = len(self.routers), list(prompt.ids)
        self.cut, self.prompt = cut, len(ids)
        self.routes = [[0] * router.kv_heads for router in self.routers]
        earlier = None
        for layer in range(layers):  # what a layer sees depends on the routes before it alone
            self._read(ids)
            self.routes[layer], earlier = self._decide(layer, prompt.user, earlier)
        for _ in range(tokens):
            ids.append(int(self._read(ids).argmax()))
        return ids[self.prompt :], self.routes

    @torch.no_grad()
    def gaps(self, prompt: list[int], cut: int, routes: list[list[int]], answer: list[int]) -> list[float]:
        """How much less likely each token of an answer is than the likeliest one there, in nats; 0 where it is that.
        For answers in half precision, which may choose the other of two that are as good as equal.

        Args:
            cut: tokens of the prompt that run dense; the rest and the answer run under `routes`.
        """
        self.cut, self.prompt, self.routes = cut, len(prompt), routes
        logits = self._logits([*prompt, *answer])[len(prompt) - 1 : -1]
        return (logits.amax(1) - logits.gather(1, torch.tensor(answer)[:, None])[:, 0]).tolist()

    def _read(self, ids: list[int]) -> Tensor:
        return self._logits(ids)[-1]

    def _logits(self, ids: list[int]) -> Tensor:
        self.seen, self.keys = [], []
        logits: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits

    def _decide(self, layer: int, user: tuple[int, int], earlier: Tensor | None) -> tuple[list[int], Tensor | None]:
        router, settings, (begin, end) = self.routers[layer], self.config.router, user
        if router.after_rope:
            mass_KGQ = self._hidden(layer, user)
            largest, recent = mass_KGQ.amax(2).mean(1), mass_KGQ[:, :, -REACH_RECENT:].mean((1, 2))
            earlier = router.with_earlier(largest[None], recent[None], earlier, None)
            features = router.features(earlier, torch.tensor([end]), self.config.sparse)
        else:
            if settings.pool_over == "prompt":
                begin, end = 0, self.prompt
            ends = {
                *range(begin, min(end, begin + settings.pool_tokens)),
                *range(max(begin, end - settings.pool_tokens), end),
            }
            keys_SKD = self.keys[layer].reshape(self.prompt, router.kv_heads, -1)
            features = keys_SKD[sorted(ends)].mean(0)[None]
        return decide(router(features), self.config.sparsity_bias)[0].int().tolist(), earlier

    def _hidden(self, layer: int, user: tuple[int, int]) -> Tensor:
        """Softmax over all keys of the user's last queries, summed over those that streaming heads hide, [K, G, Q]."""
        q_HSD, k_KSD = self.seen[layer]
        begin, end = max(user[0], user[1] - REACH_QUERIES), user[1]
        q_KGQD = q_HSD[:, begin:end].unflatten(0, (k_KSD.shape[0], -1))
        weight = (self.scale * q_KGQD @ k_KSD[:, None, :end].mT).masked_fill(
            ~self._mask(end, False)[begin:], -torch.inf
        )
        return (weight.softmax(-1) * ~self._mask(end, True)[begin:]).sum(-1)

    def _mask(self, tokens: int, streaming: bool) -> Tensor:
        """Bool [S, S]: what a head sees."""
        sparse, position = self.config.sparse, torch.arange(tokens)
        if not streaming:
            return position <= position[:, None]
        rule = {"sink": sparse.sink, "window": sparse.window, "granule": sparse.granule, "block": sparse.block}
        return visible(position[:, None], position, **rule)

    def _attend(
        self, module: Any, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, _mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        self.seen.append((q_BHSD[0], k_BKSD[0]))
        self.scale, tokens, groups = scaling, q_BHSD.shape[2], q_BHSD.shape[1] // k_BKSD.shape[1]
        modes = (self.config.sparse.route0, self.config.sparse.route1)
        heads = []
        for route in self.routes[module.layer_idx]:
            mask = self._mask(tokens, False)
            mask[self.cut :] = self._mask(tokens, modes[route] == "streaming")[self.cut :]
            if self.config.dense_decode:
                mask[self.prompt :] = self._mask(tokens, modes[0] == "streaming")[self.prompt :]
            heads += [mask] * groups
        weight = (scaling * q_BHSD @ k_BKSD.repeat_interleave(groups, 1).mT).masked_fill(
            ~torch.stack(heads), -torch.inf
        )
        return (weight.softmax(-1) @ v_BKSD.repeat_interleave(groups, 1)).transpose(1, 2), None
