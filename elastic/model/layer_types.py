"""Which layers of a backbone get routers, by its configuration: those of full attention. Layers with a sliding window
of the backbone's own stay as they are. Imports no torch.
"""

from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


def has_sinks(config: Any) -> bool:
    """Whether heads have an attention sink: a learnt logit that takes its share of every softmax (gpt-oss)."""
    return getattr(config, "model_type", None) == "gpt_oss"


def stock_implementation(config: Any) -> str:
    """The attention implementation of transformers that full heads reproduce: SDPA knows no sinks."""
    return "eager" if has_sinks(config) else "sdpa"


def sliding_windows(config: Any) -> dict[int, int]:
    """The backbone's own sliding layers: window in tokens by decoder layer. Empty where every layer sees everything.

    Args:
        config: of the model.

    Raises:
        ValueError: layers of another type than full and sliding attention, or no layer of full attention.
    """
    types = list(getattr(config, "layer_types", None) or ())[: config.num_hidden_layers]
    other = sorted(set(types) - {FULL, SLIDING})
    if other:
        raise ValueError(
            f"layer {types.index(other[0])} is of type {other[0]!r}, expected {FULL} or {SLIDING}; routers know how "
            "to sit in layers of full attention only"
        )
    found = {number: int(config.sliding_window) for number, kind in enumerate(types) if kind == SLIDING}
    if found and len(found) == len(types):
        raise ValueError(
            f"every layer has its own sliding window of {config.sliding_window} tokens, but routers decide for layers "
            "of full attention, of which there is none; load the model with layer_types of full_attention"
        )
    return found


def routed_layers(config: Any) -> tuple[int, ...]:
    """Decoder layers that get routers, in order: those without a sliding window of their own.

    Raises:
        ValueError: see `sliding_windows`.
    """
    windows = sliding_windows(config)
    return tuple(number for number in range(config.num_hidden_layers) if number not in windows)
