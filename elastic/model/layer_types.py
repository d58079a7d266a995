"""Which layers of a backbone get routers, by its configuration: those of full attention. Layers of the backbone's own
kinds, with a sliding window or linear attention, stay as they are. Imports no torch.
"""

from typing import Any

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def has_sinks(config: Any) -> bool:
    """Whether heads have an attention sink: a learnt logit that takes its share of every softmax (gpt-oss)."""
    return getattr(config, "model_type", None) == "gpt_oss"


def stock_implementation(config: Any) -> str:
    """The attention implementation of transformers that full heads reproduce: SDPA knows no sinks."""
    return "eager" if has_sinks(config) else "sdpa"


def stock_layers(config: Any) -> dict[int, int | None]:
    """The layers that stay as they are, by number: the window of a sliding one in tokens, None for linear attention.
    Empty where every layer sees everything.

    Args:
        config: of the model.

    Raises:
        ValueError: layers of another type than full, sliding and linear attention, or no layer of full attention.
    """
    types = list(getattr(config, "layer_types", None) or ())[: config.num_hidden_layers]
    other = sorted(set(types) - {FULL, SLIDING, LINEAR})
    if other:
        raise ValueError(
            f"layer {types.index(other[0])} is of type {other[0]!r}, expected {FULL}, {SLIDING} or {LINEAR}; routers "
            "know how to sit in layers of full attention only"
        )
    found = {n: int(config.sliding_window) if kind == SLIDING else None for n, kind in enumerate(types) if kind != FULL}
    if found and len(found) == len(types):
        windows = [f"its own sliding window of {window} tokens" for window in found.values() if window is not None]
        raise ValueError(
            f"every layer has {' or '.join([*windows[:1], *['linear attention'] * (None in found.values())])}, but "
            f"routers decide for layers of full attention, of which there is none; load the model with layer_types of "
            f"{FULL}"
        )
    return found


def routed_layers(config: Any) -> tuple[int, ...]:
    """Decoder layers that get routers, in order: those of full attention.

    Raises:
        ValueError: see `stock_layers`.
    """
    stock = stock_layers(config)
    return tuple(number for number in range(config.num_hidden_layers) if number not in stock)
