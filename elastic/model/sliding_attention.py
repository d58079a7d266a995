"""Attention of the backbone's own sliding layers in an attached model: transformers' own, as in the stock model.

transformers makes their mask from the batch's, as for the stock model, and it is used as it came. Where the batch says
otherwise than by a mask of theirs what may be seen (packed rows, steps that follow a padded prompt, masks by layer type
that give the batch's own or none), the mask is made here.
Legend: B rows, H query heads, K KV heads, D head dim.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from elastic.attention.layout import Layout
from elastic.model.pass_state import ForwardPass


def attend_as_stock(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, of_pass: ForwardPass,
    **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Output [B, Lq, H, D] of a sliding layer for q [B, H, Lq, D] and the keys and values that its cache gives.

    Raises:
        ValueError: a slice of a row, whose window begins in another process.
    """
    if of_pass.row_slice.size > 1:
        raise ValueError(
            "context parallelism leaves each process a slice of a row, but the windows of this backbone's own sliding "
            "layers cross slices; train it with DDP or FSDP"
        )
    layout, window = of_pass.layout, int(module.config.sliding_window)  # type: ignore[union-attr,arg-type]
    keys, sinks = key.shape[2], options.get("s_aux") is not None
    if mask is not None and mask.dim() == 4:
        told = not layout.packed and (of_pass.masked or not layout.padded)
    else:  # transformers leaves it out where causal attention of a prompt, or of all keys, is the same
        told = mask is None and not (layout.packed or layout.padded or sinks) and keys <= min(window, layout.keys)
    if not told:
        mask = layout.memo(("sliding", window, keys), lambda: window_mask(layout, window, keys))
        if sinks:  # eager attention adds its mask
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(
                ~mask, torch.finfo(query.dtype).min
            )
    found: Tensor = _stock(module, options)(module, query, key, value, mask, **options)[0]
    return found, None


def _stock(module: nn.Module, options: dict[str, Any]) -> Callable[..., Any]:
    """The attention function of the stock model: SDPA's, or with sinks the eager one of the module's own file."""
    if options.get("s_aux") is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return eager


def window_mask(layout: Layout, window: int, keys: int) -> Tensor:
    """Bool [B, 1, Lq, keys]: what the queries see of a layer's last `keys` keys; a static cache that is not full hands
    out all keys and, after them, the room for more.

    Args:
        window: tokens that a query sees, itself included.
    """
    device = layout.begin_N.device
    first = max(0, layout.keys - keys)
    key = torch.arange(first, first + keys, device=device)
    query = torch.arange(layout.past, layout.keys, device=device)[:, None]
    near = (key <= query) & (key > query - window)
    if layout.packed:
        sample = torch.searchsorted(layout.end_N, torch.arange(layout.keys, device=device), right=True)
        return (near & (sample[layout.past :, None] == sample[layout.keys - keys :]))[None, None]
    begin, end = layout.begin_N[:, None, None], layout.end_N[:, None, None]
    return (near & (key >= begin) & (key < end))[:, None]
