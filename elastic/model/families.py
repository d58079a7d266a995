"""Which model families can be routed, and the little in which they differ (docs/design.md section 6; porting.md)."""

from typing import Any, Protocol

from torch import Tensor

from elastic.protocols import AttentionModule, CausalLM, KeyProjection, Norm
from elastic.routing.router import Router

FAMILIES = ("granite", "llama", "mistral", "olmo2", "qwen2", "qwen3")


class RoutedAttention(KeyProjection, Protocol):
    """An attention module, or what routing reads of one, with its router."""

    router: Router


def prerope_keys(attn: KeyProjection, hidden_E: Tensor) -> Tensor:
    """Keys before RoPE, after the model's own k-norm where it has one: [..., E] -> [..., K, D].

    A norm over D numbers acts on every head by itself (Qwen3), one over K * D on all heads before they part (OLMo 2).
    Hooks on these modules are for the layer's own call: they do not run here, and routers do not see what they change.
    Except under tensor parallelism, whose hooks make the keys of this process's heads.
    """
    cut = hasattr(getattr(attn.k_proj, "weight", None), "to_local")  # tensor parallelism works through hooks
    keys: Tensor = attn.k_proj(hidden_E) if cut else attn.k_proj.forward(hidden_E)
    norm: Norm | None = getattr(attn, "k_norm", None)
    if norm is not None and norm.weight.shape[-1] == keys.shape[-1]:
        keys, norm = norm.forward(keys), None
    keys = keys.view(*keys.shape[:-1], -1, attn.head_dim)
    return keys if norm is None else norm.forward(keys)


def attention_layers(model: CausalLM) -> list[AttentionModule]:
    """The attention modules of a transformers causal LM in layer order.

    Raises:
        ValueError: another family, another attention implementation than SDPA, fused projections, a sliding window,
            attention dropout, an attribute `router`.
    """
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES or not hasattr(model, "get_decoder"):
        raise ValueError(f"model family {family!r} is not supported; tested families are {', '.join(FAMILIES)}")
    if config._attn_implementation != "sdpa":
        raise ValueError(
            f"the model runs attention by {config._attn_implementation!r}, expected 'sdpa', which full heads "
            "reproduce; load it with attn_implementation='sdpa'"
        )
    layers = [layer.self_attn for layer in model.get_decoder().layers]
    for number, attn in enumerate(layers):
        where = f"layer {number}"
        if not hasattr(attn, "k_proj"):
            raise ValueError(
                f"{where} runs attention by {type(attn).__name__}, which has no k_proj, but routers read its keys; "
                "load the model without fused layers"
            )
        window = getattr(attn, "sliding_window", getattr(config, "sliding_window", None))
        if window is not None:
            raise ValueError(
                f"{where} has its own sliding window of {window} tokens, but full heads must see everything; load "
                "the model with sliding_window=None (and layer_types of full_attention)"
            )
        if hasattr(attn, "router"):
            raise ValueError(
                f"{where} has an attribute `router` of its own, which attach would replace; attach a model without one"
            )
        if attn.attention_dropout:
            raise ValueError(
                f"{where} has attention_dropout={attn.attention_dropout}, expected 0 for a frozen backbone; set it "
                "to 0.0"
            )
    return layers
