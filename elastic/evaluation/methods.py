"""Methods that `elastic eval` compares, by name: `dense`, `streaming`, `xattention[:<threshold>]`, `random:<msr>`,
`static:<pattern file>`, `elastic:<checkpoint>`.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from elastic.config import SparseConfig

NAMES = (
    "dense, streaming, xattention[:<threshold>], random:<msr>, static:<pattern file>[@<msr>], "
    "elastic:<checkpoint>[@<bias>]"
)


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as the user wrote it.
        kind: the part before the colon.
        argument: the part behind it; empty for `dense` and `streaming`, possibly for `xattention`.
        knob: the number behind `@`: of `static`, the share of heads on route 1, those with the lowest scores; of
            `elastic`, the sparsity bias.
    """

    name: str
    kind: str
    argument: str
    knob: float | None = None

    @classmethod
    def parse(cls, name: str) -> "Method":
        """Check a name.

        Raises:
            ValueError: an unknown method, or one without what it needs.
            FileNotFoundError: no such checkpoint or pattern file.
        """
        kind, _, argument = name.partition(":")
        if kind not in ("dense", "streaming", "xattention", "random", "static", "elastic"):
            raise ValueError(f"unknown method {name!r}; expected one of {NAMES}")
        if kind != "xattention" and bool(argument) == (kind in ("dense", "streaming")):
            raise ValueError(f"method {name!r} {'takes no' if argument else 'needs an'} argument; expected {NAMES}")
        if kind in ("random", "xattention") and argument:
            what = "an MSR from 0 to 1" if kind == "random" else "a threshold above 0, up to 1"
            try:
                share = float(argument)
            except ValueError as error:
                raise ValueError(f"method {name!r}: {argument!r} is no number; expected {what}") from error
            if not 0 <= share <= 1 or (kind == "xattention" and share == 0):
                raise ValueError(f"method {name!r}: {share} is not {what}")
        knob = None
        if kind in ("static", "elastic"):
            argument, knob = _split_knob(name, kind, argument)
        return cls(name, kind, argument, knob)

    def route(self, layers: int, kv_heads: int, seed: int) -> int | Tensor | None:
        """What `override_routes` takes: 0, 1, a tensor [L, K] in {0, 1}, or None for the routers' own decisions."""
        if self.kind == "random":
            count = round(float(self.argument) * layers * kv_heads)
            order = torch.randperm(layers * kv_heads, generator=torch.Generator().manual_seed(seed))
            route = torch.zeros(layers * kv_heads)
            route[order[:count]] = 1
            return route.view(layers, kv_heads)
        if self.kind == "static":
            return read_pattern(Path(self.argument), layers, kv_heads, self.knob)
        return {"dense": 0, "streaming": 1, "xattention": 1, "elastic": None}[self.kind]

    def sparse(self, own: SparseConfig) -> SparseConfig:
        """Modes and sizes that the method runs where the evaluation's pattern is `own`."""
        if self.kind != "xattention":
            return own
        return replace(own, route1="xattention", threshold=float(self.argument or own.threshold))


def _split_knob(name: str, kind: str, argument: str) -> tuple[str, float | None]:
    """Path and number of `<path>[@<number>]`."""
    path, at, number = argument.rpartition("@")
    if not at or Path(argument).exists():
        path, number = argument, ""
    try:
        knob = float(number) if number else None
    except ValueError as error:
        raise ValueError(f"method {name!r}: {number!r} behind the @ is no number; expected {NAMES}") from error
    if knob is not None and (not math.isfinite(knob) or (kind == "static" and not 0 <= knob <= 1)):
        raise ValueError(f"method {name!r}: {number} is not {'an MSR from 0 to 1' if kind == 'static' else 'finite'}")
    if not Path(path).exists():
        raise FileNotFoundError(f"method {name!r}: {path} does not exist")
    return path, knob


def read_pattern(path: Path, layers: int, kv_heads: int, share: float | None = None) -> Tensor:
    """Route [L, K] of a pattern file: one line per layer, one number per KV head, divided by tabs, spaces or commas. A
    number is how much the head needs full attention (DuoAttention's scores, PruLong's masks): from 0.5 on it is full.

    Args:
        share: run this share of the heads on route 1 instead, those with the lowest numbers.

    Raises:
        ValueError: not numbers, or not as many as the backbone has layers and KV heads.
    """
    try:
        lines = [line.replace(",", " ").split() for line in path.read_text(encoding="utf-8").splitlines()]
        values = [[float(cell) for cell in line] for line in lines if line]
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"pattern {path} is no table of numbers ({error})") from error
    found = sorted({len(line) for line in values})
    if len(values) != layers or found != [kv_heads]:
        raise ValueError(
            f"pattern {path} has {len(values)} lines of {found} numbers; this backbone needs {layers} lines "
            f"(layers) of {kv_heads} (KV heads)"
        )
    score = torch.tensor(values)
    if share is None:
        return (score < 0.5).float()
    route = torch.zeros(layers * kv_heads)
    route[score.flatten().argsort(stable=True)[: round(share * layers * kv_heads)]] = 1
    return route.view(layers, kv_heads)
