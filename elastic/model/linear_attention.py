"""Linear attention of the backbone's own layers in an attached model: transformers' own, as in the stock model.

Such a layer carries a state from token to token, so what it must not see is said by the pass's layout alone: padding
before a prompt is nothing to it, as in the stock model, and every sample of a packed row begins without a state.
Legend: B rows, S tokens, E hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from elastic.attention.layout import Layout
from elastic.cache.keyword import without_cache
from elastic.model.chunking import Instead
from elastic.model.families import linear_attention
from elastic.model.layer_hooks import CALL
from elastic.model.pass_state import ForwardPass
from elastic.protocols import Decoder


class StockLinear(Instead):
    """The forward of a layer's linear attention under a pass. Callable in place of the method; copies with its model.

    Args:
        module: maps hidden states [B, S, E] to [B, S, E], given a 2D mask of the same tokens and a cache.
    """

    def __call__(self, hidden_states: Tensor, **options: Any) -> Tensor:
        """Output [B, S, E].

        Raises:
            ValueError: a call outside the decoder, or a slice of a row, whose state comes from another process.
        """
        of_pass = options.pop(CALL, None)
        if not isinstance(of_pass, ForwardPass):
            raise ValueError("this layer was called outside the attached model's decoder; call the whole model")
        if of_pass.row_slice.size > 1:
            raise ValueError(
                "context parallelism leaves each process a slice of a row, but linear attention carries a state "
                "through the whole of it; train this backbone with DDP or FSDP"
            )
        layout = of_pass.layout
        if not layout.packed:
            mask = layout.memo("linear", lambda: _valid(layout)) if layout.padded and not layout.past else None
            found: Tensor = self.inner(hidden_states, **{**options, "attention_mask": mask})
            return found
        options = {**without_cache(options), "attention_mask": None}  # nothing can follow a packed row
        lengths = [end - begin for _, begin, end in layout.spans]
        return torch.cat([self.inner(part, **options) for part in hidden_states.split(lengths, 1)], 1)


def keep_linear(decoder: Decoder, stock: Mapping[int, int | None]) -> None:
    """Put `StockLinear` before the linear attention of a decoder's own layers; `give_back` undoes it.

    Args:
        stock: see `elastic.model.layer_types.stock_layers`.
    """
    for number, window in stock.items():
        if window is None:
            module = linear_attention(decoder.layers[number])
            module.forward = StockLinear(module)


def _valid(layout: Layout) -> Tensor:
    """Bool [B, S]: which tokens of a prompt are not padding."""
    key = torch.arange(layout.keys, device=layout.begin_N.device)
    return (key >= layout.begin_N[:, None]) & (key < layout.end_N[:, None])
