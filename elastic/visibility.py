"""The one visibility rule (docs/design.md section 2): which keys a query sees under full and streaming attention.

Coordinates are relative to the sample: position 0 is its first valid token, so left padding and packing need no case of
their own. The functions use only arithmetic and comparisons, so ints, NumPy arrays and torch tensors all work; the
oracle, the PyTorch path, the kernels' tests, decoding and the metrics call this file and nothing else.
"""

from typing import Any


def lower_bound(position: Any, window: int, granule: str, block: int) -> Any:
    """First key of the local window of the query at `position` (a), before clipping at 0.

    Token granule: a - window + 1, so the window holds `window` keys, the query itself included. Block granule: the
        start of the block
    `window / block - 1` blocks before the query's own.
    """
    if granule == "token":
        return position - (window - 1)
    return (position // block - (window // block - 1)) * block


def visible(position: Any, key: Any, *, sink: int, window: int, granule: str, block: int) -> Any:
    """Whether the streaming query at `position` sees `key`: j <= a and (j < sink or j >= lo(a)). Broadcasts."""
    return (key <= position) & ((key < sink) | (key >= lower_bound(position, window, granule, block)))
