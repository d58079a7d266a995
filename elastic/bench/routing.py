"""`elastic bench routing`: tables and pictures of trained routers, from the files of a study (`elastic.bench.runs`)."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from elastic.bench.records import Record, save
from elastic.bench.runs import KEPT, RISE, Point, Run, Study, read_study, score_of, slack
from elastic.console import say, table
from elastic.plots import Panel, panels_figure, save_png, share_figure, smooth
from elastic.tasks import ROBUST, SENSITIVE

SUMMARY = "what trained routers keep of the dense model's quality, from recorded runs"
HEADLINE, POINT = "headline", "point"  # cases of records that are about no single source
AT_LEAST = "at_least"  # in records of MSR at equal quality: some seed's sparsest point is of equal quality still
CHOSEN = "chosen"  # operating point that the validation rows chose
NOTES = f"""Answers teacher-forced on held-out samples (other seeds, wording and texts than in training); exact: all
answer tokens right, which is what greedy decoding would give. ± half a 95 % interval: over seeds by Student's t in the
first table, over samples in the second, where seeds are averaged. Retrieval: mean of the exact and accuracy rows but
many_shot; loss: mean of the loss rows. Equal quality keeps {KEPT:.0%} of dense retrieval and loses at most {RISE:.0%}
on text. Chosen: the `sparsity_bias` that is the sparsest of equal quality on validation rows, none of which are in
these tables; the second table is at this bias. MSR at equal quality: the largest mean MSR of equal quality on the rows
of these tables, between a run's operating points by straight lines; ≥ where the sparsest point of a seed is of equal
quality still."""
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 % quantiles by number of seeds
HEADLINES = (  # all shares
    "retrieval of dense",
    "needles of dense",
    "text loss of dense",
    "mean MSR",
    "MSR robust - sensitive",
    "MSR at equal quality",
)
MEASURES = {"retrieval": Point.retrieval, "needles": Point.needles, "text loss": Point.loss}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the files are, and where tables and pictures go."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a study, as tests/bench/routing.py writes it")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default runs/bench")
    parser.add_argument("--tag", default="routing", metavar="NAME", help="name of the files (default routing)")
    parser.add_argument("--main", metavar="RUN", help="run whose curves and heads are drawn (default the first)")


def run(args: argparse.Namespace, _command: str) -> int:
    """Write records and pictures; print the headline figures."""
    study = read_study(args.folder)
    drawn = study.runs[0] if args.main is None else named(study, args.main)
    found = records(study)
    save(args.out / f"{args.tag}.json", found)
    save_png(quality_figure(study), args.out / f"{args.tag}.png")
    save_png(training_figure(drawn), args.out / f"{args.tag}-curves.png")
    shares = {task: torch.tensor(share) for task, share in drawn.test["routes"].items()}
    save_png(share_figure(shares, f"{drawn.name}: share of held-out inputs on SA"), args.out / f"{args.tag}-heads.png")
    say(table(*headline_cells(found)))
    say(f"\nwrote {args.out / args.tag}.json, .png, -curves.png, -heads.png")
    return 0


def headlines(point: Point, dense: Point) -> dict[str, float]:
    """The figures of one operating point that the study is judged by."""
    msr = point.msr_by_task
    return {
        **{f"{name} of dense": measure(point)[0] / measure(dense)[0] for name, measure in MEASURES.items()},
        "mean MSR": point.mean_msr,
        "MSR robust - sensitive": fmean(msr[t] for t in ROBUST) - fmean(msr[t] for t in SENSITIVE),
    }


def equal_quality(points: Sequence[Point], dense: Point) -> tuple[float | None, bool]:
    """Largest mean MSR within the bounds of equal quality along a run's operating points, straight between them; None
    where every point is worse. And whether the sparsest point is within them, so that the MSR is a lower bound.
    """
    inside = [i for i, point in enumerate(points) if slack(point, dense) >= 0]
    if not inside:
        return None, False
    here = points[inside[-1]]
    if inside[-1] + 1 == len(points):
        return here.mean_msr, True
    beyond = points[inside[-1] + 1]
    near, far = slack(here, dense), slack(beyond, dense)
    return here.mean_msr + (beyond.mean_msr - here.mean_msr) * near / (near - far), False


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the half width of its 95 % interval by Student's t; None for a single seed."""
    half = STUDENT[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return fmean(values), half


def records(study: Study) -> list[Record]:
    """Headlines of every group of seeds, then every operating point, then the scores by source."""
    return [*_headlines(study), *_curve(study), *_by_source(study)]


def _headlines(study: Study) -> Iterator[Record]:
    for (router, objective), runs in study.groups().items():
        for which in ("", CHOSEN):
            points = [run.chosen if which else run.own for run in runs]
            facts = {
                "who": _label(router, objective, which),
                "seeds": [run.seed for run in runs],
                "steps": runs[0].recipe["step"],
                "biases": [point.bias for point in points],
            }
            found = [headlines(point, study.dense) for point in points]
            for name in HEADLINES[:-1]:
                yield _over_seeds(study, name, [of_run[name] for of_run in found], facts)
            if which:
                continue
            reached, open_ended = zip(*(equal_quality(run.points, study.dense) for run in runs), strict=True)
            yield _over_seeds(study, HEADLINES[-1], reached, {**facts, AT_LEAST: any(open_ended)})


def _over_seeds(study: Study, name: str, values: Sequence[float | None], facts: dict[str, Any]) -> Record:
    """Mean and interval, or no value where a seed has none."""
    known = [value for value in values if value is not None]
    mean, half = over_seeds(known) if len(known) == len(values) else (None, None)
    return _record(study.stamp, HEADLINE, name, mean, half=half, by_seed=list(values), **facts)


def _curve(study: Study) -> Iterator[Record]:
    for run in study.runs:
        for point in (*run.baselines, *run.points):
            facts = _facts(run if point.is_elastic else None, point)
            for metric, measure in MEASURES.items():
                (value, half), base = measure(point), measure(study.dense)[0]
                extra = {"of_dense": value / base, "mean_msr": point.mean_msr, "msr": point.msr_by_task}
                yield _record(study.stamp, POINT, metric, value, half=half, **extra, **facts)


def _by_source(study: Study) -> Iterator[Record]:
    for run in study.runs:
        for point in (*run.baselines, run.chosen):
            facts = _facts(run if point.is_elastic else None, point)
            for source, row in point.sources.items():
                value, half = point.value(source, score_of(source))
                extra = {name: point.ratio(row, name) for name in ("msr", "esr_last", "esr_all")}
                yield _record(study.stamp, source, score_of(source), value, half=half, n=row["n"], **extra, **facts)


def quality_figure(study: Study) -> Any:
    """Quality kept against mean MSR: a line per run, baselines as points; a matplotlib `Figure`."""
    dense = study.dense
    panels = []
    for title, measure in MEASURES.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        halves: dict[str, list[float]] = {}
        for name, points in _lines(study).items():
            base = measure(dense)[0]
            lines[name] = [(point.mean_msr, measure(point)[0] / base) for point in points]
            halves[name] = [measure(point)[1] / base for point in points]
        panels.append(Panel(f"{title}, share of dense", lines, "mean MSR", marker="o", halves=halves))
    return panels_figure([panels])


def training_figure(run: Run) -> Any:
    """Objective, MSR, divergence or regulariser, and multipliers over the steps; a matplotlib `Figure`."""
    curves = run.curves()

    def by_task(kind: str, smoothed: bool) -> dict[str, Any]:
        found = {name.removeprefix(f"{kind}/"): line for name, line in curves.items() if name.startswith(f"{kind}/")}
        return {task: smooth(line, 0.9) if smoothed else line for task, line in found.items()}

    quality = run.objective == "quality"
    panels = [
        Panel("objective" if quality else "language loss", {"loss": smooth(curves["loss"], 0.9)}),
        Panel("divergence from dense, nats", by_task("kl", True), yscale="log")
        if quality
        else Panel("regulariser", {"regulariser": smooth(curves["regulariser"], 0.9)}),
        Panel("MSR by task", by_task("msr", True)),
        Panel("multiplier by task", by_task("l" if quality else "l1", False)),
    ]
    return panels_figure([panels])


def headline_cells(found: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per group of runs."""
    shown = [record for record in found if record["case"] == HEADLINE]
    value = {(record["who"], record["metric"]): record for record in shown}
    groups = dict.fromkeys(record["who"] for record in shown)
    rows = []
    for who in groups:
        about = value[who, HEADLINES[0]]
        size = [str(len(about["seeds"])), str(about["steps"]), ", ".join(f"{bias:g}" for bias in about["biases"])]
        rows.append([who, *size, *(_cell(value.get((who, name))) for name in HEADLINES)])
    return ["router, objective", "seeds", "steps", "bias", *HEADLINES], rows


def source_cells(found: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per source, a column per method, seeds averaged: `score ± half @ MSR`."""
    shown = [record for record in found if record["case"] not in (HEADLINE, POINT)]
    cells: dict[tuple[str, str], list[Record]] = {}
    for record in shown:
        cells.setdefault((record["case"], record["method"]), []).append(record)
    methods = list(dict.fromkeys(record["method"] for record in shown))

    def cell(same: Sequence[Record]) -> str:
        value, half, msr = (fmean(record[key] for record in same) for key in ("value", "half", "msr"))
        return f"{value:.3f} ± {half:.3f}" + ("" if same[0]["method"] == "dense" else f" @ {msr:.2f}")

    rows = []
    for source in dict.fromkeys(record["case"] for record in shown):
        here = next(record for record in shown if record["case"] == source)
        rows.append([source, here["metric"], str(here["n"]), *(cell(cells[source, method]) for method in methods)])
    return ["source", "score", "n", *methods], rows


def _facts(run: Run | None, point: Point) -> dict[str, Any]:
    """Who a record is about: a run, or a baseline."""
    if run is None:
        kind, _, number = point.method.partition(":")
        return {"who": point.method, "method": f"{kind}:{number.partition(':')[0]}" if number else kind}
    facts: dict[str, Any] = {
        "who": run.name,
        "method": _label(run.router, run.objective),
        "router": run.router,
    }
    return {**facts, "objective": run.objective, "seed": run.seed, "bias": point.bias}


def _label(router: str, objective: str, which: str = "") -> str:
    return f"{router}, {objective}" + (f", {which}" if which else "")


def _lines(study: Study) -> dict[str, list[Point]]:
    return {**{run.name: run.points for run in study.runs}, **{n: [p] for n, p in study.baselines.items()}}


def _cell(record: Record | None) -> str:
    if record is None:
        return ""
    if record["value"] is None:
        return "not reached"
    return (
        ("≥ " if record.get(AT_LEAST) else "")
        + f"{record['value']:.3f}"
        + ("" if record["half"] is None else f" ± {record['half']:.3f}")
    )


def _record(stamp: dict[str, Any], case: str, metric: str, value: float | None, **facts: Any) -> Record:
    unit = "nats a token" if metric in ("loss", "text loss") else "share"
    return {"case": case, "metric": metric, "value": value, "unit": unit, **facts, **stamp}


def named(study: Study, name: str) -> Run:
    """The run of that name.

    Raises:
        ValueError: there is none.
    """
    found = [run for run in study.runs if run.name == name]
    if not found:
        raise ValueError(f"the study has no run {name!r}; it has {', '.join(run.name for run in study.runs)}")
    return found[0]
