"""Routes that do not depend on the input: all heads alike, heads drawn at random, heads of a pattern file.

Legend: L layers, K KV heads.
"""

from pathlib import Path

import torch
from torch import Tensor


def uniform(layers: int, kv_heads: int, route: int) -> Tensor:
    """Every head on the same route, [L, K]."""
    return torch.full((layers, kv_heads), float(route))


def drawn(layers: int, kv_heads: int, msr: float, seed: int) -> Tensor:
    """A share `msr` of all heads, drawn by `seed`, on route 1, [L, K]."""
    order = torch.randperm(layers * kv_heads, generator=torch.Generator().manual_seed(seed))
    return _first(order, msr, layers, kv_heads)


def of_pattern(path: Path, layers: int, kv_heads: int, msr: float | None = None) -> Tensor:
    """Routes [L, K] of a pattern file: one line per layer, one number per KV head, divided by tabs, spaces or commas. A
    number is how much the head needs full attention (DuoAttention's scores, PruLong's masks): from 0.5 on it is full.

    Args:
        msr: run this share of the heads on route 1 instead, those with the lowest numbers.

    Raises:
        OSError: a file that cannot be read.
        ValueError: not numbers, or not as many as the backbone has layers and KV heads.
    """
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
    score_LK = torch.tensor(values)
    if msr is None:
        return (score_LK < 0.5).float()
    return _first(score_LK.flatten().argsort(stable=True), msr, layers, kv_heads)


def _first(order: Tensor, msr: float, layers: int, kv_heads: int) -> Tensor:
    """The first heads of an order, a share `msr` of all, on route 1."""
    route = torch.zeros(layers * kv_heads)
    route[order[: round(msr * layers * kv_heads)]] = 1.0
    return route.view(layers, kv_heads)
