"""Time and quality: what a method keeps of the dense model's score on real rows, beside the time that a prompt of a
large shape would take at the density that the method has on these rows. `tests/bench/pareto.py` joins the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.bench.records import Measurement
from elastic.bench.studies.pareto_tables import KEPT, UNTIMED
from elastic.bench.studies.prefill import Prefill
from elastic.config import SparseConfig
from elastic.routing.methods import parse_method


@dataclass(frozen=True)
class Judged:
    """What a method came to on the rows of a set at one length.

    Attributes:
        set, length: of an evaluation; tokens.
        method: its name.
        n: samples.
        kept, low, high: score as a share of the dense model's, and the bounds of its 95 % interval.
        msr: share of heads on route 1.
        density: share of the causal pairs that attention computed, the mean over heads.
        sparse: modes and sizes that ran.
    """

    set: str
    length: int
    method: str
    n: int
    kept: float
    low: float
    high: float
    msr: float
    density: float
    sparse: SparseConfig


def records(judged: Sequence[Judged], times: Sequence[Measurement], shape: str, at: int | None) -> list[Measurement]:
    """A record for every method, set and length; of one whose choice of blocks no record has timed, the reason.

    Args:
        times: records of `elastic bench e2e` and `elastic bench selection`.
        shape: whose prefill is meant, as e2e calls it.
        at: tokens of the timed prompts; None: as many as the rows have.

    Raises:
        ValueError: lengths at which e2e has not timed the shape.
    """
    prefills = {length: Prefill(shape, length, times) for length in {at or one.length for one in judged}}
    found = []
    for one in judged:
        prefill = prefills[at or one.length]
        about = {
            "case": f"{one.set}@{one.length}", "who": one.method, "set": one.set, "length": one.length, "n": one.n,
            "msr": one.msr, "density": one.density, "shape": shape, "timed_length": prefill.length,
        }  # fmt: skip
        try:
            timed = prefill.milliseconds(parse_method(one.method), one.sparse, one.length, one.msr, one.density)
        except ValueError as error:
            found.append({**about, "metric": UNTIMED, "value": None, "unit": "", "why": str(error)})
            continue
        seconds, dense = timed[0] / 1e3, min(prefill.of_stock) / 1e3
        found.append(
            {**about, "metric": KEPT, "value": one.kept, "unit": "of dense", "low": one.low, "high": one.high,
             "seconds": seconds, "dense_seconds": dense, "timed_as": timed[1]}
        )  # fmt: skip
    return found
