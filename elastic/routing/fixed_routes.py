"""Routes that do not depend on the input: all heads alike, heads drawn at random, heads of a pattern file or of a
calibration.

Legend: L layers, K KV heads.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.config import SparseConfig
from elastic.routing.calibration import first_heads, is_calibration, read_calibration


def uniform(layers: int, kv_heads: int, route: int) -> Tensor:
    """Every head on the same route, [L, K]."""
    return torch.full((layers, kv_heads), float(route))


def drawn(layers: int, kv_heads: int, msr: float, seed: int) -> Tensor:
    """A share `msr` of all heads, drawn by `seed`, on route 1, [L, K]."""
    order = torch.randperm(layers * kv_heads, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return first_heads(order.tolist(), msr, layers, kv_heads)


def head_order(
    path: Path,
    layers: int,
    kv_heads: int,
    msr: float | None = None,
    architecture: Mapping[str, Any] | None = None,
    sparse: SparseConfig | None = None,
) -> tuple[Sequence[int], float]:
    """All heads (layer * K + KV head) of a file, those first that need full attention least, and the share of them that
    runs on route 1.

    A pattern file has one line per layer and one number per KV head, divided by tabs, spaces or commas. A number is how
    much the head needs full attention (DuoAttention's scores, PruLong's masks). A calibration is what
    `elastic calibrate` wrote.

    Args:
        msr: the share; None: the heads below 0.5 of a pattern, `Calibration.level()` of a calibration.
        architecture: of the backbone, which a calibration must be of, as far as it is known.
        sparse: what the heads choose between, which a calibration must have measured; None: not known yet.

    Raises:
        OSError: a file that cannot be read.
        ValueError: not numbers, not as many as the backbone has layers and KV heads, or a calibration that is damaged,
            of another architecture or of other modes (`Calibration.check_sparse`).
    """
    if is_calibration(path):
        found = read_calibration(path)
        found.check_backbone(architecture or {"num_layers": layers, "num_kv_heads": kv_heads}, path)
        if sparse is not None:
            found.check_sparse(sparse, path, msr is not None)
        return found.order, found.level() if msr is None else msr
    score_LK = _scores(path, layers, kv_heads)
    below = float((score_LK < 0.5).float().mean())
    return score_LK.flatten().argsort(stable=True).tolist(), below if msr is None else msr


def _scores(path: Path, layers: int, kv_heads: int) -> Tensor:
    """The numbers of a pattern file, [L, K]."""
    try:
        lines = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8").splitlines()]
        values = [[float(cell) for cell in line] for line in lines if line]
    except ValueError as error:
        raise ValueError(f"pattern {path} is not a table of numbers ({error}); expected a line per layer") from error
    found = sorted({len(line) for line in values})
    if len(values) != layers or found != [kv_heads]:
        raise ValueError(
            f"pattern {path} has {len(values)} lines of {found} numbers; this backbone needs {layers} lines "
            f"(layers) of {kv_heads} (KV heads)"
        )
    return torch.tensor(values)
