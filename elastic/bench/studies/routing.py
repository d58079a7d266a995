"""`elastic bench routing`: tables and pictures of trained routers, from the files of a study
(`elastic.bench.studies.runs`)."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from elastic.bench.records import Record, save
from elastic.bench.studies.runs import CHOSEN, KEPT, RISE, Point, Run, Study, read_study, score_of, slack
from elastic.console import say, table
from elastic.data.tasks import ROBUST, SENSITIVE
from elastic.plots import Panel, panels_figure, save_png, share_figure, smooth

SUMMARY = "what trained routers keep of the dense model's quality, from recorded runs"
HEADLINE, CURVE, POINT = "headline", "curve", "point"  # cases of records that are about no single source
AT_LEAST = "at_least"  # in records of MSR at equal quality: some seed's sparsest point is of equal quality still
NOTES = f"""Answers teacher-forced on held-out samples (other seeds, wording and texts than in training); exact: all
answer tokens right, which is what greedy decoding would give. Retrieval: mean of the exact and accuracy rows but
many_shot; text loss: mean of the loss rows. ± half a 95 % interval: over seeds by Student's t in the first two tables,
over samples in the third, where seeds are averaged.

Validation rows: every operating point (second table), and MSR at equal quality: the largest mean MSR that keeps
{KEPT:.0%} of dense retrieval and loses at most {RISE:.0%} on text, by straight lines between a run's points; ≥ where
a seed's sparsest point is of equal quality still; `elastic - static` pairs seeds. They choose `sparsity_bias`: the
sparsest that keeps {CHOSEN:.0%} of dense retrieval at that loss, or the best where none does. Test rows, which had no
part in choosing: the chosen points, other columns of the first table and in the third. Empty cells: not measured."""
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # two-sided 95 % quantiles by number of seeds
EQUAL = "MSR at equal quality"
HEADLINES = ("retrieval of dense", "needles of dense", "text loss of dense", "mean MSR", "MSR robust - sensitive")
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
    shares = {task: torch.tensor(share) for task, share in drawn.validation["routes"].items()}
    title = f"{drawn.name}, bias 0: share of held-out inputs on SA"
    save_png(share_figure(shares, title), args.out / f"{args.tag}-heads.png")
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
    """Headlines of every group of seeds, its operating points, those of every run, then the scores by source."""
    return [*_headlines(study), *_leads(study), *_curves(study), *_points(study), *_by_source(study)]


def _headlines(study: Study) -> Iterator[Record]:
    for (router, objective), runs in study.groups().items():
        facts = {"who": _label(router, objective), "steps": runs[0].recipe["step"]}
        reached, open_ended = zip(*(equal_quality(run.points, run.dense) for run in runs), strict=True)
        about = {**facts, "seeds": [run.seed for run in runs], "biases": [run.chosen_bias for run in runs]}
        yield _over_seeds(study, HEADLINE, EQUAL, reached, {**about, AT_LEAST: any(open_ended)})
        tested = [(run.seed, run.tested) for run in runs if run.tested is not None]
        found = [headlines(point, study.dense) for _, point in tested]
        about = {**facts, "seeds": [seed for seed, _ in tested], "biases": [point.bias for _, point in tested]}
        for name in HEADLINES if tested else ():
            yield _over_seeds(study, HEADLINE, name, [of_run[name] for of_run in found], about)


def _leads(study: Study) -> Iterator[Record]:
    """By how much more MSR elastic runs keep equal quality than the static runs of the same objective and seed."""
    for objective in dict.fromkeys(run.objective for run in study.runs):
        rivals = {run.seed: run for run in study.group("static", objective)}
        runs = [run for run in study.group("elastic", objective) if run.seed in rivals]
        if leads := [lead(run, rivals[run.seed]) for run in runs]:
            facts = {"who": f"elastic - static, {objective}", "steps": runs[0].recipe["step"], "biases": []}
            facts |= {"seeds": [run.seed for run in runs], AT_LEAST: any(more for _, more in leads)}
            yield _over_seeds(study, HEADLINE, EQUAL, [value for value, _ in leads], facts)


def lead(run: Run, rival: Run) -> tuple[float | None, bool]:
    """Difference of MSR at equal quality, and whether it is a lower bound; None where the rival's is one."""
    (mine, more), (theirs, unknown) = (equal_quality(one.points, one.dense) for one in (run, rival))
    return (None, False) if mine is None or theirs is None or unknown else (mine - theirs, more)


def _curves(study: Study) -> Iterator[Record]:
    for (router, objective), runs in study.groups().items():
        for bias, points in _in_common(runs):
            found = [headlines(point, run.dense) for run, point in zip(runs, points, strict=True)]
            facts = {"who": _label(router, objective), "seeds": [run.seed for run in runs], "bias": bias}
            for name in HEADLINES:
                yield _over_seeds(study, CURVE, name, [of_run[name] for of_run in found], facts)


def _in_common(runs: Sequence[Run]) -> Iterator[tuple[float, list[Point]]]:
    """Biases that all the runs were validated at, and each run's operating point there."""
    for bias in (point.bias for point in runs[0].points):
        points = [point for run in runs if (point := run.at(bias)) is not None]
        if len(points) == len(runs):
            yield bias, points


def _over_seeds(study: Study, case: str, name: str, values: Sequence[float | None], facts: dict[str, Any]) -> Record:
    """Mean and interval, or no value where a seed has none."""
    known = [value for value in values if value is not None]
    mean, half = over_seeds(known) if len(known) == len(values) else (None, None)
    return _record(study.stamp, case, name, mean, half=half, by_seed=list(values), **facts)


def _points(study: Study) -> Iterator[Record]:
    points: list[tuple[Run | None, Point, Point]]
    points = [(None, point, study.dense) for point in study.baselines.values()]
    points += [(one, point, one.dense) for one in study.runs for point in one.points]
    for run, point, dense in points:
        for metric, measure in MEASURES.items():
            (value, half), base = measure(point), measure(dense)[0]
            extra = {"of_dense": value / base, "mean_msr": point.mean_msr, "msr": point.msr_by_task}
            yield _record(study.stamp, POINT, metric, value, half=half, **extra, **_facts(run, point))


def _by_source(study: Study) -> Iterator[Record]:
    points: list[tuple[Run | None, Point]] = [(None, point) for point in study.baselines.values()]
    points += [(one, one.tested) for one in study.runs if one.tested is not None]
    for run, point in points:
        for source, row in point.sources.items():
            value, half = point.value(source, score_of(source))
            extra = {name: point.ratio(row, name) for name in ("msr", "esr_last", "esr_all")}
            facts = {**extra, **_facts(run, point)}
            yield _record(study.stamp, source, score_of(source), value, half=half, n=row["n"], **facts)


def quality_figure(study: Study) -> Any:
    """Quality kept against mean MSR, means and intervals over seeds: a line per group of runs (validation rows);
    baselines as points (test rows); a matplotlib `Figure`.
    """
    panels = []
    for title, measure in MEASURES.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        halves: dict[str, list[float]] = {}
        for group, runs in study.groups().items():
            name, bases = _label(*group), [measure(run.dense)[0] for run in runs]
            for _, points in _in_common(runs):
                kept = [measure(point)[0] / base for point, base in zip(points, bases, strict=True)]
                value, half = over_seeds(kept)
                lines.setdefault(name, []).append((fmean(point.mean_msr for point in points), value))
                halves.setdefault(name, []).append(half or 0.0)
        for name, point in study.baselines.items():
            base = measure(study.dense)[0]
            lines[name], halves[name] = [(point.mean_msr, measure(point)[0] / base)], [measure(point)[1] / base]
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
    value = {(record["who"], record["metric"]): record for record in found if record["case"] == HEADLINE}
    rows = []
    for who in dict.fromkeys(who for who, _ in value):
        equal, tested = value[who, EQUAL], value.get((who, HEADLINES[0]))
        size = [str(len(equal["seeds"])), str(equal["steps"]), _cell(equal), _listed(equal["biases"])]
        size.append("" if tested is None else str(len(tested["seeds"])))
        rows.append([who, *size, *(_cell(value.get((who, name))) for name in HEADLINES)])
    return ["router, objective", "seeds", "steps", EQUAL, "bias chosen", "seeds tested", *HEADLINES], rows


def curve_cells(found: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per group of runs and operating point."""
    value = {(r["who"], r["bias"], r["metric"]): r for r in found if r["case"] == CURVE}
    lines = dict.fromkeys((who, bias) for who, bias, _ in value)
    rows = [[who, f"{bias:g}", *(_cell(value[who, bias, name]) for name in HEADLINES)] for who, bias in lines]
    return ["router, objective", "bias", *HEADLINES], rows


def source_cells(found: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per source, a column per method, seeds averaged: `score ± half @ MSR`."""
    shown = [record for record in found if record["case"] not in (HEADLINE, CURVE, POINT)]
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


def _label(router: str, objective: str) -> str:
    return f"{router}, {objective}"


def _listed(biases: Sequence[float]) -> str:
    return ", ".join(f"{bias:g}" for bias in biases)


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
