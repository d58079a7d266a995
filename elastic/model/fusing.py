"""Which modules of a decoder run as the fused parts of `elastic.model.fused_parts`, and how (docs/design.md section 7).

Modules are known by their classes in transformers, whose mathematics is that of a fused part; all others, also those
that something else has changed, run their own code. Nothing is copied: the parts read the modules' own weights.
Legend: B rows, S tokens, H query heads, K KV heads, D head dim, E hidden size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from elastic.cache.keyword import NEW, OLD, cache_of
from elastic.kernels.token_products import MOST_TOKENS, token_gated, token_products, unsupported_tokens
from elastic.model import fused_parts
from elastic.model.chunking import Chunked, Instead, chunk
from elastic.model.fused_parts import Function, Parts
from elastic.model.pass_state import AttachedState
from elastic.protocols import Decoder


def _table(kind: str, *groups: tuple[str, Function]) -> dict[str, Function]:
    return {f"{name}{kind}": function for names, function in groups for name in names.split()}


NORMS = _table(
    "RMSNorm",
    ("Glm4 Granite GraniteMoe Llama Ministral Mistral Mixtral Olmoe Phi3 Qwen2 Qwen3 Qwen3Moe SmolLM3",
     fused_parts.rms_norm),
    ("GptOss Olmo2 Olmo3", fused_parts.rms_norm_late),
    ("Gemma3 Qwen3Next Qwen3_5 Qwen3_5Moe", fused_parts.rms_norm_offset),
)  # fmt: skip
_MLPS = (
    "Cohere Cohere2 Gemma3 Granite Llama Ministral Mistral Olmo2 Olmo3 Olmoe Qwen2 Qwen3 Qwen3Moe Qwen3Next Qwen3_5 "
    "Qwen3_5Moe SmolLM3"
)
MLPS = {f"{name}MLP" for name in _MLPS.split()}
ACTIVATIONS = {
    "SiLU": fused_parts.silu_product,
    "SiLUActivation": fused_parts.silu_product,
    "GELUTanh": fused_parts.gelu_product,
}
GATES = {fused_parts.silu_product: "silu", fused_parts.gelu_product: "gelu"}  # as `token_gated` names them
# Projections, an RMS norm of each head or none, RoPE on all of D, cache, attention, projection.
_ATTENTIONS = "Granite Llama Mistral Mixtral Qwen2 Qwen3 Qwen3Moe"
ATTENTIONS = {f"{name}Attention" for name in _ATTENTIONS.split()}
# Norm, attention, sum, norm, MLP, sum.
_LAYERS = "Llama Mistral Qwen2 Qwen3 SmolLM3"
LAYERS = {f"{name}DecoderLayer" for name in _LAYERS.split()}


def is_known(module: nn.Module, names: Any) -> bool:
    """Whether a module is of one of these classes of transformers, not of a subclass, and the class as it was."""
    kind = type(module)
    ours = kind.__module__.startswith("transformers.models.") and kind.__name__ in names
    return ours and kind.forward.__module__ == kind.__module__  # else somebody put another forward into the class


class FusedNorm:
    """An RMS norm in one pass over its input, whose fp32 intermediates exist nowhere: no chunks are needed."""

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        self.module, self.parts, self.function = module, parts, NORMS[type(module).__name__]

    def takes(self, hidden: Tensor) -> bool:
        """Whether this call runs fused: of tokens, or heads in either order, that follow each other in memory."""
        return (hidden.is_contiguous() or _heads_first(hidden)) and self.parts.take(hidden, self.weight)

    @property
    def weight(self) -> Tensor:
        """As it is now: parameters are replaced."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def eps(self) -> float:
        """By either of its names."""
        named: Any = vars(self.module)
        return float(named["variance_epsilon"] if "variance_epsilon" in named else named["eps"])

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., E] -> [..., E], in the order in memory in which it came."""
        if _heads_first(hidden):
            return self(hidden.transpose(1, 2)).transpose(1, 2)
        found: Tensor = self.parts.run(self.function, hidden.flatten(0, -2), self.weight, self.eps)
        return found.view(hidden.shape)


def _heads_first(heads: Tensor) -> bool:
    """Whether these are heads [B, H, S, D] of tokens that are [B, S, H, D] in memory."""
    return heads.dim() == 4 and not heads.is_contiguous() and heads.transpose(1, 2).is_contiguous()


class FusedMLP:
    """down(act(gate) * up), the product in one pass, and results written to their place; at most `size()` tokens at a
    time, 0 is all at once.
    """

    def __init__(self, module: nn.Module, parts: Parts, size: Callable[[], int]) -> None:
        self.module, self.parts, self.size = module, parts, size

    def takes(self, hidden: Tensor) -> bool:
        """Whether this call runs fused; the activation may have been changed since."""
        act: Any = self.module.act_fn
        kind = type(act)
        known = kind.__name__ in ACTIVATIONS and kind.__module__.startswith(("torch.nn.", "transformers."))
        return known and is_bare(act) and self.parts.take(hidden)

    def product(self, hidden: Tensor) -> Tensor:
        """What `down_proj` reads."""
        mlp: Any = self.module
        function, found = ACTIVATIONS[type(mlp.act_fn).__name__], hidden
        if is_step(hidden, mlp.gate_proj, mlp.up_proj) and mlp.gate_proj.bias is mlp.up_proj.bias is None:
            found = token_gated(hidden.flatten(0, -2), mlp.gate_proj.weight, mlp.up_proj.weight, GATES[function])
        else:
            gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
            found = self.parts.run(function, gate.flatten(0, -2), up.flatten(0, -2))
        return found.view(*hidden.shape[:-1], -1)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[B, S, E] -> [B, S, E]."""
        mlp: Any = self.module
        size = self.size()
        if not 0 < size < hidden.shape[:-1].numel() or torch.is_grad_enabled():
            return projected(self.product(hidden), mlp.down_proj)[0]
        plain = is_plain(mlp.down_proj, hidden) and mlp.down_proj.bias is None
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)  # of which parts are views
        for part, place in zip(*(x.flatten(0, -2).split(size) for x in (hidden, out)), strict=True):
            if plain:
                torch.mm(self.product(part), mlp.down_proj.weight.t(), out=place)
            else:
                place.copy_(mlp.down_proj(self.product(part)))
        return out

    def added(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """The sum of what the call returns and `residual`, which may be overwritten."""
        down: Any = self.module.down_proj
        if not is_step(hidden, down) or down.bias is not None:
            return residual.add_(self(hidden))
        product = self.product(hidden).flatten(0, -2)
        return token_products(product, [down.weight], [residual.flatten(0, -2)])[0].view(residual.shape)


def is_step(hidden: Tensor, *linears: nn.Module) -> bool:
    """Whether these are a few tokens at inference, whose products with these weights `token_products` takes."""
    if torch.is_grad_enabled() or hidden.shape[:-1].numel() > MOST_TOKENS:
        return False
    weights: Any = [linear.weight for linear in linears if is_plain(linear, hidden)]
    return len(weights) == len(linears) and unsupported_tokens(hidden, *weights) is None


def is_plain(linear: nn.Module, hidden: Tensor) -> bool:
    """Whether a projection is nothing but a product with its weight, here and in this precision, and perhaps a bias."""
    if type(linear) is not nn.Linear or not is_bare(linear):
        return False
    weight, kind = linear.weight, hidden.device.type
    alike = (weight.dtype, weight.device) == (hidden.dtype, hidden.device)
    # Of no subclass, which may hold quantised numbers or a part of them; and no view that FSDP puts in its place.
    return alike and type(weight) is nn.Parameter and not torch.is_autocast_enabled(kind)


def projected(hidden: Tensor, *linears: nn.Module) -> list[Tensor]:
    """What projections make of the same input: of a few tokens in one launch, else one after the other."""
    if not is_step(hidden, *linears):
        return [linear(hidden) for linear in linears]
    weights: Any = [linear.weight for linear in linears]
    biases: Any = [linear.bias for linear in linears]
    return [x.view(*hidden.shape[:-1], -1) for x in token_products(hidden.flatten(0, -2), weights, biases)]


def is_bare(module: nn.Module) -> bool:
    """Whether nothing was hung on a module that its call would run."""
    return "forward" not in vars(module) and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module would run hooks, its own or those of all modules, in either direction."""
    forward, backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(forward or backward or module._backward_pre_hooks or _has_any_global_hook())


class FusedAttention(Instead):
    """An attention module whose head norms and RoPE are one pass."""

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        super().__init__(module)
        self.module, self.parts = module, parts

    def __call__(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """As the module's own forward, which transformers calls by these names and that of the KV cache."""
        attn: Any = self.module
        norms = [fused_norm(attn.get_submodule(name)) for name in ("q_norm", "k_norm") if hasattr(attn, name)]
        ready = self.parts.take(hidden_states) and all(norm is not None and norm.takes(hidden_states) for norm in norms)
        if position_embeddings is None or not ready:
            return self.inner(hidden_states, position_embeddings, attention_mask, **options)
        cache: Any = cache_of(options)
        shape = (*hidden_states.shape[:-1], -1, attn.head_dim)
        q, k, v = projected(hidden_states, attn.q_proj, attn.k_proj, attn.v_proj)
        cos_sin = [x.expand(*shape[:2], -1).flatten(0, 1) for x in position_embeddings]
        q, k = self.rotated(q.view(shape).flatten(0, 1), k.view(shape).flatten(0, 1), norms, *cos_sin)
        q, k, v = (x.view(shape).transpose(1, 2) for x in (q, k, v))
        if cache is not None:
            k, v = cache.update(k, v, attn.layer_idx)
        window = getattr(attn, "sliding_window", getattr(attn.config, "sliding_window", None))
        others = {name: value for name, value in options.items() if name not in (NEW, OLD)}
        out, weights = attention_of(attn)(
            attn, q, k, v, attention_mask, dropout=0.0, scaling=attn.scaling, sliding_window=window, **others
        )
        out = out.reshape(*hidden_states.shape[:-1], -1)
        return projected(out, attn.o_proj)[0], weights

    def rotated(
        self, q_THD: Tensor, k_TKD: Tensor, norms: list[FusedNorm], cos_TD: Tensor, sin_TD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys as attention takes them."""
        found: tuple[Tensor, Tensor]
        if not norms:
            found = self.parts.run(fused_parts.rotate, q_THD, k_TKD, cos_TD, sin_TD)
        else:
            first, second = norms
            operands = (first.weight, second.weight, first.eps, cos_TD, sin_TD)
            found = self.parts.run(fused_parts.norm_rotate, q_THD, k_TKD, *operands)
        return found


def attention_of(attn: Any) -> Any:
    """transformers' attention function by the name in the module's config."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[attn.config._attn_implementation]


class FusedLayer(Instead):
    """A decoder layer at inference: the sum after attention is one pass with the norm that follows, and the MLP adds
    its output to it in place. Under gradients the layer's own forward runs, with its checkpointing.
    """

    def __init__(self, module: nn.Module, parts: Parts) -> None:
        super().__init__(module)
        self.module, self.parts = module, parts

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the module's own forward."""
        layer: Any = self.module
        norm, mlp = fused_norm(layer.post_attention_layernorm), fused_of(layer.mlp)
        ready = norm is not None and mlp is not None and norm.takes(hidden_states) and mlp.takes(hidden_states)
        if torch.is_grad_enabled() or args or not ready:
            return self.inner(hidden_states, *args, **kwargs)
        attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
        given = (hidden_states.flatten(0, 1), attended.flatten(0, 1), norm.weight, norm.eps)
        hidden, normed = (x.view(attended.shape) for x in self.parts.run(fused_parts.add_rms_norm, *given))
        return mlp.added(normed, hidden)


def fused_of(module: nn.Module) -> Any:
    """The fused part that runs in place of a module, unless something was hung on the module that must run with it."""
    forward = vars(module).get("forward")
    return forward.fused if isinstance(forward, Chunked) and not is_hooked(module) else None


def fused_norm(module: nn.Module) -> Any:
    """`fused_of` a norm, if it is of the kind that other parts contain."""
    found = fused_of(module)
    return found if getattr(found, "function", None) is fused_parts.rms_norm else None


def fuse(decoder: Decoder, state: AttachedState) -> None:
    """Chunk a decoder's MLPs and norms, and let what is known run fused where `state.layer_parts` says so."""
    modules = [module for module in decoder.modules() if "forward" not in vars(module)]  # of nobody else
    chunk(decoder, state.chunk_tokens)
    state.layer_parts.few = fused_parts.hidden_tokens(decoder)
    for module in modules:
        forward = vars(module).get("forward")
        if isinstance(forward, Chunked) and is_known(module, NORMS):
            forward.fused = FusedNorm(module, state.layer_parts)
        elif isinstance(forward, Chunked) and is_known(module, MLPS):
            forward.fused = FusedMLP(module, state.layer_parts, state.chunk_tokens)
        elif is_known(module, ATTENTIONS):
            module.forward = FusedAttention(module, state.layer_parts)
        elif is_known(module, LAYERS):
            module.forward = FusedLayer(module, state.layer_parts)
