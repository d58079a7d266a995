"""What the samples of a task come to: mean score with its interval, routes, groups; one row of the tables."""

import json
from pathlib import Path
from typing import Any

from elastic.training.intervals import half_width

LOCK = ".lock"  # of whoever writes into the folder of an evaluation
MEASURED = ("score", "msr", "esr_last", "esr_all", "prefill_seconds", "tokens")  # of every sample


def sample_file(out: Path, method: str, task: str, length: int | None) -> Path:
    """Where the samples of a method's task lie in the folder of an evaluation."""
    name = ".".join(slug(part) for part in (method, task, str(length or "")) if part)
    return out / "samples" / f"{name}.jsonl"


def slug(name: str) -> str:
    """A name as part of a file's."""
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Rows of everything that runs into this folder have finished, whichever processes and machines they ran on.

    Raises:
        ValueError: no finished results.
    """
    rows = []
    for file in sorted((out / "samples").glob("*.jsonl")):
        origin, *samples = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        rows.append({**row_of(origin, samples), "facts": origin})
    if not rows:
        raise ValueError(f"{out / 'samples'} holds no results; run `elastic eval --out {out}` first")
    return rows


def row_of(origin: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Row of a task: means over its samples, by the first line of its result file, which says how they came about."""
    mean = {name: sum(sample[name] for sample in samples) / len(samples) for name in MEASURED}
    return {
        "benchmark": origin["protocol"][0].partition(" ")[0],
        **{name: origin[name] for name in ("method", "task", "length")},
        "n": len(samples),
        **mean,
        "half_width": interval(samples),
        "groups": _groups(samples),
    }


def _groups(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Score, number and half interval of the samples of each group, such as a difficulty, in alphabetical order."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        for group in sample.get("groups", ()):
            groups.setdefault(group, []).append(sample)
    return {
        name: {"score": sum(s["score"] for s in found) / len(found), "n": len(found), "half_width": interval(found)}
        for name, found in sorted(groups.items())
    }


def interval(samples: list[dict[str, Any]]) -> float:
    """Half of the 95 % interval of the mean score, which is between 0 and 1."""
    scores = [sample["score"] for sample in samples]
    return half_width(sum(scores), sum(score**2 for score in scores), len(scores))
