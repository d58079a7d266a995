"""Settings tried before the routing study, as records and a table. `tests/bench/ablation.py` trains and judges them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from elastic.bench.records import Measurement
from elastic.bench.studies.routing import headlines
from elastic.bench.studies.runs import Point, by_bias, points_of

FLAGS = "flags"  # what sets a variant apart, in every record
SHOWN = ("retrieval of dense", "text loss of dense", "mean MSR", "MSR robust - sensitive")
NOTES = """Settings of routers for SmolLM2-135M, each trained once (seed 0 unless its flags name another) and judged on
the validation rows of configs/mixture/heldout.yaml; flags over configs/train.yaml and configs/smollm2-gpu.yaml as they
stood at the commit. Per `sparsity_bias`: retrieval and loss on text as shares of the dense model's, ± half a 95 %
interval over samples, @ mean MSR (MSR on robust minus on sensitive tasks). One run each: differences under 0.03 say
nothing."""


def records(
    results: Mapping[str, dict[str, Any]], flags: Mapping[str, str], stamps: Mapping[str, Measurement]
) -> list[Measurement]:
    """Records of every variant and operating point.

    Args:
        results: `results_validation.json` by variant, dense among its methods.
        flags, stamps: what sets each variant apart, and how it was run.
    """
    return [record for name, found in results.items() for record in _of(name, found, flags[name], stamps[name])]


def _of(name: str, results: dict[str, Any], flags: str, stamp: Measurement) -> Iterator[Measurement]:
    dense = next(point for point in points_of(results) if point.method == "dense")
    for point in by_bias(results):
        found, half = headlines(point, dense), _halves(point, dense)
        shared = {"who": f"bias {point.bias:g}", "unit": "share", FLAGS: flags, "n": _samples(point)}
        for metric in SHOWN:
            yield {"case": name, "metric": metric, "value": found[metric], "half": half.get(metric), **shared, **stamp}


def _halves(point: Point, dense: Point) -> dict[str, float]:
    return {
        "retrieval of dense": point.retrieval()[1] / dense.retrieval()[0],
        "text loss of dense": point.loss()[1] / dense.loss()[0],
    }


def _samples(point: Point) -> int:
    return sum(int(row["n"]) for row in point.sources.values())


def cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per variant, a column per operating point."""
    of = {(r["case"], r["who"], r["metric"]): r for r in found}
    biases = sorted({r["who"] for r in found}, key=lambda who: float(who.removeprefix("bias ")))
    variants = {r["case"]: r for r in found}

    def cell(case: str, who: str) -> str:
        if (case, who, SHOWN[0]) not in of:
            return ""
        kept, loss, msr, gap = (of[case, who, metric] for metric in SHOWN)
        scores = " / ".join(f"{record['value']:.3f} ± {record['half']:.3f}" for record in (kept, loss))
        return f"{scores} @ {msr['value']:.2f} ({gap['value']:.2f})"

    rows = [
        [case, f"`{one[FLAGS]}`", one["commit"], *(cell(case, who) for who in biases)] for case, one in variants.items()
    ]
    return ["variant", "flags", "commit", *biases], rows
