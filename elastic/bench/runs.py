"""Evaluated router runs as files: what `elastic fit` and `elastic test` left, read back for tables and pictures.

A study is a folder: `stamp.json` (GPU, versions, commit, command) and a folder for each run with `results_test.json`,
`metrics.csv` and `elastic.json` (its checkpoint's); `results_full.json` where more held-out rows were read too, and
`stamp.json` where the run came from another command than the study.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

Row = dict[str, float]
FILES = ("results_test.json", "metrics.csv", "elastic.json")
STAMP = "stamp.json"
FULL = "results_full.json"  # the same as results_test.json, of all held-out rows at bias 0, where the other has fewer
# What counts in a source: answers right in every token, share of right tokens where answers are long, or loss.
EXACT = ("needle_single", "needle_multi_key", "needle_multi_value", "needle_multi_query", "passage_qa", "fact_chain")
ACCURACY = ("variable_tracking", "verbatim_copy")
LOSS = ("continuation", "summary", "code_completion")
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
        method: `elastic`, `elastic:<bias>`, `dense`, `streaming`, `random:...`.
        sources, tasks: rows of the results file.
    """

    method: str
    sources: dict[str, Row]
    tasks: dict[str, Row]

    @property
    def is_elastic(self) -> bool:
        """Whether routers (or a learned static pattern) decide; else it is a baseline."""
        return self.method.partition(":")[0] == "elastic"

    @property
    def bias(self) -> float:
        """`sparsity_bias` of the point."""
        return float(self.method.partition(":")[2] or 0.0)

    def value(self, source: str, score: str) -> tuple[float, float]:
        """A score of a source, and the half width of its 95 % interval."""
        row = self.sources[source]
        return row[f"{self.method}_{score}"], row[f"{self.method}_{score}_95"]

    def ratio(self, row: Row, name: str = "msr") -> float:
        """MSR or ESR of a source's or task's row; dense has none."""
        return 0.0 if self.method == "dense" else row[name if self.method == "elastic" else f"{self.method}_{name}"]

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


@dataclass(frozen=True)
class Run:
    """One training run and what was measured of it.

    Attributes:
        folder: holds `FILES`.
        results: contents of `results_test.json`.
        recipe: how it was trained, from `elastic.json`.
        full: contents of `results_full.json`, if there is one.
        stamp: what differs from the study's stamp, where the run was made by another command.
    """

    folder: Path
    results: dict[str, Any]
    recipe: dict[str, Any]
    full: dict[str, Any] | None = None
    stamp: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def router(self) -> str:
        """`elastic` (decides from the input) or `static`."""
        return "static" if self.results["elastic"]["router"]["kind"] == "static" else "elastic"

    @property
    def objective(self) -> str:
        """`quality` or `target`."""
        return self.recipe["objective"]["kind"]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.recipe["seed"]

    @cached_property
    def points(self) -> list[Point]:
        """Its operating points, by rising bias."""
        return sorted((p for p in _points(self.results) if p.is_elastic), key=lambda point: point.bias)

    @cached_property
    def baselines(self) -> list[Point]:
        """Methods without training that were measured beside it."""
        return [point for point in _points(self.results) if not point.is_elastic]

    @cached_property
    def thorough(self) -> list[Point]:
        """All methods of the full results, the run's own last; of the others the baselines and bias 0."""
        if self.full is None:
            return [*self.baselines, self.own]
        return sorted(_points(self.full), key=lambda point: point.is_elastic)

    @property
    def own(self) -> Point:
        """The operating point of bias 0."""
        return next(point for point in self.points if point.method == "elastic")

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """Scalars of the training steps by name, such as `msr/code`."""
        found: dict[str, list[tuple[float, float]]] = {}
        with open(self.folder / "metrics.csv", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name and name.startswith("train/") and value:
                        found.setdefault(name.removeprefix("train/"), []).append((float(row["step"]), float(value)))
        return found


def _points(results: dict[str, Any]) -> list[Point]:
    return [Point(method, results["sources"], results["tasks"]) for method in results["methods"]]


@dataclass(frozen=True)
class Study:
    """Runs on the same data, with the baselines that any of them was measured beside."""

    stamp: dict[str, Any]
    runs: list[Run]

    @cached_property
    def baselines(self) -> dict[str, Point]:
        """By method."""
        return {point.method: point for run in self.runs for point in run.baselines}

    @property
    def dense(self) -> Point:
        """What quality is measured against: dense, or an operating point at which every head stays full, which is the
        same model.
        """
        if "dense" in self.baselines:
            return self.baselines["dense"]
        return next(point for run in self.runs for point in run.points if point.mean_msr == 0)

    def group(self, router: str, objective: str) -> list[Run]:
        """Runs that differ in their seed only."""
        return [run for run in self.runs if (run.router, run.objective) == (router, objective)]

    def groups(self) -> dict[tuple[str, str], list[Run]]:
        """All groups, by (router, objective)."""
        keys = dict.fromkeys((run.router, run.objective) for run in self.runs)
        return {key: self.group(*key) for key in keys}


def read_study(folder: Path) -> Study:
    """Read a study; runs without all of their files (not finished) are left out.

    Raises:
        FileNotFoundError: no `stamp.json`.
        ValueError: no finished run, or none that the dense model was measured beside.
    """
    stamp = folder / STAMP
    if not stamp.is_file():
        raise FileNotFoundError(f"no study at {folder}: {stamp.name} is missing; tests/bench/routing.py writes one")
    runs = []
    for sub in sorted(path for path in folder.iterdir() if all((path / name).is_file() for name in FILES)):
        results, meta = (json.loads((sub / name).read_text(encoding="utf-8")) for name in (FILES[0], FILES[2]))
        full, own = (
            json.loads((sub / name).read_text(encoding="utf-8")) if (sub / name).is_file() else None
            for name in (FULL, STAMP)
        )
        runs.append(Run(sub, results, meta["recipe"], full, own))
    study = Study(json.loads(stamp.read_text(encoding="utf-8")), runs)
    points = [point for run in runs for point in (*run.baselines, *run.points)]
    if not any(point.method == "dense" or point.mean_msr == 0 for point in points):
        raise ValueError(f"{folder} holds {len(runs)} finished runs, none beside the dense model; run it to its end")
    return study
