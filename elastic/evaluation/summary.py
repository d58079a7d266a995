"""Table and pictures of an evaluation."""

import json
from pathlib import Path
from typing import Any

from elastic.console import table
from elastic.plots import bars_figure, curves_figure, save_png

Rows = list[dict[str, Any]]


def summary_table(rows: Rows) -> str:
    """Score by task and length, one column per method, and the means over tasks and over samples."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = []
    for key in dict.fromkeys((row["task"], row["length"]) for row in rows):
        found = {row["method"]: row for row in rows if (row["task"], row["length"]) == key}
        cells = [f"{_score(found[m])} @{found[m]['msr']:.2f}" for m in methods]
        lines.append([key[0], str(key[1] or "all"), str(found[methods[0]]["n"]), *cells])
    for length in sorted({row["length"] for row in rows}, key=lambda length: length or 0):
        means = [mean([r for r in rows if r["method"] == m and r["length"] == length]) for m in methods]
        lines.append(["mean of tasks", str(length or "all"), "", *(_score(m) for m in means)])
    total = [mean([r for r in rows if r["method"] == m], by_samples=True) for m in methods]
    lines.append(["mean of samples", "all", str(total[0]["n"]), *(_score(m) for m in total)])
    return table(["task", "length", "n", *methods], lines)


def group_table(rows: Rows) -> str:
    """Score by task and group (length in words, difficulty), and the means over tasks and over samples of each group;
    empty where no task has groups.
    """
    parts = grouped(rows)
    methods, groups = (list(dict.fromkeys(part[key] for part in parts)) for key in ("method", "group"))
    lines = []
    for key in dict.fromkeys((part["task"], part["group"]) for part in parts):
        found = {part["method"]: part for part in parts if (part["task"], part["group"]) == key}
        lines.append([key[0], key[1], str(found[methods[0]]["n"]), *(_score(found[m]) for m in methods)])
    several = len({part["task"] for part in parts}) > 1
    for label, by_samples in (("mean of tasks", False), ("mean of samples", True)) if several else ():
        for group in sorted(groups):
            means = [mean([p for p in parts if (p["method"], p["group"]) == (m, group)], by_samples) for m in methods]
            lines.append([label, group, str(means[0]["n"]), *(_score(m) for m in means)])
    return table(["task", "group", "n", *methods], lines) if parts else ""


def write_summary(rows: Rows, out: Path) -> list[Path]:
    """`summary.json`, the tables as `summary.txt`, and the pictures: score against length (in tokens, or by group) and
    against MSR, MSR and score per task.
    """
    (out / "summary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    tables = filter(None, (summary_table(rows), group_table(rows)))
    (out / "summary.txt").write_text("\n\n".join(tables) + "\n", encoding="utf-8")
    methods, tasks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("method", "task"))
    lengths = sorted({row["length"] for row in rows}, key=lambda length: length or 0)

    def cells(method: str, length: int | None) -> Rows:
        return [row for row in rows if (row["method"], row["length"]) == (method, length)]

    def average(method: str, task: str, name: str) -> float:
        found = [row[name] for row in rows if (row["method"], row["task"]) == (method, task)]
        return sum(found) / len(found)

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
    return [save_png(figure, out / f"{name}.png") for name, figure in figures.items()]


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
