"""Which model families can be routed, and the little in which they differ (docs/design.md section 6; porting.md)."""

from typing import Any, Protocol

from torch import Tensor, nn

from elastic.model.layer_types import LINEAR, routed_layers, stock_implementation, stock_layers
from elastic.model.text_part import WITH_TEXT
from elastic.protocols import AttentionModule, CausalLM, DecoderLayer, KeyProjection, Norm
from elastic.routing.router import Router

FAMILIES = (
    "cohere", "cohere2", "gemma3_text", "glm4", "gpt_oss", "granite", "granitemoe", "llama", "ministral", "mistral",
    "mixtral", "olmo2", "olmo3", "olmoe", "phi3", "qwen2", "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe",
    "qwen3_next", "smollm3",
)  # fmt: skip
_DROPOUTS = ("resid_pdrop", "router_jitter_noise")  # of the layer, beside attention's own: Phi's, Mixtral's


class RoutedAttention(KeyProjection, Protocol):
    """An attention module, or what routing reads of one, with its router."""

    router: Router


def prerope_keys(attn: KeyProjection, hidden_E: Tensor) -> Tensor:
    """Keys before RoPE, after the model's own k-norm and clipping where it has them: [..., E] -> [..., K, D].

    A norm over K * D numbers acts on all heads before they part (OLMo), any other on every head by itself, with one
    weight for all (Qwen3) or one for each (Cohere). Hooks on these modules are for the layer's own call: they do not
    run here, and routers do not see what they change. Except under tensor parallelism, whose hooks make the keys of
    this process's heads.
    """
    keys = _projected_keys(attn, hidden_E)
    norm: Norm | None = getattr(attn, "k_norm", None)
    if norm is not None and norm.weight.dim() == 1 and norm.weight.shape[0] == keys.shape[-1]:
        keys, norm = norm.forward(keys), None
    clip = getattr(getattr(attn, "config", None), "clip_qkv", None)
    if clip is not None:
        keys = keys.clamp(-clip, clip)
    keys = keys.view(*keys.shape[:-1], -1, attn.head_dim)
    return keys if norm is None else norm.forward(keys[None])[0]  # as in the model, heads are not the second axis


def _projected_keys(attn: KeyProjection, hidden_E: Tensor) -> Tensor:
    """What a layer's projection makes of its input, the keys alone: [..., E] -> [..., K * D]."""
    projection = key_projection(attn)
    cut = hasattr(getattr(projection, "weight", None), "to_local")  # tensor parallelism works through hooks
    projected: Tensor = projection(hidden_E) if cut else projection.forward(hidden_E)
    if hasattr(attn, "k_proj"):
        return projected
    config: Any = getattr(attn, "config", None)  # fused: queries, keys, values
    first = config.num_attention_heads * attn.head_dim
    return projected[..., first : first + config.num_key_value_heads * attn.head_dim]


def key_projection(attn: KeyProjection) -> nn.Module:
    """The module that makes the keys of a layer: `k_proj`, or `qkv_proj`, which makes queries and values too.

    Raises:
        AttributeError: neither is there.
    """
    module: nn.Module = getattr(attn, "k_proj" if hasattr(attn, "k_proj") else "qkv_proj")
    return module


def feed_forward(layer: DecoderLayer) -> nn.Module:
    """The MLP of a decoder layer, or its experts: `mlp`, or `block_sparse_moe` (Granite MoE)."""
    module: nn.Module = getattr(layer, "mlp" if hasattr(layer, "mlp") else "block_sparse_moe")
    return module


def linear_attention(layer: DecoderLayer) -> nn.Module:
    """The linear attention of a layer that is of this kind."""
    module: nn.Module = layer.linear_attn  # type: ignore[attr-defined]
    return module


def check_family(family: str, has_decoder: bool = True) -> None:
    """Refuse what is not one of `FAMILIES`.

    Raises:
        ValueError: with those that are.
    """
    if family not in FAMILIES or not has_decoder:
        told = "; give its text part, elastic.model.text_part.text_part(model)" if family in WITH_TEXT else ""
        raise ValueError(f"model family {family!r} is not supported; tested families are {', '.join(FAMILIES)}{told}")


def attention_layers(model: CausalLM) -> list[AttentionModule]:
    """The attention modules of a transformers causal LM that get routers, in layer order.

    Raises:
        ValueError: another family, another attention implementation than SDPA, unknown projections, a sliding window in
            every layer, dropout, an attribute `router`.
    """
    config: Any = getattr(model, "config", None)
    check_family(getattr(config, "model_type", type(model).__name__), hasattr(model, "get_decoder"))
    expected = stock_implementation(config)
    if config._attn_implementation != expected:
        raise ValueError(
            f"the model runs attention by {config._attn_implementation!r}, expected {expected!r}, which full heads "
            f"reproduce; load it with attn_implementation={expected!r}"
        )
    layers, found = model.get_decoder().layers, list[AttentionModule]()
    for number, window in stock_layers(config).items():
        if window is None and not hasattr(layers[number], "linear_attn"):
            raise ValueError(
                f"layer {number} is of type {LINEAR!r}, but has no linear_attn; expected a model without such layers"
            )
    for number in routed_layers(config):
        found.append(layers[number].self_attn)
        _check_layer(found[-1], f"layer {number}", config)
    return found


def _check_layer(attn: AttentionModule, where: str, config: Any) -> None:
    """Raise ValueError for an attention layer that cannot be routed."""
    if not hasattr(attn, "k_proj") and not hasattr(attn, "qkv_proj"):
        raise ValueError(
            f"{where} runs attention by {type(attn).__name__}, which has neither k_proj nor qkv_proj, but routers read "
            "its keys; load the model without fused layers"
        )
    window = getattr(attn, "sliding_window", getattr(config, "sliding_window", None))
    if window is not None:
        raise ValueError(
            f"{where} has its own sliding window of {window} tokens, but full heads must see everything; load "
            "the model with sliding_window=None"
        )
    if not getattr(attn, "is_causal", True):
        raise ValueError(
            f"{where} lets queries see later keys, but routers decide what of the past is seen; load the model with "
            "use_bidirectional_attention=False"
        )
    if hasattr(attn, "router"):
        raise ValueError(
            f"{where} has an attribute `router` of its own, which attach would replace; attach a model without one"
        )
    dropouts = {"attention_dropout": attn.attention_dropout, **{name: getattr(config, name, 0) for name in _DROPOUTS}}
    for name, value in dropouts.items():
        if value:
            raise ValueError(f"{where} has {name}={value}, expected 0 for a frozen backbone; set it to 0.0")
