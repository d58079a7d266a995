"""Tables and pictures of trained routers, from the records of `elastic bench routing`."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch

from elastic.bench.records import Measurement
from elastic.plots import Curve, Panel, in_rows, panels_figure, share_figure, smooth

# Cases of records that are about no single source.
HEADLINE, CURVE, POINT, TRAINING, HEADS, PAIRED = "headline", "curve", "point", "training", "heads", "paired"
AT_LEAST = "at_least"  # in records of MSR at equal quality: some seed's sparsest point is of equal quality still
EQUAL, INSIDE = "MSR at equal quality", "MSR inside the window"
HEADLINES = (
    *("retrieval of dense", "needles of dense", "text loss of dense"),
    *("worst text loss of dense", "in-context of dense", "mean MSR", "MSR sensitive", "MSR robust"),
    *("MSR robust - sensitive", INSIDE),
)
DRAWN = ("retrieval", "needles", "text loss")  # scores that `quality_figure` draws as shares of the dense model's
TRAINED = {  # panels of `training_figure`: kind of scalar -> title, whether it is smoothed
    "loss": ("loss", True),
    "regulariser": ("regulariser", True),
    "kl": ("divergence from dense, nats", True),
    "msr": ("MSR by task", True),
    "u": ("multiplier u (MSR too high)", False),
    "v": ("multiplier v (MSR too low)", False),
    "l": ("multiplier by task", False),
    "l1": ("multiplier by task", False),  # of runs from before there was one for each bound
}
PRICES = ("u", "v", "l", "l1")


def figures(found: Sequence[Measurement]) -> dict[str, Any]:
    """Pictures by the ending of their file's name: quality against MSR, and of one run how it trained and which heads
    its held-out inputs ran SA on; those that the records tell of.
    """
    made = {"": quality_figure(found)}
    if training := [record for record in found if record["case"] == TRAINING]:
        made["-curves"] = training_figure(training)
    if heads := [record for record in found if record["case"] == HEADS]:
        shares = {record["task"]: torch.tensor(record["by_layer"]) for record in heads}
        made["-heads"] = share_figure(shares, f"{heads[0]['who']}, bias 0: share of held-out inputs on SA")
    return made


def quality_figure(found: Sequence[Measurement]) -> Any:
    """Quality kept against mean MSR, a row for each objective: means and intervals over seeds, a line for each kind of
    router (validation rows); baselines as points (test rows). A matplotlib `Figure`.
    """
    curves = {(r["who"], r["bias"], r["metric"]): r for r in found if r["case"] == CURVE}
    baselines = [r for r in found if r["case"] == POINT and "bias" not in r]
    rows = []
    for objective in dict.fromkeys(who.partition(", ")[2] for who, _, _ in curves):
        row = []
        for name in DRAWN:
            lines: dict[str, list[tuple[float, float]]] = {}
            halves: dict[str, list[float]] = {}
            for (who, bias, metric), record in curves.items():
                router, _, of = who.partition(", ")
                if of == objective and metric == f"{name} of dense":
                    lines.setdefault(router, []).append((curves[who, bias, "mean MSR"]["value"], record["value"]))
                    halves.setdefault(router, []).append(record["half"] or 0.0)
            for record in baselines:
                if record["metric"] == name:
                    lines.setdefault(record["method"], []).append((record["mean_msr"], record["of_dense"]))
                    halves.setdefault(record["method"], []).append(_relative_half(record))
            title = f"{name}, {objective} objective"
            row.append(Panel(title, lines, "mean MSR", "share of dense", marker="o", halves=halves))
        rows.append(row)
    return panels_figure(rows)


def _relative_half(record: Measurement) -> float:
    """Half width of a score's interval as a share of the dense score; none where the score is 0."""
    return record["half"] * record["of_dense"] / record["value"] if record["value"] else 0.0


def training_figure(found: Sequence[Measurement]) -> Any:
    """Objective, MSR, divergence or regulariser, and multipliers of a run over its steps, a line for each task; a
    matplotlib `Figure`.
    """
    panels: dict[str, dict[str, Curve]] = {}
    for record in found:
        kind, _, task = record["metric"].partition("/")
        points = list(zip(record["steps"], record["values"], strict=True))
        panels.setdefault(kind, {})[task or kind] = smooth(points, 0.9) if TRAINED[kind][1] else points
    drawn = [
        Panel(TRAINED[kind][0], lines, yscale="log" if kind == "kl" else "linear") for kind, lines in panels.items()
    ]
    return panels_figure(in_rows(drawn))


def headline_names(found: Sequence[Measurement]) -> list[str]:
    """Figures that operating points are judged by, those that the records have, in their order."""
    return list(dict.fromkeys(record["metric"] for record in found if record["case"] == CURVE))


def headline_cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per group of runs."""
    value = {(record["who"], record["metric"]): record for record in found if record["case"] == HEADLINE}
    names, rows = headline_names(found), []
    for who in dict.fromkeys(who for who, _ in value):
        equal, tested = value[who, EQUAL], value.get((who, HEADLINES[0]))
        size = [str(len(equal["seeds"])), str(equal["steps"]), _cell(equal), _listed(equal["biases"])]
        size.append("" if tested is None else str(len(tested["seeds"])))
        rows.append([who, *size, *(_cell(value.get((who, name))) for name in names)])
    return ["router, objective", "seeds", "steps", EQUAL, "bias chosen", "seeds tested", *names], rows


def curve_cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per group of runs and operating point."""
    value = {(r["who"], r["bias"], r["metric"]): r for r in found if r["case"] == CURVE}
    lines = dict.fromkeys((who, bias) for who, bias, _ in value)
    names = headline_names(found)
    rows = [[who, f"{bias:g}", *(_cell(value[who, bias, name]) for name in names)] for who, bias in lines]
    return ["router, objective", "bias", *names], rows


def source_cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per source, a column per method, seeds averaged: `score ± half @ MSR`."""
    shown = [record for record in found if record["case"] not in (HEADLINE, CURVE, POINT, TRAINING, HEADS, PAIRED)]
    cells: dict[tuple[str, str], list[Measurement]] = {}
    for record in shown:
        cells.setdefault((record["case"], record["method"]), []).append(record)
    methods = list(dict.fromkeys(record["method"] for record in shown))

    def cell(same: Sequence[Measurement]) -> str:
        value, half, msr = (fmean(record[key] for record in same) for key in ("value", "half", "msr"))
        return f"{value:.3f} ± {half:.3f}" + ("" if same[0]["method"] == "dense" else f" @ {msr:.2f}")

    rows = []
    for source in dict.fromkeys(record["case"] for record in shown):
        here = next(record for record in shown if record["case"] == source)
        rows.append([source, here["metric"], str(here["n"]), *(cell(cells[source, method]) for method in methods)])
    return ["source", "score", "n", *methods], rows


def _listed(biases: Sequence[float]) -> str:
    return ", ".join(f"{bias:g}" for bias in biases)


def _cell(record: Measurement | None) -> str:
    if record is None:
        return ""
    if record["value"] is None:
        return "not reached"
    return (
        ("≥ " if record.get(AT_LEAST) else "")
        + f"{record['value']:.3f}"
        + ("" if record["half"] is None else f" ± {record['half']:.3f}")
    )
