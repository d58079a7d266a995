"""What the methods of an evaluation differ by on the same samples: a mean for each set (a benchmark) and length, and
its paired bootstrap interval against the methods that all others are compared with.

Every task counts the same, then every length. Legend: M samples of a set, S its tasks at their lengths, R draws.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from elastic.evaluation.scores import sample_file
from elastic.evaluation.summary import Rows, mean
from elastic.routing.methods import Method
from elastic.training.paired import Interval, Resamples

AVERAGED = ("msr", "esr_all", "prefill_seconds")


@dataclass(frozen=True)
class Compared:
    """What a method came to on a set.

    Attributes:
        set: a benchmark.
        length: in tokens; None: the mean over all lengths, or the only one of a benchmark without lengths.
        task: None: the mean over all tasks.
        method: its name.
        n: samples.
        score, half_width: mean between 0 and 1, and half of its 95 % interval.
        msr, esr_all, prefill_seconds: means.
        ahead: by method that it is compared with: this score minus that one's, on the same samples.
    """

    set: str
    length: int | None
    task: str | None
    method: str
    n: int
    score: float
    half_width: float
    msr: float
    esr_all: float
    prefill_seconds: float
    ahead: dict[str, Interval]


def references(methods: Sequence[Method], asked: Sequence[str] | None) -> list[str]:
    """The methods that the others are compared with: those asked for, else the dense model and the first static order
    among the methods.

    Raises:
        ValueError: one that is not among the methods.
    """
    names = [method.name for method in methods]
    if asked is None:
        first = [next((m.name for m in methods if m.kind == kind), None) for kind in ("dense", "static")]
        return [name for name in first if name is not None]
    if missing := [name for name in asked if name not in names]:
        raise ValueError(f"--against {missing[0]}: it is not among the methods, which are {', '.join(names)}")
    return list(dict.fromkeys(asked))


def compare(rows: Rows, out: Path, against: Sequence[str]) -> list[Compared]:
    """Every set by length, then over its lengths, then by task; method by method.

    Args:
        rows: of an evaluation (`elastic.evaluation.runner.run`), all methods on the same tasks and lengths.
        out: folder with their samples.
        against: names of methods to compare with (`references`).

    Raises:
        ValueError: methods that were not measured on the same samples.
    """
    return [
        found
        for name in dict.fromkeys(row["benchmark"] for row in rows)
        for found in _Set(name, [row for row in rows if row["benchmark"] == name], out).compared(against)
    ]


class _Set:
    """A benchmark's tasks at their lengths (cells), as all methods did them.

    Attributes:
        rows: by method and cell.
        means_RS: of each method, mean of every cell in every draw.
    """

    def __init__(self, name: str, rows: Rows, out: Path) -> None:
        self.name, self.rows = name, {(row["method"], row["task"], row["length"]): row for row in rows}
        self.cells = list(dict.fromkeys((row["task"], row["length"]) for row in rows))
        self.methods = list(dict.fromkeys(row["method"] for row in rows))
        scores = {method: [_scores(out, method, *cell) for cell in self.cells] for method in self.methods}
        first = scores[self.methods[0]]
        for method, found in scores.items():
            if unlike := [
                cell
                for cell, mine, theirs in zip(self.cells, found, first, strict=True)
                if mine.keys() != theirs.keys()
            ]:
                raise ValueError(
                    f"{method} and {self.methods[0]} were measured on different samples of {unlike[0][0]} in {out}; "
                    "evaluate them in one command"
                )
        draws = Resamples([f"{place:06d}" for place, cell in enumerate(first) for _ in cell])  # sorted as the cells are
        self.means_RS = {method: draws.means(_joined(found)) for method, found in scores.items()}

    def compared(self, against: Sequence[str]) -> list[Compared]:
        """Every method on every part."""
        return [
            self._compared(method, task, length, places, against)
            for task, length, places in self._parts()
            for method in self.methods
        ]

    def _parts(self) -> Iterator[tuple[str | None, int | None, list[list[int]]]]:
        """Task, length, and the cells whose means are averaged, then again over the outer list."""
        lengths = sorted({length for _, length in self.cells}, key=lambda length: length or 0)
        by_length = [[at for at, cell in enumerate(self.cells) if cell[1] == length] for length in lengths]
        yield from ((None, length, [places]) for length, places in zip(lengths, by_length, strict=True))
        if len(lengths) > 1:
            yield None, None, by_length
        yield from ((task, length, [[at]]) for at, (task, length) in enumerate(self.cells))

    def _compared(
        self, method: str, task: str | None, length: int | None, places: list[list[int]], against: Sequence[str]
    ) -> Compared:
        groups = [[self.rows[(method, *self.cells[at])] for at in group] for group in places]
        score = mean([mean(group) for group in groups])
        ratios: dict[str, Any] = {
            name: fmean(fmean(row[name] for row in group) for group in groups) for name in AVERAGED
        }

        def drawn(of: str) -> Tensor:
            return torch.stack([self.means_RS[of][:, group].mean(1) for group in places]).mean(0)

        ahead = {other: Interval.of(drawn(method) - drawn(other)) for other in against if other != method}
        return Compared(
            self.name, length, task, method, int(score["n"]), score["score"], score["half_width"], ahead=ahead, **ratios
        )


def _scores(out: Path, method: str, task: str, length: int | None) -> dict[Any, float]:
    """Score of every sample of a cell by its number."""
    lines = sample_file(out, method, task, length).read_text(encoding="utf-8").splitlines()[1:]
    return {line["index"]: line["score"] for line in map(json.loads, lines)}


def _joined(cells: Sequence[dict[Any, float]]) -> Tensor:
    return torch.tensor([cell[index] for cell in cells for index in sorted(cell)], dtype=torch.float64)
