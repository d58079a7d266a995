"""Ways to run attention beside each other on held-out data, as records and tables: scores and ESR by source, and what
XAttention heads visit by layer. `tests/bench/methods.py` measures them.
"""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from elastic.bench.records import Measurement
from elastic.bench.studies.runs import RETRIEVAL, score_of
from elastic.data.source_names import generator_of
from elastic.routing.methods import RATIOS, ratio_columns, renamed

SCORES = {"exact": "share", "accuracy": "share", "loss": "nats a token"}
DENSITY = "density by layer"  # the case that is not a source
NOTES = """Answers teacher-forced on held-out samples, n of each source; exact: all answer tokens right. ± half a 95 %
interval over samples, then ESR over all layers; means are over sources. Every method runs the same backbone: dense,
streaming and xattention:<threshold> with all heads in that mode, elastic with the decisions of routers trained for full
against streaming attention (fa-ssa), elastic/<modes> with the same decisions between those modes. Routers trained
for other modes have a name of their own (fa-xa, xa-ssa)."""


def records(results: dict[str, Any]) -> list[Measurement]:
    """Records of what `elastic test` measured.

    Args:
        results: as in `results_test.json`.
    """
    found: list[Measurement] = []
    for source, row in results["sources"].items():
        for method in results["methods"]:
            ratios = {**dict.fromkeys(RATIOS, 0.0), **{r: row[column] for r, column in ratio_columns(method).items()}}
            for metric, unit in SCORES.items():
                value, half = row[f"{method}_{metric}"], row[f"{method}_{metric}_95"]
                record = {"case": source, "who": method, "metric": metric, "value": value, "unit": unit, "half": half}
                found.append({**record, "n": row["n"], **ratios})
    for method, layers in results["xattention_density_by_layer"].items():
        known = [share for share in layers if share is not None]
        record = {"case": DENSITY, "who": method, "metric": "pairs visited", "value": fmean(known), "unit": "share"}
        found.append({**record, "by_layer": layers})
    return found


def score_cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per source with the score that counts there, after the means over the retrieval sources
    and over the text sources; a column per method, `score ± half (ESR)`.
    """
    shown = [record for record in found if record["case"] != DENSITY and record["metric"] == score_of(record["case"])]
    methods = list(dict.fromkeys(record["who"] for record in shown))
    cells: dict[str, dict[str, Measurement]] = {}
    for record in shown:
        cells.setdefault(record["case"], {})[record["who"]] = record
    rows = []
    for title, sources in (
        ("mean of retrieval", [source for source in cells if generator_of(source) in RETRIEVAL]),
        ("mean of text", [source for source in cells if score_of(source) == "loss"]),
    ):
        if sources:
            of_method = [[cells[source].get(method) for source in sources] for method in methods]
            count = sum(next(iter(cells[source].values()))["n"] for source in sources)
            rows.append([title, "", str(count), *map(_mean_cell, of_method)])
    for source, of_source in cells.items():
        first = next(iter(of_source.values()))
        rows.append([source, first["metric"], str(first["n"]), *(_cell(of_source.get(method)) for method in methods)])
    return ["source", "score", "n", *map(renamed, methods)], rows


def density_cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per method with XAttention heads; mean over layers, then every layer."""
    shown = [record for record in found if record["case"] == DENSITY]
    layers = len(shown[0]["by_layer"]) if shown else 0
    rows = [
        [renamed(r["who"]), f"{r['value']:.2f}", *("" if x is None else f"{x:.2f}" for x in r["by_layer"])]
        for r in shown
    ]
    return ["pairs visited", "mean", *map(str, range(layers))], rows


def _mean_cell(same: Sequence[Measurement | None]) -> str:
    """Empty where some source is missing: another mean would not be comparable."""
    there = [record for record in same if record is not None]
    if len(there) < len(same):
        return ""
    value, esr = (fmean(record[name] for record in there) for name in ("value", "esr_all"))
    return f"{value:.3f} ({esr:.2f})"


def _cell(record: Measurement | None) -> str:
    return "" if record is None else f"{record['value']:.3f} ± {record['half']:.3f} ({record['esr_all']:.2f})"
