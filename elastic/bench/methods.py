"""Ways to run attention beside each other on held-out data, as records and tables: scores and ESR by source, and what
XAttention heads visit by layer. `tests/bench/methods.py` measures them.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from elastic.bench.records import Record

SCORES = {"exact": "share", "accuracy": "share", "loss": "nats a token"}
RATIOS = ("msr", "esr_last", "esr_all")
DENSITY = "density by layer"  # the case that is no source
NOTES = """Answers teacher-forced on held-out samples; exact: all answer tokens right. ± half a 95 % interval over
samples, then ESR over all layers. Every method runs the same backbone: dense, streaming and xattention:<threshold> with
all heads in that mode, elastic:<configuration> with the decisions of one checkpoint's routers between the modes of that
configuration; they were trained for full against streaming attention (fa-ssa) only."""


def records(results: dict[str, Any]) -> list[Record]:
    """Records of what `elastic test` measured.

    Args:
        results: as in `results_test.json`.
    """
    found: list[Record] = []
    for source, row in results["sources"].items():
        for method in results["methods"]:
            ratios = {name: _ratio(row, method, name) for name in RATIOS}
            for metric, unit in SCORES.items():
                value, half = row[f"{method}_{metric}"], row[f"{method}_{metric}_95"]
                record = {"case": source, "who": method, "metric": metric, "value": value, "unit": unit, "half": half}
                found.append({**record, "n": row["n"], **ratios})
    for method, layers in results["xattention_density_by_layer"].items():
        known = [share for share in layers if share is not None]
        record = {"case": DENSITY, "who": method, "metric": "pairs visited", "value": fmean(known), "unit": "share"}
        found.append({**record, "by_layer": layers})
    return found


def score_cells(found: Sequence[Record], metric: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of one score: a line per source, a column per method, `score ± half (ESR)`."""
    shown = [record for record in found if record["metric"] == metric]
    value = {(record["case"], record["who"]): record for record in shown}
    methods = list(dict.fromkeys(record["who"] for record in shown))
    rows = [
        [source, str(value[source, methods[0]]["n"]), *(_cell(value[source, method]) for method in methods)]
        for source in dict.fromkeys(record["case"] for record in shown)
    ]
    return [metric, "n", *methods], rows


def density_cells(found: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per method with XAttention heads; mean over layers, then every layer."""
    shown = [record for record in found if record["case"] == DENSITY]
    layers = len(shown[0]["by_layer"]) if shown else 0
    rows = [
        [record["who"], f"{record['value']:.2f}", *("" if x is None else f"{x:.2f}" for x in record["by_layer"])]
        for record in shown
    ]
    return ["pairs visited", "mean", *map(str, range(layers))], rows


def _ratio(row: dict[str, float], method: str, name: str) -> float:
    """MSR or ESR of a method in a row of results; dense has none."""
    return 0.0 if method == "dense" else row[name if method == "elastic" else f"{method}_{name}"]


def _cell(record: Record) -> str:
    return f"{record['value']:.3f} ± {record['half']:.3f} ({record['esr_all']:.2f})"
