"""Table and picture of time and quality (`elastic.bench.studies.pareto`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic.bench.records import Measurement
from elastic.plots import Panel, in_rows, panels_figure
from elastic.routing.methods import family_of, parse_method

KEPT, UNTIMED, FRONT = "quality kept", "not timed", "best for its time"
NOTES = """Score as a share of the dense model's on the same samples, with its 95 % paired bootstrap interval, and the
time that a prompt of another, larger shape would take at the density that the method has on these rows: rest, router
and attention by `elastic bench e2e`, choice of key blocks and attention to them by `elastic bench selection`. A * marks
what no other method beats in both."""


def front(found: Sequence[Measurement]) -> list[Measurement]:
    """Of the records of one set and length, those that no other beats in time and quality, by rising time."""
    best: list[Measurement] = []
    for record in sorted(found, key=lambda r: (r["seconds"], -r["value"])):
        if not best or record["value"] > best[-1]["value"]:
            best.append(record)
    return best


def cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line for every set, length and method, by rising time; where times are of several shapes or
    lengths, with which.
    """
    several = len({(r["shape"], r["timed_length"]) for mine in _by_case(found).values() for r in mine}) > 1
    header = ["set", "tokens", "method", "n", "MSR", "density", "prefill s", "x dense", "quality kept", "timed as"]
    rows = []
    for mine in _by_case(found).values():
        best = {record["who"] for record in front(mine)}
        for r in sorted(mine, key=lambda r: r["seconds"]):
            kept = f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}]{'*' * (r['who'] in best)}"
            speed = f"{r['dense_seconds'] / r['seconds']:.2f}"
            about = [r["set"], str(r["length"]), r["who"], str(r["n"]), f"{r['msr']:.2f}", f"{r['density']:.3f}"]
            timed_as = f"{r['timed_as']}, {r['shape']} at {r['timed_length']}" if several else r["timed_as"]
            rows.append([*about, f"{r['seconds']:.3f}", speed, kept, timed_as])
    return header, rows


def reasons(found: Sequence[Measurement]) -> list[str]:
    """Why methods have no time."""
    return [f"{r['who']}, {r['case']}: {r['why']}" for r in found if r["metric"] == UNTIMED]


def figure(found: Sequence[Measurement]) -> Any:
    """A panel for every set and length: quality kept against prefill time, the operating points of a method joined, and
    the line of those that nothing beats. A matplotlib `Figure`.
    """
    panels = []
    for mine in _by_case(found).values():
        lines: dict[str, list[Measurement]] = {FRONT: front(mine)}  # first, so that the others are drawn over it
        for record in sorted(mine, key=lambda r: r["seconds"]):
            lines.setdefault(_short(record["who"]), []).append(record)
        halves = {name: [(r["high"] - r["low"]) / 2 * (name != FRONT) for r in of] for name, of in lines.items()}
        points = {name: [(r["seconds"], r["value"]) for r in of] for name, of in lines.items()}
        first = mine[0]
        title = f"{first['set']}, {first['length']} tokens"
        time = f"prefill of {first['timed_length']} tokens, {first['shape']}, s"
        panels.append(Panel(title, points, time, "score, share of dense", marker="o", halves=halves))
    return panels_figure(in_rows(panels))


def _short(who: str) -> str:
    """A method without its numbers and the folder of its file."""
    kind, _, file = family_of(parse_method(who)).partition(":")
    return f"{kind}:{Path(file).name}" if file else kind


def _by_case(found: Sequence[Measurement]) -> dict[tuple[Any, ...], list[Measurement]]:
    """Those of one set and length whose times are of one shape and length."""
    cases: dict[tuple[Any, ...], list[Measurement]] = {}
    for record in found:
        if record["metric"] == KEPT:
            cases.setdefault((record["case"], record["shape"], record["timed_length"]), []).append(record)
    return cases
