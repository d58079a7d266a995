"""The one table from mode names to what a kernel calls them."""

from elastic.config import CHOOSING, CHOOSING_IN_STEPS, SparseConfig
from elastic.kernels.params import BLOCK_SPARSE, FULL, STREAMING

__all__ = ["BLOCK_SPARSE", "FULL", "MODE_IDS", "STREAMING", "mode_ids"]

MODE_IDS = {"full": FULL, "streaming": STREAMING, **dict.fromkeys(CHOOSING, BLOCK_SPARSE)}


def mode_ids(sparse: SparseConfig, queries: int | None = None) -> tuple[int, int]:
    """Numeric modes of heads with route 0 and route 1 in a forward pass of `queries` new tokens per row, several by
    default.

    For a single query, as in decoding, heads that choose blocks attend in full, but those of NSA and InfLLM-V2:
    XAttention has no antidiagonals to estimate from, and its published code and those of MoBA, FlexPrefill and
    FlashPrefill do so too.
    """
    modes = (sparse.route0, sparse.route1)
    full = [mode for mode in CHOOSING if queries == 1 and mode not in CHOOSING_IN_STEPS]
    zero, one = (FULL if mode in full else MODE_IDS[mode] for mode in modes)
    return zero, one
