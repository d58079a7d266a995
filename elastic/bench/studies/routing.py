"""`elastic bench routing`: records of trained routers, from the files of a study (`elastic.bench.studies.runs`)."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from elastic.bench import drawing
from elastic.bench.records import Measurement, save
from elastic.bench.studies.bounds import RETRIEVAL
from elastic.bench.studies.leads import paired_cells, paired_records
from elastic.bench.studies.routing_notes import BOUNDS, BY_SOURCE, ROWS
from elastic.bench.studies.routing_tables import (
    AT_LEAST,
    CURVE,
    EQUAL,
    HEADLINE,
    HEADLINES,
    HEADS,
    INSIDE,
    POINT,
    PRICES,
    TRAINING,
    headline_cells,
)
from elastic.bench.studies.runs import FOREIGN, RIVALS, Point, Run, Study, has_rows, read_study, score_of, slack
from elastic.console import say, table
from elastic.data.source_names import kind_of
from elastic.data.tasks import ROBUST, SENSITIVE
from elastic.training.paired import over_seeds

SUMMARY = "what trained routers keep of the dense model's quality, from recorded runs"
UNITS = {**dict.fromkeys(("loss", "text loss", "kl"), "nats a token"), **dict.fromkeys(("regulariser", *PRICES), "")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the files are, and where tables and pictures go."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="a study, as tests/bench/routing.py writes it")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default runs/bench")
    parser.add_argument("--tag", default="routing", metavar="NAME", help="name of the files (default routing)")
    parser.add_argument("--main", metavar="RUN", help="run whose curves and heads are drawn (default the first)")


def run(args: argparse.Namespace, _command: str) -> int:
    """Write records and pictures of each set of rows; print the headline figures."""
    for rows in ("", FOREIGN):
        study = read_study(args.folder, rows) if not rows or has_rows(args.folder, rows) else None
        if study is None:
            say("\nNo run of the study was validated on the foreign set.")
            continue
        say("\nForeign set:\n" if rows else "Rows of the training's kind:\n")
        drawn = study.runs[0] if args.main is None else named(study, args.main)
        _written(study, drawn, args.out / f"{args.tag}{f'-{rows}' * bool(rows)}.json")
    return 0


def _written(study: Study, drawn: Run, path: Path) -> None:
    found = [*records(study), *run_records(study, drawn)]
    save(path, found)
    say(table(*headline_cells(found)))
    header, rows = paired_cells(found)
    say("\n" + table(header, rows) if rows else "\nNo samples_test.jsonl in the study: no paired comparison.")
    say(f"\nwrote {', '.join(map(str, [path, *drawing.draw(path, found)]))}")


def headlines(point: Point, dense: Point) -> dict[str, float]:
    """The figures of one operating point that the study is judged by."""
    kept = point.kept(dense)
    exact = [float(share) for name, share in kept.shares.items() if name != RETRIEVAL]
    sensitive, robust = point.mean_over(SENSITIVE), point.mean_over(ROBUST)
    base, inside = dense.measures(), point.msr_inside_window()
    return {
        **{f"{name} of dense": _of_dense(value, base[name][0]) for name, (value, _) in point.measures().items()},
        **({"worst text loss of dense": max(map(float, kept.losses.values()))} if kept.losses else {}),
        **({"in-context of dense": min(exact)} if exact else {}),
        "mean MSR": point.mean_msr,
        "MSR sensitive": sensitive,
        "MSR robust": robust,
        "MSR robust - sensitive": robust - sensitive,
        **({} if inside is None else {INSIDE: inside}),
    }


def _of_dense(value: float, dense: float) -> float:
    """As a share; a dense model that answers nothing right has nothing to lose."""
    return value / dense if dense else 1.0


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


def records(study: Study) -> list[Measurement]:
    """Headlines of every group of seeds, its operating points, those of every run, the scores by source (of the
    foreign set by kind, lengths and system prompts merged), then what is paired by sample.
    """
    paired = ({**record, **study.stamp} for record in paired_records(study))
    return [*_headlines(study), *_leads(study), *_curves(study), *_points(study), *_by_source(study), *paired]


def _headlines(study: Study) -> Iterator[Measurement]:
    for (router, objective), runs in study.groups().items():
        common = {"who": _label(router, objective), "steps": runs[0].steps}
        reached, open_ended = zip(*(equal_quality(run.points, run.dense) for run in runs), strict=True)
        about = {**common, "seeds": [run.seed for run in runs], "biases": [run.chosen_bias for run in runs]}
        about |= {BOUNDS: BY_SOURCE, **({ROWS: study.rows} if study.rows else {})}
        yield _over_seeds(study, HEADLINE, EQUAL, reached, {**about, AT_LEAST: any(open_ended)})
        tested = [(run.seed, run.tested) for run in runs if run.tested is not None]
        found = [headlines(point, study.dense) for _, point in tested]
        about = {**common, "seeds": [seed for seed, _ in tested], "biases": [point.bias for _, point in tested]}
        for name in HEADLINES:
            if found and name in found[0]:
                yield _over_seeds(study, HEADLINE, name, [of_run[name] for of_run in found], about)


def _leads(study: Study) -> Iterator[Measurement]:
    """By how much more MSR routers keep equal quality than static heads of the same seed, by kinds of both."""
    for (router, objective), group in study.groups().items():
        for kind in RIVALS if router not in RIVALS else ():
            rivals = {run.seed: run for run in study.rivals(kind, objective)}
            runs = [run for run in group if run.seed in rivals]
            if leads := [lead(run, rivals[run.seed]) for run in runs]:
                about = {"who": f"{router} - {kind}, {objective}", "steps": runs[0].steps, "biases": []}
                about |= {"seeds": [run.seed for run in runs], AT_LEAST: any(more for _, more in leads)}
                yield _over_seeds(study, HEADLINE, EQUAL, [value for value, _ in leads], about)


def lead(run: Run, rival: Run) -> tuple[float | None, bool]:
    """Difference of MSR at equal quality, and whether it is a lower bound; None where the rival's is one."""
    (mine, more), (theirs, unknown) = (equal_quality(one.points, one.dense) for one in (run, rival))
    return (None, False) if mine is None or theirs is None or unknown else (mine - theirs, more)


def _curves(study: Study) -> Iterator[Measurement]:
    for (router, objective), runs in study.groups().items():
        for bias, points in _in_common(runs):
            found = [headlines(point, run.dense) for run, point in zip(runs, points, strict=True)]
            about = {"who": _label(router, objective), "seeds": [run.seed for run in runs], "bias": bias}
            for name in (name for name in HEADLINES if name in found[0]):
                yield _over_seeds(study, CURVE, name, [of_run[name] for of_run in found], about)


def _in_common(runs: Sequence[Run]) -> Iterator[tuple[float, list[Point]]]:
    """Biases that all the runs were validated at, and each run's operating point there."""
    for bias in (point.bias for point in runs[0].points):
        points = [point for run in runs if (point := run.at(bias)) is not None]
        if len(points) == len(runs):
            yield bias, points


def run_records(study: Study, run: Run) -> Iterator[Measurement]:
    """What is drawn of one run: scalars over the steps of training on its own rows, and each head's share of held-out
    inputs on SA.
    """
    quality = run.objective == "quality"
    kinds = ("loss", "kl", "msr", *PRICES) if quality else ("loss", "regulariser", "msr", *PRICES)
    curves = {} if run.rows else run.curves()
    for name in (name for kind in kinds for name in curves if name.partition("/")[0] == kind):
        steps, values = zip(*curves[name], strict=True)
        about = {"who": run.name, "steps": [int(step) for step in steps], "values": list(values)}
        yield _record(study.stamp, TRAINING, name, values[-1], **about)
    for task, share in run.validation["routes"].items():
        mean = fmean(value for layer in share for value in layer)
        about = {"who": run.name, "task": task, "by_layer": share}
        yield _record(study.stamp, HEADS, "share of inputs on SA", mean, **about)


def _over_seeds(
    study: Study, case: str, name: str, values: Sequence[float | None], about: dict[str, Any]
) -> Measurement:
    """Mean and interval, or no value where a seed has none."""
    known = [value for value in values if value is not None]
    mean, half = over_seeds(known) if len(known) == len(values) else (None, None)
    return _record(study.stamp, case, name, mean, half=half, by_seed=list(values), **about)


def _points(study: Study) -> Iterator[Measurement]:
    points: list[tuple[Run | None, Point, Point]]
    points = [(None, point, study.dense) for point in study.baselines.values()]
    points += [(one, point, one.dense) for one in study.runs for point in one.points]
    for run, point, dense in points:
        for metric, (value, half) in point.measures().items():
            extra = {
                "of_dense": _of_dense(value, dense.measures()[metric][0]),
                "mean_msr": point.mean_msr,
                "msr": point.msr_by_task,
            }
            yield _record(study.stamp, POINT, metric, value, half=half, **extra, **_about(run, point))


def _by_source(study: Study) -> Iterator[Measurement]:
    points: list[tuple[Run | None, Point]] = [(None, point) for point in study.baselines.values()]
    points += [(one, one.tested) for one in study.runs if one.tested is not None]
    for run, point in points:
        groups: dict[str, list[str]] = {}
        for source in point.sources:
            groups.setdefault(kind_of(source) if study.rows else source, []).append(source)
        for name, sources in groups.items():
            about = {**_merged(point, sources), **_about(run, point)}
            score = score_of(sources[0], point.known)
            yield _record(study.stamp, name, score, about.pop("value"), half=about.pop("half"), **about)


def _merged(point: Point, sources: Sequence[str]) -> dict[str, Any]:
    """Score, ratios and number of samples of sources, each of the same weight."""
    values, halves = zip(*(point.value(of, score_of(of, point.known)) for of in sources), strict=True)
    found = {
        name: fmean(point.ratio(point.sources[of], name) for of in sources) for name in ("msr", "esr_last", "esr_all")
    }
    half = sum(half**2 for half in halves) ** 0.5 / len(halves)
    return {**found, "value": fmean(values), "half": half, "n": sum(int(point.sources[of]["n"]) for of in sources)}


def _about(run: Run | None, point: Point) -> dict[str, Any]:
    """Who a record is about: a run, or a baseline."""
    if run is None:
        return {"who": point.method, "method": replace(point.parsed, seed=0).name}  # seeds are averaged
    about: dict[str, Any] = {
        "who": run.name,
        "method": _label(run.router, run.objective),
        "router": run.router,
    }
    return {**about, "objective": run.objective, "seed": run.seed, "bias": point.bias}


def _label(router: str, objective: str) -> str:
    return f"{router}, {objective}"


def _record(stamp: dict[str, Any], case: str, metric: str, value: float | None, **about: Any) -> Measurement:
    unit = UNITS.get(metric.partition("/")[0], "share")
    return {"case": case, "metric": metric, "value": value, "unit": unit, **about, **stamp}


def named(study: Study, name: str) -> Run:
    """The run of that name.

    Raises:
        ValueError: there is none.
    """
    found = [run for run in study.runs if run.name == name]
    if not found:
        raise ValueError(f"the study has no run {name!r}; it has {', '.join(run.name for run in study.runs)}")
    return found[0]
