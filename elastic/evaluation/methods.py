"""Methods that `elastic eval` compares, by name: `dense`, `streaming`, `xattention[:<threshold>]`, `random:<msr>`,
`static:<pattern file>`, `elastic:<checkpoint>`.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from elastic.config import SparseConfig

NAMES = (
    "dense, streaming, xattention, xattention:<threshold>, random:<msr>, static:<pattern file>, elastic:<checkpoint>"
)


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        name: as the user wrote it.
        kind: the part before the colon.
        argument: the part behind it; empty for `dense` and `streaming`, possibly for `xattention`.
    """

    name: str
    kind: str
    argument: str

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
        if kind in ("static", "elastic") and not Path(argument).exists():
            raise FileNotFoundError(f"method {name!r}: {argument} does not exist")
        return cls(name, kind, argument)

    def route(self, layers: int, kv_heads: int, seed: int) -> int | Tensor | None:
        """What `override_routes` takes: 0, 1, a tensor [L, K] in {0, 1}, or None for the routers' own decisions."""
        if self.kind == "random":
            count = round(float(self.argument) * layers * kv_heads)
            order = torch.randperm(layers * kv_heads, generator=torch.Generator().manual_seed(seed))
            route = torch.zeros(layers * kv_heads)
            route[order[:count]] = 1
            return route.view(layers, kv_heads)
        if self.kind == "static":
            return read_pattern(Path(self.argument), layers, kv_heads)
        return {"dense": 0, "streaming": 1, "xattention": 1, "elastic": None}[self.kind]

    def sparse(self, own: SparseConfig) -> SparseConfig:
        """Modes and sizes that the method runs where the evaluation's pattern is `own`."""
        if self.kind != "xattention":
            return own
        return replace(own, route1="xattention", threshold=float(self.argument or own.threshold))


def read_pattern(path: Path, layers: int, kv_heads: int) -> Tensor:
    """Route [L, K] of a pattern file: one line per layer, one number per KV head, divided by tabs, spaces or commas. A
    number is how much the head needs full attention (DuoAttention's scores, PruLong's masks): from 0.5 on it is full.

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
    return (torch.tensor(values) < 0.5).float()
