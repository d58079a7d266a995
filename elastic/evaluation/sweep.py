"""Sensitivity to sparsity (section 2.2 of the paper): heads, ranked by retrieval score, run streaming from none to all;
score per task over MSR.
"""

import json
from pathlib import Path
from typing import Any

from elastic.evaluation.benchmark import Request
from elastic.evaluation.retrieval import NEEDLE_TASKS, retrieval_scores, write_ranking
from elastic.evaluation.ruler import Ruler
from elastic.evaluation.runner import EvaluationPlan, load_model
from elastic.evaluation.scores import LOCK
from elastic.files import alone, write_atomic
from elastic.plots import curves_figure, save_png
from elastic.routing.methods import Method, parse_method

RANK_SAMPLES = 8  # of each needle task


def sweep_methods(pattern: Path, points: int) -> list[Method]:
    """The pattern's heads at `points` shares of streaming heads, from 0 to 1.

    Raises:
        ValueError: fewer than two points.
    """
    if points < 2:
        raise ValueError(f"--points {points} is below 2; a sweep goes from MSR 0 to 1")
    return [parse_method(f"static:{pattern}@{i / (points - 1):.4g}") for i in range(points)]


def make_ranking(plan: EvaluationPlan, pattern: Path) -> None:
    """Rank the backbone's heads by retrieval score and write the pattern file; a file that is there stays, also one
    that another process is just making.

    Raises:
        ValueError: a name that does not end in .tsv, or a length too short for the needle tasks.
    """
    if pattern.suffix != ".tsv":
        raise ValueError(f"--sweep {pattern}: the ranking is written as a pattern file; expected a name ending in .tsv")
    if pattern.exists():
        return
    with alone(pattern.with_name(f".{pattern.name}.lock")):
        if not pattern.exists():
            _rank(plan, pattern)


def _rank(plan: EvaluationPlan, pattern: Path) -> None:
    model, tokenizer = load_model(plan, parse_method("dense"), plan.stretched(plan.lengths[0]))
    length, seed = plan.lengths[0], plan.seed + 1  # not the samples that are evaluated
    docs = [
        doc
        for task in NEEDLE_TASKS
        for doc in Ruler().documents(Request(task, length, RANK_SAMPLES, tokenizer, seed, chat=False))
    ]
    origin = {
        "what": "retrieval score per layer and KV head",
        "backbone": plan.backbone,
        "tasks": list(NEEDLE_TASKS),
        "length": length,
        "samples": len(docs),
        "seed": seed,
    }
    write_ranking(retrieval_scores(model, tokenizer, docs), pattern, origin)


def write_sweep(rows: list[dict[str, Any]], out: Path) -> list[Path]:
    """`sweep.json` {length: {task: [[MSR, score, half interval], ...]}} and its picture, one panel per length."""
    lengths = list(dict.fromkeys(row["length"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    curves = {
        str(length): {
            task: sorted(
                (row["msr"], row["score"], row["half_width"])
                for row in rows
                if (row["task"], row["length"]) == (task, length)
            )
            for task in tasks
        }
        for length in lengths
    }
    panels = {
        f"score at {length} tokens": {task: [(x, y) for x, y, _ in points] for task, points in lines.items()}
        for length, lines in curves.items()
    }
    file, figure = out / "sweep.json", curves_figure(panels, "MSR", "o")
    with alone(out / LOCK):
        write_atomic(file, json.dumps(curves, indent=1) + "\n")
        return [file, save_png(figure, out / "sweep.png")]
