"""Table and picture of `elastic bench e2e`."""

from collections.abc import Sequence
from typing import Any

from elastic.bench.records import LEFT_OUT, Measurement
from elastic.console import table
from elastic.plots import Panel, in_rows, panels_figure, token_ticks

FIRST_TOKEN, OUT_OF_MEMORY = "first token", "out of memory"
DECODE = ("decode", "decode graph")
SPENT = ("attention", "router", "rest")
BESIDE = ("rest over products", "share of bandwidth")  # beside what the machine allows
METRICS = (FIRST_TOKEN, *DECODE, "KV cache", "peak memory", *SPENT, *BESIDE)

PANELS = {  # metric -> title, unit, scale
    FIRST_TOKEN: ("time to the first token", "s", 1e-3),
    "decode graph": ("decode as a CUDA graph", "tokens/s", 1.0),
    "decode": ("decode", "tokens/s", 1.0),
    "attention": ("attention, of the first token", "s", 1e-3),
    "KV cache": ("KV cache", "GB", 1e-9),
    "peak memory": ("peak memory", "GB", 1e-9),
}


def e2e_cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per shape, length and contestant, with the factor over the best stock model, of tokens a
    second over its best way to decode, as a CUDA graph or not. Below 1 the stock model is faster.
    """
    header = ["case", "first token s", "x dense", "decode tok/s", "with graph", "best x dense", "KV GB", "of dense",
              "peak GB", "attention s", "router s", "rest s", "rest x products", "of bandwidth"]  # fmt: skip
    rows = []
    for key in dict.fromkeys(map(_key, found)):
        shape, length, who, msr = key
        mine = _values(found, *key)
        name = f"{shape} {_size(length)} {who}" + ("" if msr is None else f" MSR {msr:.2f}")
        if LEFT_OUT in mine:
            why = next(r["why"] for r in found if r["metric"] == LEFT_OUT and _key(r) == key)
            short = OUT_OF_MEMORY if why.startswith(OUT_OF_MEMORY) else LEFT_OUT
            rows.append([name, short, *[""] * (len(header) - 2)])
            continue
        dense = _dense(found, shape, length)
        cells = [f"{mine['first token'] / 1e3:.3f}", _ratio(dense.get("first token"), mine["first token"])]
        cells += [f"{mine[way]:.1f}" if way in mine else "" for way in DECODE]
        cells.append(_ratio(_best_rate(mine), _best_rate(dense)))
        cells += [f"{mine['KV cache'] / 1e9:.3f}", _ratio(mine["KV cache"], dense.get("KV cache"), 3)]
        cells += [f"{mine['peak memory'] / 1e9:.1f}", *(f"{mine[p] / 1e3:.3f}" if p in mine else "" for p in SPENT)]
        cells += [f"{mine[p]:.2f}" if p in mine else "" for p in BESIDE]
        rows.append([name, *cells])
    return header, rows


def e2e_table(found: Sequence[Measurement]) -> str:
    """Table for the terminal."""
    return table(*e2e_cells(found))


def e2e_figure(found: Sequence[Measurement]) -> Any:
    """Two panels a row for each shape: times, decoded tokens a second and memory against length, by MSR."""
    rows: list[Sequence[Panel]] = []
    for shape in dict.fromkeys(r["shape"] for r in found):
        of_shape = [r for r in found if r["shape"] == shape and r["value"]]
        of_shape.sort(key=lambda r: (-1 if r["msr"] is None else r["msr"], r["length"]))  # the stock model first
        ticks = token_ticks(sorted({r["length"] for r in of_shape}))
        panels = []
        for metric, (title, unit, scale) in PANELS.items():
            lines: dict[str, list[tuple[float, float]]] = {}
            for r in (r for r in of_shape if r["metric"] == metric):
                who = r["who"] if r["msr"] is None else f"{r['who']} MSR {r['msr']:.2f}"
                lines.setdefault(who, []).append((r["length"], r["value"] * scale))
            if lines:
                panels.append(Panel(f"{shape}: {title}", lines, "tokens", unit, "log", "log", ticks))
        rows += in_rows(panels)
    return panels_figure(rows)


def _dense(found: Sequence[Measurement], shape: str, length: int) -> dict[str, float]:
    """The best figure of any stock model, which the others are compared with: the least, of rates the greatest."""
    best: dict[str, float] = {}
    for r in found:
        if (r["shape"], r["length"], r["msr"]) == (shape, length, None) and r["value"] is not None:
            pick = max if r["unit"] == "tokens/s" else min
            best[r["metric"]] = pick(r["value"], best.get(r["metric"], r["value"]))
    return best


def _values(found: Sequence[Measurement], shape: str, length: int, who: str, msr: float | None) -> dict[str, Any]:
    wanted = (shape, length, who, msr)
    return {
        r["metric"]: r["value"]
        for r in found
        if _key(r) == wanted and (r["value"] is not None or r["metric"] == LEFT_OUT)
    }


def _key(record: Measurement) -> tuple[str, int, str, float | None]:
    return record["shape"], record["length"], record["who"], record["msr"]


def _best_rate(values: dict[str, Any]) -> float | None:
    """Tokens a second of the fastest way to decode."""
    return max((values[way] for way in DECODE if way in values), default=None)


def _ratio(one: float | None, other: float | None, digits: int = 2) -> str:
    return f"{one / other:.{digits}f}" if one is not None and other else ""


def _size(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
