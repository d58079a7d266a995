"""Scores that `elastic eval` measured, as records and a table. `tests/bench/evaluation.py` collects them."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from elastic.bench.records import Measurement
from elastic.plots import Panel, in_rows, panels_figure, token_ticks

SCORE = "task score"
COLUMNS = ("task", "length", "n", "msr", "esr_last", "esr_all", "prefill_seconds", "tokens")
NOTES = """Score of generated answers, ± half a 95 % interval over samples, @ MSR; every method on the same samples.
An empty cell was not measured."""


def records(rows: Sequence[dict[str, Any]]) -> list[Measurement]:
    """Records of the rows of an evaluation."""
    return [
        {
            "case": row["task"] if row["length"] is None else f"{row['task']}@{row['length']}",
            "who": row["method"],
            "metric": SCORE,
            "value": row["score"],
            "unit": "share",
            "half": row["half_width"],
            **{name: row[name] for name in COLUMNS},
        }
        for row in rows
    ]


def score_cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per task and length, a column per method; below, the means of each length over the tasks
    that every method was measured on there.
    """
    methods = list(dict.fromkeys(record["who"] for record in found))
    cells = {(record["length"], record["task"], record["who"]): record for record in found}
    places = list(dict.fromkeys((record["length"], record["task"]) for record in found))

    def cell(record: Measurement | None) -> str:
        return "" if record is None else f"{record['value']:.3f} ±{record['half']:.2f} @{record['msr']:.2f}"

    lines = []
    for length, task in places:
        of_methods = [cells.get((length, task, method)) for method in methods]
        samples = next(record["n"] for record in of_methods if record is not None)
        lines.append([task, str(length or "all"), str(samples), *map(cell, of_methods)])
    for length in dict.fromkeys(length for length, _ in places):
        whole = [t for at, t in places if at == length and all((length, t, m) in cells for m in methods)]
        if whole:
            means = [
                [fmean(cells[length, task, method][key] for task in whole) for key in ("value", "msr")]
                for method in methods
            ]
            title = f"mean of {len(whole)} tasks"
            lines.append([title, str(length or "all"), "", *(f"{score:.3f} @{msr:.2f}" for score, msr in means)])
    return ["task", "length", "n", *methods], lines


def score_figure(found: Sequence[Measurement]) -> Any:
    """Score of every task against length, a line per method; where there is one length only (a sweep), against MSR, a
    line per task. A matplotlib `Figure`.
    """
    lengths, tasks, methods = (list(dict.fromkeys(r[key] for r in found)) for key in ("length", "task", "who"))

    def line(x: str, **wanted: object) -> list[tuple[float, float]]:
        return sorted((r[x], r["value"]) for r in found if all(r[key] == value for key, value in wanted.items()))

    if len(lengths) == 1:
        title = "score" if lengths[0] is None else f"score at {lengths[0]} tokens"
        return panels_figure([[Panel(title, {task: line("msr", task=task) for task in tasks}, "MSR", marker="o")]])
    by_task = {task: {who: line("length", task=task, who=who) for who in methods} for task in tasks}
    ticks = token_ticks(lengths)
    panels = [Panel(task, lines, "tokens", "score", "log", xticks=ticks) for task, lines in by_task.items()]
    return panels_figure(in_rows(panels, 3))
