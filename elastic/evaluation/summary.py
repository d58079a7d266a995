"""Table and pictures of an evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic.console import table
from elastic.evaluation.scores import LOCK
from elastic.files import alone, write_atomic
from elastic.plots import bars_figure, curves_figure, save_png

Rows = list[dict[str, Any]]


def summary_table(rows: Rows) -> str:
    """Score by task and length, one column per method, and each benchmark's means over tasks and over samples."""
    lines = [line for benchmark in _values(rows, "benchmark") for line in _lines(rows, benchmark, "length")]
    return table(["task", "length", "n", *_values(rows, "method")], lines)


def group_table(rows: Rows) -> str:
    """The same by group (length in words, difficulty); empty where no task has groups."""
    parts = grouped(rows)
    lines = [line for benchmark in _values(parts, "benchmark") for line in _lines(parts, benchmark, "group")]
    return table(["task", "group", "n", *_values(parts, "method")], lines) if parts else ""


def _lines(rows: Rows, benchmark: str, part: str) -> list[list[str]]:
    """Lines of a benchmark's tasks by `part` (length or group), then of their means."""
    methods, own = _values(rows, "method"), [row for row in rows if row["benchmark"] == benchmark]
    lines = []
    for task, name in dict.fromkeys((row["task"], row[part]) for row in own):
        found = [next(r for r in own if (r["method"], r["task"], r[part]) == (m, task, name)) for m in methods]
        cells = [_score(row) + (f" @{row['msr']:.2f}" if part == "length" else "") for row in found]
        lines.append([task, str(name or "all"), str(found[0]["n"]), *cells])
    if _values(own, "task") == [benchmark]:
        return lines
    names = sorted(_values(own, part), key=lambda name: name or 0) if part == "length" else sorted(_values(own, part))
    for label, by_samples in (("tasks", False), ("samples", True)):
        for name in names:
            means = [mean([r for r in own if (r["method"], r[part]) == (m, name)], by_samples) for m in methods]
            scores = [_score(found) for found in means]
            lines.append([f"{benchmark}: mean of {label}", str(name or "all"), str(means[0]["n"]), *scores])
    return lines


def _values(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def write_summary(rows: Rows, out: Path, notes: Sequence[str] = ()) -> list[Path]:
    """`summary.json`, the tables and notes on them as `summary.txt`, and the pictures: score against length (in tokens,
    or by group) and against MSR, MSR and score per task.
    """
    tables = filter(None, (summary_table(rows), group_table(rows), "\n".join(notes)))
    with alone(out / LOCK):
        write_atomic(out / "summary.json", json.dumps(rows, indent=1) + "\n")
        write_atomic(out / "summary.txt", "\n\n".join(tables) + "\n")
        return [save_png(figure, out / f"{name}.png") for name, figure in _figures(rows).items()]


def _figures(rows: Rows) -> dict[str, Any]:
    methods, tasks = _values(rows, "method"), _values(rows, "task")
    lengths = sorted({row["length"] for row in rows}, key=lambda length: length or 0)

    def cells(method: str, length: int | None) -> Rows:
        return [row for row in rows if (row["method"], row["length"]) == (method, length)]

    def average(method: str, task: str, name: str) -> float:
        found = [row[name] for row in rows if (row["method"], row["task"]) == (method, task)]
        return float(sum(found) / len(found))

    figures = {}
    if known := [length for length in lengths if length is not None]:
        by_length = {m: [(length, mean(cells(m, length))["score"]) for length in known] for m in methods}
        figures["score_by_length"] = curves_figure({"score": by_length}, "length in tokens", "o")
    if parts := grouped(rows):
        groups = sorted({part["group"] for part in parts})
        by_group = {
            m: {g: mean([p for p in parts if (p["method"], p["group"]) == (m, g)])["score"] for g in groups}
            for m in methods
        }
        figures["score_by_group"] = bars_figure({"score": by_group})
    by_msr = {
        m: sorted((sum(r["msr"] for r in cells(m, n)) / len(cells(m, n)), mean(cells(m, n))["score"]) for n in lengths)
        for m in methods
    }
    figures["score_by_msr"] = curves_figure({"score": by_msr}, "MSR", "o")
    figures["by_task"] = bars_figure(
        {
            title: {method: {task: average(method, task, name) for task in tasks} for method in methods}
            for title, name in (("MSR", "msr"), ("score", "score"))
        }
    )
    return figures


def grouped(rows: Rows) -> Rows:
    """One row for each group of each row."""
    return [{**row, "group": name, **part} for row in rows for name, part in row.get("groups", {}).items()]


def mean(rows: Rows, by_samples: bool = False) -> dict[str, float]:
    """Mean score of tasks, each alike or by its samples, with half of its 95 % interval, which follows from the tasks'
    own since their samples are independent.
    """
    n = sum(row["n"] for row in rows)
    shares = [row["n"] / n if by_samples else 1 / len(rows) for row in rows]
    return {
        "score": sum(share * row["score"] for share, row in zip(shares, rows, strict=True)),
        "half_width": sum((share * row["half_width"]) ** 2 for share, row in zip(shares, rows, strict=True)) ** 0.5,
        "n": n,
    }


def _score(row: dict[str, Any]) -> str:
    return f"{row['score']:.3f} ±{row['half_width']:.2f}"
