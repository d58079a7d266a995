"""The one table from mode names to what a kernel calls them; modes without a kernel yet are refused here and nowhere
else.
"""

from elastic.config import SparseConfig

FULL, STREAMING, BLOCK_SPARSE = 0, 1, 2
MODE_IDS = {"full": FULL, "streaming": STREAMING}


def mode_id(mode: str) -> int:
    """Numeric mode of a head in the head plan.

    Raises:
        ValueError: a mode that this version cannot run.
    """
    if mode not in MODE_IDS:
        raise ValueError(
            f"mode {mode!r} has no implementation in this version; available are {', '.join(MODE_IDS)}. "
            "Use route0: full with route1: streaming (FA-SSA)"
        )
    return MODE_IDS[mode]


def check_supported(sparse: SparseConfig) -> None:
    """Refuse a configuration whose modes cannot run, naming the configuration (FA-XA, XA-SSA) and the way out."""
    for mode in (sparse.route0, sparse.route1):
        if mode not in MODE_IDS:
            raise ValueError(
                f"configuration {sparse.name} needs the {mode} pattern, which this version does not implement; "
                "use configs/sparse/fa_ssa.yaml (full/streaming)"
            )
