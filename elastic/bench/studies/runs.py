"""Evaluated router runs as files: what `elastic fit` and `elastic test` left, read back for tables and pictures.

A study is a folder: `stamp.json` (GPU, versions, commit, command) and a folder for each run with
`results_validation.json` (all operating points; they choose one), `metrics.csv`, `elastic.json` (its checkpoint's) and,
once it is measured, `results_test.json` (the chosen operating point, on rows that had no part in choosing).
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from elastic.routing.methods import Method, parse_method, ratio_columns, renamed

Row = dict[str, float]
FILES = ("results_validation.json", "elastic.json", "metrics.csv")
TEST = "results_test.json"
STAMP = "stamp.json"
KEPT, RISE = 0.97, 0.02  # equal quality: share of dense retrieval that must stay, rise of loss that may be
CHOSEN = 0.99  # share that a point to be chosen keeps: the best of several points owes some of its lead to luck
# What counts in a source: answers right in every token, share of right tokens where answers are long, or loss.
EXACT = (
    *("needle_single", "needle_multi_key", "needle_multi_value", "needle_multi_query", "passage_qa", "fact_chain"),
    *("foreign_pass_key", "foreign_needle", "foreign_play", "foreign_last_paragraph", "foreign_chat"),
)
ACCURACY = ("variable_tracking", "verbatim_copy", "foreign_json", "foreign_multi_needle")
LOSS = (
    *("continuation", "summary", "code_completion"),
    *("foreign_continuation", "foreign_summary", "foreign_code"),
)
RETRIEVAL = (*EXACT, *ACCURACY)


def generator_of(source: str) -> str:
    """`needle_single` of `needle_single-4096`."""
    return source.partition("-")[0]


def score_of(source: str) -> str:
    """Name of the score that counts: `exact`, `accuracy` or `loss`."""
    name = generator_of(source)
    return "loss" if name in LOSS else "accuracy" if name in ACCURACY else "exact"


@dataclass(frozen=True)
class Point:
    """One method's results: an operating point of a run, or a baseline.

    Attributes:
        method: its name in the file, possibly an old one (`elastic.routing.methods.renamed`).
        sources, tasks: rows of the results file.
    """

    method: str
    sources: dict[str, Row]
    tasks: dict[str, Row]

    @property
    def parsed(self) -> Method:
        """The method of that name."""
        return parse_method(renamed(self.method))

    @property
    def is_elastic(self) -> bool:
        """Whether routers (or a learned static pattern) decide; else it is a baseline."""
        return self.parsed.kind == "elastic"

    @property
    def bias(self) -> float:
        """`sparsity_bias` of the point."""
        return self.parsed.bias or 0.0

    def value(self, source: str, score: str) -> tuple[float, float]:
        """A score of a source, and the half width of its 95 % interval."""
        row = self.sources[source]
        return row[f"{self.method}_{score}"], row[f"{self.method}_{score}_95"]

    def ratio(self, row: Row, name: str = "msr") -> float:
        """MSR or ESR of a source's or task's row; dense has none."""
        column = ratio_columns(self.method).get(name)
        return 0.0 if column is None else row[column]

    @property
    def msr_by_task(self) -> dict[str, float]:
        """MSR of every task."""
        return {task: self.ratio(row) for task, row in self.tasks.items()}

    @property
    def mean_msr(self) -> float:
        """Mean of the tasks' MSR, every task of the same weight."""
        return fmean(self.msr_by_task.values())

    def retrieval(self) -> tuple[float, float]:
        """Mean score of the retrieval sources, and the half width of its 95 % interval."""
        return self._mean([source for source in self.sources if generator_of(source) in RETRIEVAL])

    def needles(self) -> tuple[float, float]:
        """The same for the needles alone."""
        return self._mean([source for source in self.sources if source.startswith("needle")])

    def loss(self) -> tuple[float, float]:
        """Mean loss of the text sources, and the half width of its 95 % interval."""
        return self._mean([source for source in self.sources if generator_of(source) in LOSS])

    def _mean(self, sources: Sequence[str]) -> tuple[float, float]:
        values, halves = zip(*(self.value(source, score_of(source)) for source in sources), strict=True)
        return fmean(values), sum(half**2 for half in halves) ** 0.5 / len(halves)


def slack(point: Point, dense: Point, kept: float = KEPT) -> float:
    """How far inside both bounds of equal quality a point is: 1 = as good as dense, 0 = on a bound, below 0 = worse. A
    dense model that retrieves nothing has nothing to lose.
    """
    base, rise = dense.retrieval()[0], point.loss()[0] / dense.loss()[0] - 1
    share = point.retrieval()[0] / base if base else 1.0
    return min((share - kept) / (1 - kept), (RISE - rise) / RISE)


def chosen_bias(validation: dict[str, Any]) -> float:
    """The sparsest bias that keeps `CHOSEN` of dense retrieval and loses at most `RISE` on text, or the best where none
    does; of `results_validation.json`.
    """
    dense, points = _dense_of(validation), by_bias(validation)
    inside = [point for point in points if slack(point, dense, CHOSEN) >= 0]
    if inside:
        return max(inside, key=lambda point: point.mean_msr).bias
    return max(points, key=lambda point: slack(point, dense)).bias


@dataclass(frozen=True)
class Run:
    """One training run and what was measured of it.

    Attributes:
        folder: holds `FILES`.
        validation: contents of `results_validation.json`, dense among its methods.
        test: contents of `results_test.json`; None before it is measured.
        recipe: how it was trained, from `elastic.json`.
    """

    folder: Path
    validation: dict[str, Any]
    test: dict[str, Any] | None
    recipe: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def router(self) -> str:
        """`elastic` (decides from the input) or `static`."""
        return "static" if self.validation["elastic"]["router"]["kind"] == "static" else "elastic"

    @property
    def objective(self) -> str:
        """`quality` or `target`."""
        return str(self.recipe["objective"]["kind"])

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.recipe["seed"])

    @cached_property
    def points(self) -> list[Point]:
        """Its operating points on the validation rows, by rising bias."""
        return by_bias(self.validation)

    @cached_property
    def dense(self) -> Point:
        """The dense model on the validation rows."""
        return _dense_of(self.validation)

    @property
    def chosen_bias(self) -> float:
        """What the validation rows chose: see `chosen_bias`."""
        return chosen_bias(self.validation)

    @cached_property
    def tested(self) -> Point | None:
        """The chosen operating point on the test rows; None before it is measured."""
        found = [] if self.test is None else [p for p in by_bias(self.test) if p.bias == self.chosen_bias]
        if self.test is not None and not found:
            raise ValueError(
                f"{self.folder / TEST} lacks bias {self.chosen_bias:g}, which the validation rows chose; remove it and "
                "run the study again"
            )
        return found[0] if found else None

    @cached_property
    def baselines(self) -> list[Point]:
        """Methods without training that were measured on the test rows beside it."""
        return [] if self.test is None else [point for point in points_of(self.test) if not point.is_elastic]

    def at(self, bias: float) -> Point | None:
        """The operating point of a bias on the validation rows, if there is one."""
        return next((point for point in self.points if point.bias == bias), None)

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Scalars of the training steps by name, such as `msr/code`."""
        found: dict[str, list[tuple[float, float]]] = {}
        with open(self.folder / "metrics.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name and name.startswith("train/") and value:
                        found.setdefault(name.removeprefix("train/"), []).append((float(row["step"]), float(value)))
        return found


def by_bias(results: dict[str, Any]) -> list[Point]:
    """Operating points of a results file, by rising bias."""
    return sorted((point for point in points_of(results) if point.is_elastic), key=lambda point: point.bias)


def points_of(results: dict[str, Any]) -> list[Point]:
    """All methods of a results file."""
    return [Point(method, results["sources"], results["tasks"]) for method in results["methods"]]


@dataclass(frozen=True)
class Study:
    """Runs on the same data, with the baselines that any of them was measured beside."""

    stamp: dict[str, Any]
    runs: list[Run]

    @cached_property
    def baselines(self) -> dict[str, Point]:
        """On the test rows, by method."""
        return {point.method: point for run in self.runs for point in run.baselines}

    @property
    def dense(self) -> Point:
        """The dense model on the test rows."""
        return self.baselines["dense"]

    def group(self, router: str, objective: str) -> list[Run]:
        """Runs that differ in their seed only."""
        return [run for run in self.runs if (run.router, run.objective) == (router, objective)]

    def groups(self) -> dict[tuple[str, str], list[Run]]:
        """All groups, by (router, objective)."""
        keys = dict.fromkeys((run.router, run.objective) for run in self.runs)
        return {key: self.group(*key) for key in keys}


def read_study(folder: Path) -> Study:
    """Read a study; runs without `FILES` (not finished) are left out.

    Raises:
        FileNotFoundError: no `stamp.json`.
        ValueError: no finished run, or test rows without the dense model on them.
    """
    stamp = folder / STAMP
    if not stamp.is_file():
        raise FileNotFoundError(f"no study at {folder}: {stamp.name} is missing; tests/bench/routing.py writes one")
    runs = []
    for sub in sorted(path for path in folder.iterdir() if all((path / name).is_file() for name in FILES)):
        validation, meta, test = (_read(sub / name) for name in (*FILES[:2], TEST))
        runs.append(Run(sub, validation, test, meta["recipe"]))
    study = Study(_read(stamp), runs)
    if not runs or (any(run.test for run in runs) and "dense" not in study.baselines):
        raise ValueError(
            f"{folder} holds {len(runs)} finished runs, none tested beside the dense model; run it to its end"
        )
    return study


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _dense_of(results: dict[str, Any]) -> Point:
    return next(point for point in points_of(results) if point.method == "dense")
