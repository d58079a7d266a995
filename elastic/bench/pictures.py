"""The picture of a run: speed against length for each MSR, and the speed-up against MSR."""

from collections.abc import Mapping, Sequence
from typing import Any

from elastic.bench.records import Measurement
from elastic.plots import Panel, in_rows, panels_figure, token_ticks

BASELINE = ("cudnn", "ours")  # dense contestants that a speed-up may refer to, the first that was timed


def curves(found: Sequence[Measurement], metric: str, x: str, **where: Any) -> dict[str, list[tuple[float, float]]]:
    """{contestant: [(x, value), ...]} of the records with this metric and these fields, by rising x."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in found:
        if record["metric"] == metric and all(record.get(name) == value for name, value in where.items()):
            lines.setdefault(record["who"], []).append((record[x], record["value"]))
    return {who: sorted(points) for who, points in lines.items()}


def speedups(found: Sequence[Measurement], length: int) -> tuple[str, dict[str, list[tuple[float, float]]]]:
    """Whose dense time is the baseline, and {contestant: [(MSR, baseline time / its time), ...]} at a length.

    Contestants that run dense attention only are left out. Without a dense timing the curves are empty.
    """
    of_length = [r for r in found if r.get("length") == length and r.get("msr") is not None]
    dense = {r["who"]: r["value"] for r in of_length if r["metric"] == "time" and r["msr"] == 0}
    baseline = next((who for who in BASELINE if who in dense), None)
    if baseline is None:
        return "", {}
    times = curves(of_length, "time", "msr")
    sparse = {who: points for who, points in times.items() if any(msr > 0 for msr, _ in points)}
    return baseline, {who: [(msr, dense[baseline] / ms) for msr, ms in points] for who, points in sparse.items()}


def attention_figure(found: Sequence[Measurement]) -> Any:
    """Speed against length, a panel per MSR, then the speed-up against MSR, a panel per length; a matplotlib `Figure`.

    Raises:
        ValueError: no speeds with a length and an MSR.
    """
    timed = [r for r in found if r["metric"] in ("time", "eff") and r.get("msr") is not None]
    unit = next((r["unit"] for r in timed if r["metric"] == "eff"), None)
    if unit is None:
        raise ValueError("no speeds with a length and an MSR to draw; expected records of `elastic bench attention`")
    ratios, lengths = (sorted({r[name] for r in timed}) for name in ("msr", "length"))
    ticks = token_ticks(lengths)
    panels = [
        Panel(f"speed at MSR {msr:g}", curves(timed, "eff", "length", msr=msr), "tokens", unit, "log", xticks=ticks)
        for msr in ratios
    ]
    panels += _speedup_panels(timed, lengths[-len(ratios) :], ticks)
    return panels_figure(in_rows(panels, 3 if len(ratios) == 3 else 2))


def _speedup_panels(timed: Sequence[Measurement], lengths: Sequence[int], names: Mapping[float, str]) -> list[Panel]:
    panels = []
    for length in lengths:
        baseline, lines = speedups(timed, length)
        if lines:
            ticks = {msr: f"{msr:g}" for points in lines.values() for msr, _ in points}
            title = f"speed-up at {names[length]} tokens"
            panels.append(Panel(title, lines, "MSR", f"times dense {baseline}", yscale="log", xticks=ticks))
    return panels
