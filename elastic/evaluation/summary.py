"""Table and pictures of an evaluation."""

import json
from collections.abc import Callable
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
        cells = [f"{found[m]['score']:.3f} ±{found[m]['half_width']:.2f} @{found[m]['msr']:.2f}" for m in methods]
        lines.append([key[0], str(key[1] or "all"), str(found[methods[0]]["n"]), *cells])
    for length in sorted({row["length"] for row in rows}, key=lambda length: length or 0):
        means = [_mean([r for r in rows if r["method"] == m and r["length"] == length]) for m in methods]
        lines.append(["mean of tasks", str(length or "all"), "", *(f"{m['plain']:.3f}" for m in means)])
    total = [_mean([r for r in rows if r["method"] == m]) for m in methods]
    lines.append(["mean of samples", "all", str(total[0]["n"]), *(f"{m['weighted']:.3f}" for m in total)])
    return table(["task", "length", "n", *methods], lines)


def write_summary(rows: Rows, out: Path) -> list[Path]:
    """`summary.json` and the pictures: score against length and against MSR, MSR per task."""
    (out / "summary.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lengths = sorted({row["length"] for row in rows}, key=lambda length: length or 0)

    def points(of: str, x: Callable[[Rows, int], float]) -> list[tuple[float, float]]:
        groups = [(length, [r for r in rows if r["method"] == of and r["length"] == length]) for length in lengths]
        return [(x(group, length or 0), _mean(group)["plain"]) for length, group in groups]

    by_length = {method: points(method, lambda _, length: length) for method in methods}
    by_msr = {
        method: sorted(points(method, lambda group, _: sum(r["msr"] for r in group) / len(group))) for method in methods
    }
    tasks = list(dict.fromkeys(row["task"] for row in rows))

    def per_task(name: str) -> dict[str, dict[str, float]]:
        def mean(method: str, task: str) -> float:
            found = [r[name] for r in rows if (r["method"], r["task"]) == (method, task)]
            return sum(found) / len(found)

        return {method: {task: mean(method, task) for task in tasks} for method in methods}

    return [
        save_png(curves_figure({"score": by_length}, "length in tokens", "o"), out / "score_by_length.png"),
        save_png(curves_figure({"score": by_msr}, "MSR", "o"), out / "score_by_msr.png"),
        save_png(bars_figure({"MSR": per_task("msr"), "score": per_task("score")}), out / "by_task.png"),
    ]


def _mean(rows: Rows) -> dict[str, float]:
    n = sum(row["n"] for row in rows)
    return {
        "plain": sum(row["score"] for row in rows) / len(rows),
        "weighted": sum(row["score"] * row["n"] for row in rows) / n,
        "n": n,
    }
