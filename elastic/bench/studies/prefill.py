"""What a prompt of a large shape would take at a method's density, put together from records of `elastic bench e2e` and
`elastic bench selection` at one length:

    prefill = rest + router + attention(density) + choice.

Rest, router and attention are those of the whole model by e2e, whose routed cases are timed at several MSR; each is a
density, and in between attention is read off a straight line. Heads that choose key blocks take their share of the
choice and of the attention that `selection` timed in a layer, the attention in proportion to their density. The
router's time is that of routers that decide from keys. The dense model is the stock one, by its fastest backend.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median

from elastic.bench import e2e, selection
from elastic.bench.e2e_models import attention_shape
from elastic.bench.e2e_runs import STOCK as STOCK_BACKENDS
from elastic.bench.e2e_tables import FIRST_TOKEN
from elastic.bench.records import Measurement
from elastic.config import Mode, SparseConfig
from elastic.routing.methods import Method, parse_method
from elastic.routing.sparsity import causal_pairs, visited_pairs

STOCK, ROUTED = "stock model", "e2e"  # as what a method without a choice of blocks was timed
COST = {"xattention": ("stride",), "moba": ("chunk",)}  # settings that the time of a choice depends on


@dataclass(frozen=True)
class Prefill:
    """Times of a shape at one length, in milliseconds.

    Args:
        shape: as the records of e2e call it.
        length: tokens.
        found: records of `elastic bench e2e` and `elastic bench selection`, of any shapes and lengths.

    Raises:
        ValueError: no dense time, or fewer than two MSR at this length.
    """

    shape: str
    length: int
    found: Sequence[Measurement]

    def __post_init__(self) -> None:
        if not self.of_stock or len(self.points) < 2:
            at = sorted({r["length"] for r in self.found if r.get("shape") == self.shape})
            raise ValueError(
                f"the records have no dense time, or not two MSR, of {self.shape} at {self.length} tokens (they have "
                f"{', '.join(map(str, at)) or 'nothing of that shape'}); run `elastic bench e2e --shapes {self.shape} "
                f"--lengths {self.length} --msr 0 0.5 0.9`"
            )

    @cached_property
    def of_stock(self) -> list[float]:
        """First tokens of the stock model."""
        return [r["value"] for r in self._e2e(FIRST_TOKEN) if r["who"] in STOCK_BACKENDS]

    @cached_property
    def points(self) -> list[tuple[float, float]]:
        """Density and time of attention of the routed cases, by rising density."""
        streams = {
            r["msr"]: density_of("streaming", self.length, e2e.sizes_of(r)) for r in self._e2e("attention", True)
        }
        times = {r["msr"]: r["value"] for r in self._e2e("attention", True)}
        return sorted((1 - msr + msr * streams[msr], time) for msr, time in times.items())

    def milliseconds(
        self, method: Method, sparse: SparseConfig, rows: int, msr: float, density: float
    ) -> tuple[float, str]:
        """A prompt's prefill, and as what it was timed.

        Args:
            method: its kind says whether routers decide.
            sparse: modes and sizes that ran.
            rows: tokens of the rows that `density` is of.
            msr: share of heads on route 1.
            density: share of the causal pairs that attention computed, the mean over heads.

        Raises:
            ValueError: blocks are chosen in a way that no record has timed at this length.
        """
        if method.kind == "dense":
            return min(self.of_stock), STOCK
        beside, router = self._beside_attention, self._median("router") if method.kind == "elastic" else 0.0
        share = 0.0 if sparse.chooser is None else msr if sparse.route1 == sparse.chooser else 1 - msr
        if not share:
            return beside + router + self.attention(density), ROUTED
        other = sparse.route0 if sparse.route1 == sparse.chooser else sparse.route1
        of_other = density_of(other, rows, sparse)
        blocks, timed_as = self._blocks(method, sparse, max(0.0, (density - (1 - share) * of_other) / share))
        return beside + router + (1 - share) * self.attention(of_other) + share * blocks, timed_as

    def attention(self, density: float) -> float:
        """Of the whole model, its heads full or streaming: straight between the measured densities, and beyond them."""
        spans = list(pairwise(self.points))
        (x0, y0), (x1, y1) = next((span for span in spans if density <= span[1][0]), spans[-1])
        return max(0.0, y0 + (y1 - y0) * (density - x0) / (x1 - x0))

    @property
    def _beside_attention(self) -> float:
        """What is neither attention nor router, as the user waits for it."""
        return self._median(FIRST_TOKEN) - self._median("attention") - self._median("router")

    def _median(self, metric: str) -> float:
        return float(median(r["value"] for r in self._e2e(metric, routed=True)))

    def _e2e(self, metric: str, routed: bool = False) -> list[Measurement]:
        """Records of the shape at this length, of the stock model or of the routed one in a single pass."""
        of = [
            r for r in self.found if (r.get("shape"), r.get("length"), r["metric"]) == (self.shape, self.length, metric)
        ]
        return [r for r in of if r["value"] is not None and (r["who"] == "elastic") == routed]

    def _blocks(self, method: Method, sparse: SparseConfig, density: float) -> tuple[float, str]:
        """Choice and attention of all layers if all heads choose their blocks, and as what they were timed: the method
        itself, or another one whose choice costs the same.
        """
        wanted, layers = cost(sparse), self._layers()
        found: dict[str, dict[str, float]] = {}
        for r in self.found:
            part = r["case"].partition("-")[0] if r["metric"] == "time" else r["metric"]
            if r.get("length") == self.length and "shape" not in r and part in ("choice", "attention", "density"):
                found.setdefault(r["who"], {})[part] = r["value"]
        whole = [
            who for who, of in found.items() if len(of) == 3 and cost(selection.sizes_of(parse_method(who))) == wanted
        ]
        if not whole:
            raise ValueError(
                f"no record has timed how {method.name} chooses blocks at {self.length} tokens "
                f"({', '.join(map(str, wanted))}); run `elastic bench selection --lengths {self.length} --methods ...`"
            )
        who = method.name if method.name in whole else whole[0]
        of = found[who]
        return layers * (of["choice"] + of["attention"] * density / of["density"]), who

    def _layers(self) -> int:
        """Of the shape, whose heads must be those of the layer that `selection` timed."""
        base, cut = re.fullmatch(r"(.*?)(?:-(\d+)layers)?", self.shape).groups()  # type: ignore[union-attr]
        layers, *heads = attention_shape(base)
        timed = {(r["heads"], r["kv_heads"], r["head_dim"]) for r in self.found if r["case"].startswith("choice-")}
        if other := timed - {tuple(heads)}:
            raise ValueError(
                f"{self.shape} has heads, KV heads and head dim {tuple(heads)}, but the choice of blocks was timed for "
                f"{other.pop()}; name a shape of these heads"
            )
        return int(cut or layers)


def density_of(mode: Mode, length: int, sparse: SparseConfig) -> float:
    """Share of the causal pairs that a full or a streaming head computes."""
    return visited_pairs(length, mode, sparse) / causal_pairs(length)


def cost(sparse: SparseConfig) -> tuple[object, ...]:
    """What the time of a choice depends on: the mode, and settings with their names."""
    chooser = sparse.chooser or ""
    return (chooser, *(f"{name} {getattr(sparse, name)}" for name in COST.get(chooser, ())))
