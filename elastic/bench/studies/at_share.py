"""What the operating points of a method come to where they still keep a share of the dense model's score: MSR, density,
and the time of a prompt of a large shape.

From records of `elastic.bench.studies.pareto`, their means over the lengths of a set. As in
`elastic.bench.studies.equal_quality` quality falls along the points, which isotonic regression sees to, and lies on a
straight line between two of them; nothing is assumed beyond the first and the last.
"""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from elastic.bench.records import Measurement
from elastic.bench.studies.equal_quality import crossing, falling, interpolated
from elastic.bench.studies.pareto_tables import KEPT
from elastic.routing.methods import family_of, parse_method

AT_SHARE = "MSR where a share is kept"
AT_LEAST, NOT_REACHED = "at least", "not reached"
_MEANS = ("value", "msr", "density", "seconds", "dense_seconds")


def at_share(found: Sequence[Measurement], share: float) -> list[Measurement]:
    """A record for every set and every method of more than one operating point.

    Args:
        found: records of one or several sets, all methods at the same lengths.
        share: of the dense model's score.

    Raises:
        ValueError: a share that is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} is not between 0 and 1; 0.97 is usual")
    points: dict[tuple[str, str, int, str], dict[str, list[Measurement]]] = {}
    for r in found:
        if r["metric"] == KEPT and (method := parse_method(r["who"])).kind != "dense":
            # Times of several lengths are of no one prompt, and have no mean.
            key = (r["set"], r["shape"], r["timed_length"], family_of(method))
            points.setdefault(key, {}).setdefault(r["who"], []).append(r)
    return [_record(*key, list(of.values()), share) for key, of in points.items() if len(of) > 1]


def _record(
    name: str, shape: str, length: int, family: str, points: list[list[Measurement]], share: float
) -> Measurement:
    means = {key: [[fmean(r[key] for r in point) for point in points]] for key in _MEANS}
    of = {key: torch.tensor(values, dtype=torch.float64) for key, values in means.items()}
    order = of["msr"].argsort(dim=1, stable=True)
    of = {key: values.gather(1, order) for key, values in of.items()}
    slack = falling(of["value"]) - share
    bound = NOT_REACHED if slack[0, 0] < 0 else AT_LEAST if slack[0, -1] >= 0 else ""
    at = slack.new_zeros(1) if bound == NOT_REACHED else crossing(slack)
    msr, density, seconds, dense = (_at(of[key], at) for key in ("msr", "density", "seconds", "dense_seconds"))
    return {
        "case": f"{name}@{share:g}", "who": family, "metric": AT_SHARE, "value": msr, "unit": "share", "set": name,
        "share": share, "bound": bound, "kept": _at(of["value"], at), "density": density, "seconds": seconds,
        "dense_seconds": dense, "shape": shape, "timed_length": length, "n": sum(r["n"] for r in points[0]),
        "points": len(points),
    }  # fmt: skip


def _at(values_1L: Tensor, at_1: Tensor) -> float:
    return float(interpolated(values_1L, at_1)[0])


def cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line for every set and method, by falling MSR; of one that keeps less than the share at every
    point, its point of the fewest sparse heads.
    """
    mine = [r for r in found if r["metric"] == AT_SHARE]
    header = ["set", "of dense", "method", "n", "MSR", "density", "ESR", "prefill s", "x dense", "timed"]
    rows = []
    for r in sorted(mine, key=lambda r: (r["set"], r["bound"] == NOT_REACHED, -r["value"])):
        before = {"": "", AT_LEAST: ">= ", NOT_REACHED: f"not reached; {r['kept']:.3f} at "}[r["bound"]]
        rows.append(
            [r["set"], f"{r['share']:g}", r["who"], str(r["n"]), f"{before}{r['value']:.3f}",
             f"{r['density']:.3f}", f"{1 - r['density']:.3f}", f"{r['seconds']:.3f}",
             f"{r['dense_seconds'] / r['seconds']:.2f}", f"{r['shape']} at {r['timed_length']}"]
        )  # fmt: skip
    return header, rows
