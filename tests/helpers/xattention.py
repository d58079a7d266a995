"""Configurations with XAttention heads, for the tests."""

from elastic.config import SparseConfig

MODES = {"FA-XA": ("full", "xattention"), "XA-SSA": ("xattention", "streaming"), "SSA-XA": ("streaming", "xattention")}


def sparse_of(name: str, block: int = 4, **sizes) -> SparseConfig:
    """A configuration whose XAttention heads leave out much."""
    route0, route1 = MODES[name]
    sizes = {"sink": block, "window": 2 * block, "stride": min(4, block), "threshold": 0.5, **sizes}
    return SparseConfig(route0, route1, block=block, **sizes)
