"""Calibration files: what each KV head of a backbone is needed for, an order of the heads by it, and what following the
order costs. `elastic calibrate` writes them; `static:<file>@<msr>` runs them. No torch import at the top.

Legend: L layers, K KV heads. A head is named by one number, layer * K + KV head.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.config import ElasticConfig, SparseConfig
from elastic.files import member, read_json, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
BUDGET = 0.02  # nats per answer token: what `static:<file>` without an MSR may cost, as `objective.budget`
LEVELS = (0.0, 0.25, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
VOCABULARY = "vocab_size"  # which a backbone may extend without becoming another one
_WAY_OUT = "measure it again with `elastic calibrate`"


@dataclass(frozen=True)
class Curve:
    """What following an order costs, on rows that did not make it.

    Attributes:
        msr: levels that were measured, ascending.
        kl: KL(dense || that level) in nats per answer token at each of them, the mean over sources.
        sources: the same of every source.
    """

    msr: tuple[float, ...]
    kl: tuple[float, ...]
    sources: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Calibration:
    """What `elastic calibrate` found for a backbone.

    Attributes:
        need: [L][K], nats per answer token: what it costs to let the head run sparse.
        order: all heads, the least needed first. Rounds of ablation measure each head beside those that are sparse
            already, so `need` alone does not give it.
        curve: what the order costs.
        provenance: backbone, architecture, sparse settings, data, seed, versions and how it was measured.
    """

    need: tuple[tuple[float, ...], ...]
    order: tuple[int, ...]
    curve: Curve
    provenance: Mapping[str, Any]

    @property
    def backbone(self) -> str:
        """Name to load the backbone by."""
        return str(self.provenance["backbone"])

    @property
    def sparse(self) -> SparseConfig:
        """Modes and sizes that the heads were measured with."""
        return SparseConfig(**self.provenance["sparse"])

    @property
    def floor(self) -> float:
        """Mean KL that no level avoids: of all heads on route 0, where that is not full attention; else 0."""
        return 0.0 if self.sparse.route0 == "full" else self.curve.kl[0]

    def level(self, budget: float = BUDGET) -> float:
        """The highest measured MSR up to which every level's mean KL is within the budget beyond `floor`, in nats per
        answer token; 0 where none is.
        """
        found = 0.0
        for msr, kl in zip(self.curve.msr, self.curve.kl, strict=True):
            if kl - self.floor > budget:
                break
            found = msr
        return found

    def routes(self, msr: float | None = None) -> "Tensor":
        """Routes [L, K] in {0, 1}: the first heads of the order, a share `msr` of all, on route 1; None: `level()`."""
        return first_heads(self.order, self.level() if msr is None else msr, len(self.need), len(self.need[0]))

    def check_backbone(self, architecture: Mapping[str, Any], path: str | Path) -> None:
        """Refuse another backbone than the one that was measured; only the vocabulary may differ.

        Args:
            architecture: of the backbone here (`elastic.model.loading.architecture`), or the part of it that is known.
            path: the file, for the message.

        Raises:
            ValueError: naming both.
        """
        theirs = self.provenance["architecture"]
        differing = [key for key, value in architecture.items() if key != VOCABULARY and theirs.get(key) != value]
        if differing:
            there, here = (", ".join(f"{key}={of.get(key)}" for key in differing) for of in (theirs, architecture))
            raise ValueError(
                f"calibration {path} is of {self.backbone!r} with {there}, but this backbone has {here}; calibrate "
                "this backbone, or use the one that was measured"
            )

    def check_sparse(self, sparse: SparseConfig, path: str | Path, level_named: bool) -> None:
        """Refuse heads that choose between other modes than the measured ones and, where the level is the file's, whose
        sizes are others: what the order costs would be another thing.

        Args:
            sparse: what heads choose between here.
            path: the file, for the message.
            level_named: the MSR does not come from the file.

        Raises:
            ValueError: naming both.
        """
        mine = self.sparse
        if (mine.route0, mine.route1) != (sparse.route0, sparse.route1):
            raise ValueError(
                f"calibration {path} is of heads that choose between {mine.route0} and {mine.route1}, but here they "
                f"choose between {sparse.route0} and {sparse.route1}; calibrate these modes (elastic calibrate "
                "--modes), or run the file by elastic.load, elastic generate or serve, which take its own"
            )
        differing = [name for name in mine.sizes if getattr(mine, name) != getattr(sparse, name)]
        if differing and not level_named:
            there, here = (", ".join(f"{name} {getattr(of, name)}" for name in differing) for of in (mine, sparse))
            raise ValueError(
                f"calibration {path} was measured with {there}, but heads have {here} here, with which the level that "
                "it would choose costs something else; name a level, as in @0.5, or use the same sizes"
            )

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all; the same calibration gives the same bytes."""
        curve = {"msr": self.curve.msr, "kl": self.curve.kl, "sources": dict(self.curve.sources)}
        values = {"format": FORMAT, **self.provenance, "need": self.need, "order": self.order, "curve": curve}
        write_atomic(path, _compact(json.dumps(values, indent=1, ensure_ascii=False)) + "\n")


def first_heads(order: Sequence[int], msr: float, layers: int, kv_heads: int) -> "Tensor":
    """The first heads of an order, a share `msr` of all, on route 1, [L, K]."""
    import torch

    route = torch.zeros(layers * kv_heads)
    route[list(order[: round(msr * layers * kv_heads)])] = 1.0
    return route.view(layers, kv_heads)


def _compact(text: str) -> str:
    """Indented JSON with its innermost lists on one line each; no line break is inside a string."""

    def joined(found: re.Match[str]) -> str:
        return f"[{', '.join(line.strip().removesuffix(',') for line in found[1].splitlines())}]"

    return re.sub(r"\[\n([^\[\]{}]*?)\n\s*\]", joined, text)


def is_calibration(path: Path) -> bool:
    """Whether a file is a calibration, or meant to be one, not a table of numbers.

    Raises:
        OSError: a file that cannot be read.
    """
    with open(path, "rb") as stream:
        return stream.read(64).lstrip().startswith(b"{")


def read_calibration(path: str | Path) -> Calibration:
    """The calibration in a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, of another kind, or of a newer format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no calibration file at {path}; `elastic calibrate --out {path}` writes one")
    try:
        values = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a calibration file ({error}); {_WAY_OUT}") from error
    if not isinstance(values, dict) or "need" not in values:
        raise ValueError(f"{path} holds JSON, but not a calibration (`need` is missing); {_WAY_OUT}")
    if values.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {values.get('format')!r}, this version reads format {FORMAT}; update elastic-attention"
        )
    try:
        return _checked(values)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {_WAY_OUT}") from error


def _checked(values: dict[str, Any]) -> Calibration:
    """Raises ValueError where a field is missing or does not fit the others."""
    need = tuple(_numbers(row, "need") for row in member(values, "need", list))
    shape = member(values, "architecture", dict)
    layers, kv_heads = (member(shape, key, int) for key in ("num_layers", "num_kv_heads"))
    if not need or {len(row) for row in need} != {kv_heads} or len(need) != layers:
        raise ValueError(f"need is not a table of {layers} layers and {kv_heads} KV heads")
    order = tuple(member(values, "order", list))
    if any(type(head) is not int for head in order) or sorted(order) != list(range(layers * kv_heads)):
        raise ValueError("order does not name every head once")
    given = member(values, "curve", dict)
    sources = {name: _numbers(kl, f"curve of {name!r:.40}") for name, kl in member(given, "sources", dict).items()}
    curve = Curve(_numbers(given.get("msr"), "curve"), _numbers(given.get("kl"), "curve"), sources)
    if {len(curve.msr)} != {len(curve.kl), *map(len, sources.values())} or list(curve.msr) != sorted(set(curve.msr)):
        raise ValueError("the curve's levels are not ascending, or not as many as its values")
    if not all(0 <= msr <= 1 for msr in curve.msr):
        raise ValueError("a level of the curve is outside [0, 1]")
    for name in ("backbone", "by"):
        member(values, name, str)
    ElasticConfig.from_dict({"sparse": member(values, "sparse", dict)})
    provenance = {key: value for key, value in values.items() if key not in ("format", "need", "order", "curve")}
    return Calibration(need, order, curve, provenance)


def _numbers(values: Any, what: str) -> tuple[float, ...]:
    if not isinstance(values, list) or any(type(value) not in (int, float) for value in values):
        raise ValueError(f"{what} is not a list of numbers")
    if not all(abs(value) <= sys.float_info.max for value in values):
        raise ValueError(f"{what} holds NaN or infinity")
    return tuple(map(float, values))


@dataclass(frozen=True)
class Agreement:
    """How well one order finds the heads that another one needs most.

    Attributes:
        heads: size of the two sets that are compared.
        shared: share of the heads that are in both.
        covered: need, by the reference, of the heads that the order would keep full, relative to that of the heads
            that the reference itself keeps; 1 is as good as the reference. Heads that do no harm count as 0.
    """

    heads: int
    shared: float
    covered: float


def agreement(mine: Calibration, reference: Calibration, share: float = 0.2) -> Agreement:
    """Compare the most needed heads, a share of all, of two calibrations of one backbone.

    Raises:
        ValueError: calibrations of another number of layers or KV heads, or a share without a head.
    """
    sizes = [(len(found.need), len(found.need[0])) for found in (mine, reference)]
    if sizes[0] != sizes[1]:
        there, here = (f"{layers} layers of {kv_heads} KV heads" for layers, kv_heads in sizes)
        raise ValueError(f"calibrations of {there} and of {here} cannot be compared; they must be of one backbone")
    count = round(share * len(mine.order))
    if not 0 < count <= len(mine.order):
        raise ValueError(f"share={share} of {len(mine.order)} heads is {count} heads; expected at least one")
    need = [max(0.0, value) for row in reference.need for value in row]
    own, best = (set(found.order[-count:]) for found in (mine, reference))
    total = sum(need[head] for head in best)
    covered = sum(need[head] for head in own) / total if total else 1.0
    return Agreement(count, len(own & best) / count, covered)
