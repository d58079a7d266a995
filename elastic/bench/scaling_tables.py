"""Table and picture of `elastic bench training --devices N`."""

from collections.abc import Sequence
from typing import Any

from elastic.bench.records import Measurement
from elastic.console import table
from elastic.plots import Panel, in_rows, panels_figure

STRATEGIES = ("ddp", "fsdp", "context")
EFFICIENCY = "scaling efficiency"
HEADER = [
    "case",
    "GPUs",
    "strategy",
    "step s",
    "tokens/s",
    "efficiency",
    "communication",
    "not hidden",
    "peak GB",
    "MSR",
]


def of_scaling(found: Sequence[Measurement]) -> bool:
    """Whether records are of this benchmark."""
    return any("strategy" in record and "devices" in record for record in found)


def scaling_cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per case and strategy. Communication is the share of a step in which NCCL's kernels run,
    waiting for the slowest GPU included, and the part of it with nothing else beside them.
    """
    value = {(r["case"], r["who"], r["metric"]): r["value"] for r in found}
    about = {(r["case"], r["who"]): r for r in found}
    rows = []
    for (case, who), record in about.items():

        def cell(metric: str, form: str, factor: float = 1.0, key: tuple[str, str] = (case, who)) -> str:
            known = value.get((*key, metric))
            return "" if known is None else format(known * factor, form)

        sliced = f", {record['sliced']} share a row" if record["sliced"] > 1 else ""
        name = "" if record["strategy"] == "one" else f"{record['strategy']}{sliced}"
        cells = [cell("step time", ".2f", 1e-3), cell("speed", ".0f"), cell(EFFICIENCY, ".3f")]
        cells += [cell(metric, ".1%") for metric in ("communication", "exposed communication")]
        rows.append([case, str(record["devices"]), name, *cells, cell("peak allocated", ".1f"), cell("MSR", ".3f")])
    return HEADER, rows


def scaling_table(found: Sequence[Measurement]) -> str:
    """Table for the terminal."""
    return table(*scaling_cells(found))


def scaling_figure(found: Sequence[Measurement]) -> Any:
    """For each case tokens a second and peak memory against GPUs, a line per strategy; a matplotlib `Figure`."""
    panels = []
    for case in dict.fromkeys(r["case"] for r in found):
        of_case = [r for r in found if r["case"] == case]
        ticks = {float(n): str(n) for n in sorted({r["devices"] for r in of_case})}
        for metric, unit in (("speed", "tokens/s"), ("peak allocated", "GB of each GPU")):
            lines = _lines(of_case, metric)
            if lines:
                panels.append(Panel(f"{case}: {metric}", lines, "GPUs", unit, xticks=ticks, marker="o"))
    return panels_figure(in_rows(panels, 2))


def _lines(found: Sequence[Measurement], metric: str) -> dict[str, list[tuple[float, float]]]:
    """{strategy: [(GPUs, value), ...]}, each from the one GPU on."""
    shown = [r for r in found if r["metric"] == metric]
    one = [(1.0, r["value"]) for r in shown if r["strategy"] == "one"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in shown:
        if record["strategy"] != "one":
            lines.setdefault(record["strategy"], list(one)).append((float(record["devices"]), record["value"]))
    return {name: sorted(points) for name, points in lines.items()}
