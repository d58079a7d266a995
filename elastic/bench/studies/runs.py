"""Evaluated router runs as files: what `elastic fit` and `elastic test` left, read back for tables and pictures.

A study is a folder: `stamp.json` (GPU, versions, commit, command) and a folder for each run with
`results_validation.json` (all operating points; they choose one), `metrics.csv`, `elastic.json` (its checkpoint's) and,
once it is measured, `results_test.json` (the chosen operating point, on rows that had no part in choosing) with
`samples_test.jsonl` (the same and all other points by sample; older studies have none). A folder `foreign` in a run's
holds the same files of the foreign set, which has no part in choosing. `plan.json` tells which kind of router it is,
for which objective and from which seed; older runs are told by the other files.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from elastic.bench.studies.bounds import CHOSEN, GENERATOR_TASKS, Kept, kept, task_of
from elastic.bench.studies.samples import Samples, read_samples
from elastic.data.source_names import generator_of
from elastic.data.tasks import SENSITIVE, bound_score
from elastic.routing.methods import Method, parse_method, ratio_columns, renamed

Row = dict[str, float]
FILES = ("results_validation.json", "elastic.json", "metrics.csv")
TEST, TEST_SAMPLES = "results_test.json", "samples_test.jsonl"
STAMP, PLAN = "stamp.json", "plan.json"
FOREIGN = "foreign"  # a set of rows; the others are a study's own
UNTRAINED = "calibrated"  # in the place of an objective
RIVALS = ("static", "need")  # routers that run the same heads for every input: a learned pattern, a measured order
# Answers so long that tables show the share of right tokens.
ACCURACY = ("variable_tracking", "verbatim_copy", "foreign_json", "foreign_multi_needle")
IN_WINDOW = ("foreign_last_paragraph",)  # answers within the last few hundred tokens
RETRIEVAL = tuple(name for name, task in GENERATOR_TASKS.items() if task in SENSITIVE)
LOSS = tuple(name for name, task in GENERATOR_TASKS.items() if bound_score(task) == "loss")


def score_of(source: str, tasks: Mapping[str, str] | None = None) -> str:
    """Name of the score that tables show of a source: `exact`, `accuracy` or `loss`."""
    task = (tasks or {}).get(source) or GENERATOR_TASKS.get(generator_of(source))
    return "accuracy" if generator_of(source) in ACCURACY else "exact" if task is None else bound_score(task)


@dataclass(frozen=True)
class Point:
    """One method's results: an operating point of a run, or a baseline.

    Attributes:
        method: its name in the file, possibly an old one (`elastic.routing.methods.renamed`).
        sources, tasks: rows of the results file.
        known: task class by source, as the file tells.
    """

    method: str
    sources: dict[str, Row]
    tasks: dict[str, Row]
    known: dict[str, str] = field(default_factory=dict)

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

    @property
    def source_tasks(self) -> dict[str, str]:
        """Task class of every source."""
        return {source: task_of(source, self.known) for source in self.sources}

    def mean_over(self, tasks: Sequence[str]) -> float:
        """Mean MSR of those of some tasks that were measured, every task of the same weight."""
        return fmean(msr for task, msr in self.msr_by_task.items() if task in tasks)

    def msr_inside_window(self) -> float | None:
        """Mean MSR over the sources whose answers streaming heads see; None where there are none."""
        found = [self.ratio(row) for source, row in self.sources.items() if generator_of(source) in IN_WINDOW]
        return fmean(found) if found else None

    def retrieval(self) -> tuple[float, float]:
        """Mean of exact answers over the sources of sensitive tasks, and the half width of its 95 % interval."""
        return self.measures()["retrieval"]

    def loss(self) -> tuple[float, float]:
        """Mean loss of the text sources, and the half width of its 95 % interval."""
        return self.measures()["text loss"]

    def measures(self) -> dict[str, tuple[float, float]]:
        """Means over kinds of sources, each source of the same weight, and the half widths of their 95 % intervals:
        exact answers of the sources of sensitive tasks and of the needles among them, loss of the text sources; those
        kinds that were evaluated.
        """
        tasks = self.source_tasks
        kinds = {
            "retrieval": ([source for source in tasks if tasks[source] in SENSITIVE], "exact"),
            "needles": ([source for source in tasks if source.startswith("needle")], "exact"),
            "text loss": ([source for source in tasks if bound_score(tasks[source]) == "loss"], "loss"),
        }
        return {name: self._mean(sources, score) for name, (sources, score) in kinds.items() if sources}

    def _mean(self, sources: Sequence[str], score: str) -> tuple[float, float]:
        values, halves = zip(*(self.value(source, score) for source in sources), strict=True)
        return fmean(values), sum(half**2 for half in halves) ** 0.5 / len(halves)

    def _tensor(self, source: str, score: str) -> Tensor:
        return torch.tensor(self.value(source, score)[0], dtype=torch.float64)

    def kept(self, dense: "Point") -> Kept:
        """What it keeps of the dense model's quality, source by source."""
        return kept(self.source_tasks, self._tensor, dense._tensor)


def slack(point: Point, dense: Point, share: float | None = None) -> float:
    """How far inside all bounds of equal quality a point is: 1 = as good as dense, 0 = on a bound, below 0 = worse. A
    dense model that retrieves nothing has nothing to lose.

    Args:
        share: of dense retrieval that must stay; default `bounds.KEPT`. Other sources have bounds of their own.
    """
    found = point.kept(dense)
    return float(found.slack() if share is None else found.slack(share))


def chosen_bias(results: dict[str, Any]) -> float:
    """The sparsest bias that keeps `CHOSEN` of dense retrieval within the bounds of all other sources, or the best
    where none does; of one `results_validation.json`.
    """
    dense, points = _dense_of(results), by_bias(results)
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
        plan: contents of `plan.json`; empty for runs from before there was one.
        rows: folder below with the files of a set of rows; the run's own files where it is empty.
        choosing: validation on rows of the training's kind, which chooses the operating point; None: `validation`.
    """

    folder: Path
    validation: dict[str, Any]
    test: dict[str, Any] | None
    recipe: dict[str, Any]
    plan: Mapping[str, Any] = field(default_factory=dict)
    rows: str = ""
    choosing: dict[str, Any] | None = None

    @cached_property
    def samples(self) -> Samples | None:
        """Test rows by sample, with all operating points; None of runs from before there was such a file."""
        file = self.folder / self.rows / TEST_SAMPLES
        return read_samples(file) if file.is_file() else None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.name

    @property
    def router(self) -> str:
        """`elastic` (decides from the input), `static`, or another kind that the plan names."""
        if self.plan:
            return str(self.plan["router"])
        return "static" if self.validation["elastic"]["router"]["kind"] == "static" else "elastic"

    @property
    def objective(self) -> str:
        """`quality`, `target`, or `UNTRAINED`."""
        return str(self.plan["objective"]) if self.plan else str(self.recipe["objective"]["kind"])

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.plan.get("seed", self.recipe.get("seed")))

    @property
    def steps(self) -> int:
        """Steps of training; 0 without any."""
        return 0 if self.objective == UNTRAINED else int(self.recipe["step"])

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
        """What the validation rows of the training's kind chose: see `chosen_bias`."""
        return chosen_bias(self.choosing or self.validation)

    @cached_property
    def tested(self) -> Point | None:
        """The chosen operating point on the test rows; None before it is measured."""
        found = [] if self.test is None else [p for p in by_bias(self.test) if p.bias == self.chosen_bias]
        if self.test is not None and not found:
            raise ValueError(
                f"{self.folder / self.rows / TEST} lacks bias {self.chosen_bias:g}, which the validation rows "
                "chose; remove it and run the study again"
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
        """Scalars of the training steps by name, such as `msr/code`; none without training."""
        found: dict[str, list[tuple[float, float]]] = {}
        if self.objective == UNTRAINED:
            return found
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
    known = results.get("source_tasks", {})
    return [Point(method, results["sources"], results["tasks"], known) for method in results["methods"]]


@dataclass(frozen=True)
class Study:
    """Runs on the same data, with the baselines that any of them was measured beside."""

    stamp: dict[str, Any]
    runs: list[Run]
    rows: str = ""

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

    def rivals(self, router: str, objective: str) -> list[Run]:
        """Runs of a kind of `RIVALS` that runs of this objective are compared with: those of the same one, and all of
        them where one side has none.
        """
        return [
            run
            for run in self.runs
            if run.router == router and (objective == run.objective or UNTRAINED in (objective, run.objective))
        ]

    def groups(self) -> dict[tuple[str, str], list[Run]]:
        """All groups, by (router, objective)."""
        keys = dict.fromkeys((run.router, run.objective) for run in self.runs)
        return {key: self.group(*key) for key in keys}


def read_study(folder: Path, rows: str = "") -> Study:
    """Read a study; runs without `FILES` (not finished) are left out.

    Args:
        rows: `FOREIGN` for what was measured on the foreign set.

    Raises:
        FileNotFoundError: no `stamp.json`.
        ValueError: no finished run, or test rows without the dense model on them.
    """
    stamp = folder / STAMP
    if not stamp.is_file():
        raise FileNotFoundError(f"no study at {folder}: {stamp.name} is missing; tests/bench/routing.py writes one")
    runs = [_run(sub, rows) for sub in sorted(folder.iterdir()) if _is_finished(sub, rows)]
    study = Study(_read(stamp), runs, rows)
    if not runs or (any(run.test for run in runs) and "dense" not in study.baselines):
        raise ValueError(
            f"{folder} holds {len(runs)} finished runs, none tested beside the dense model; run it to its end"
        )
    return study


def has_rows(folder: Path, rows: str) -> bool:
    """Whether any run of a study was validated on this set of rows."""
    return any(_is_finished(sub, rows) for sub in folder.iterdir())


def _is_finished(sub: Path, rows: str) -> bool:
    plan = _read(sub / PLAN)
    made = () if plan is not None and plan["objective"] == UNTRAINED else FILES[1:]
    return all((sub / name).is_file() for name in (*made, Path(rows) / FILES[0]))


def _run(sub: Path, rows: str) -> Run:
    validation, test, plan = (_read(path) for path in (sub / rows / FILES[0], sub / rows / TEST, sub / PLAN))
    made = _read(sub / FILES[1]) or {"recipe": {}}
    return Run(sub, validation, test, made["recipe"], plan or {}, rows, _read(sub / FILES[0]))


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _dense_of(results: dict[str, Any]) -> Point:
    return next(point for point in points_of(results) if point.method == "dense")
