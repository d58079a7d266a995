"""Pictures shared by the demo, the reports and the TensorBoard callback. matplotlib is imported on first use, without
pyplot, so no global state and no display is touched.

Legend: L layers, K KV heads.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.files import new_file

Curve = Sequence[tuple[float, float]]
WIDTH = 9.0  # inches of a picture: at the 900 pixels that GitHub shows, text of 9 points is 12 pixels high
LEGEND = 105  # letters in a line of a legend of that width, 7 for each line's sample


def share_figure(shares: Mapping[str, Tensor], title: str = "") -> Any:
    """Heatmaps of how often each KV head runs SA, one panel per task; a matplotlib `Figure`.

    Args:
        shares: {task: [L, K]} with values in [0, 1].
        title: above all panels.

    Raises:
        ValueError: nothing to draw, or a tensor that is not [L, K] in [0, 1].
    """
    if not shares:
        raise ValueError("no routes to draw; expected at least one task with a tensor [layers, KV heads]")
    for name, share in shares.items():
        if share.dim() != 2 or not bool(((share >= 0) & (share <= 1)).all()):
            raise ValueError(
                f"SA share of {name!r} has shape {list(share.shape)}; expected [layers, KV heads] with values in [0, 1]"
            )
    layers, heads = next(iter(shares.values())).shape
    height = 0.9 + len(shares) * max(0.55, 0.11 * heads + 0.35)
    figure = _figure(max(5.0, min(12.0, 2.0 + 0.22 * layers)), height)
    axes = figure.subplots(len(shares), 1, sharex=True, squeeze=False)[:, 0]
    image = None
    for axis, (name, share) in zip(axes, shares.items(), strict=True):
        image = axis.imshow(share.float().cpu().T.numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set_yticks(range(heads) if heads <= 4 else [0, heads - 1])
        axis.tick_params(labelsize=8)
        axis.set_title(f"MSR {float(share.float().mean()):.2f}", fontsize=9, loc="right", pad=2)
    axes[-1].set_xlabel("layer (rows of a panel: KV heads)", fontsize=9)
    axes[-1].locator_params(axis="x", integer=True)
    figure.colorbar(image, ax=list(axes), label="share of inputs on SA", fraction=0.03, pad=0.02)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def route_figure(route_LK: Tensor, title: str = "") -> Any:
    """Heatmap of one sample's decisions [L, K] in {0, 1}; a matplotlib `Figure`."""
    return share_figure({"KV head": route_LK.float()}, title)


@dataclass(frozen=True)
class Panel:
    """One set of axes with a line per label; scales are matplotlib's names, `xticks` {position: text}, `halves` half
    widths of the intervals around the points of a line.
    """

    title: str
    lines: Mapping[str, Curve]
    xlabel: str = "step"
    ylabel: str = ""
    xscale: str = "linear"
    yscale: str = "linear"
    xticks: Mapping[float, str] | None = None
    marker: str = ""
    halves: Mapping[str, Sequence[float]] | None = None


def in_rows(panels: Sequence[Panel], columns: int = 2) -> list[Sequence[Panel]]:
    """Panels in rows of so many, for `panels_figure`."""
    return [panels[start : start + columns] for start in range(0, len(panels), columns)]


def token_ticks(lengths: Sequence[int]) -> dict[float, str]:
    """Positions and texts of an axis of lengths in tokens, such as `8K`."""
    return {length: f"{length // 1024}K" if length % 1024 == 0 else str(length) for length in lengths}


def panels_figure(rows: Sequence[Sequence[Panel]]) -> Any:
    """Line plots in rows, `WIDTH` inches wide; a label has one colour in all panels and is named above them. A
    matplotlib `Figure`.

    Raises:
        ValueError: no panel.
    """
    panels = [panel for row in rows for panel in row]
    if not panels:
        raise ValueError("no curves to draw; expected at least one panel")
    columns = max(map(len, rows))
    figure = _figure(max(WIDTH, 2.8 * columns), 2.6 * len(rows) + 0.4)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    named: dict[str, Any] = {}
    for axes, row in zip(grid, rows, strict=True):
        for axis, panel in zip(axes, row, strict=False):
            drawn = _draw(axis, panel, labels)
            if len(panel.lines) > 1:  # the title names a single line
                named = {**drawn, **named}
        for axis in axes[len(row) :]:
            axis.set_visible(False)
    if named:
        shown = [label for label in labels if label in named]
        places = {"loc": "outside upper center", "ncols": _columns(shown), "frameon": False}
        figure.legend([named[label] for label in shown], shown, fontsize=10, **places)
    return figure


def _columns(labels: Sequence[str]) -> int:
    """Columns of a legend of these labels: as many as fit, at least one."""
    import numpy as np

    for columns in range(len(labels), 1, -1):
        if sum(max(map(len, one)) + 7 for one in np.array_split(labels, columns)) <= LEGEND:  # as matplotlib fills them
            return columns
    return 1


def need_figure(need_LK: Sequence[Sequence[float]], curves: Mapping[str, Curve], title: str = "") -> Any:
    """A calibration: need of each KV head as a heatmap, and below it what following the order costs by level; a
    matplotlib `Figure`.

    Args:
        need_LK: [L][K], nats per answer token; what is below 0 is drawn as 0.
        curves: (MSR, KL) points by name of what they are the mean over.
        title: above the heatmap.
    """
    from matplotlib.colors import PowerNorm

    heads, need = len(need_LK[0]), torch.tensor(need_LK).clamp_min(0.0)
    figure = _figure(WIDTH, 3.6 + max(1.2, 0.11 * heads + 0.9))
    above, below = figure.subplots(2, 1, height_ratios=[max(1.2, 0.11 * heads + 0.9), 3.2])
    scale = PowerNorm(
        0.5, 0.0, max(float(need.max()), 1e-12)
    )  # most heads need little: the square root tells them apart
    image = above.imshow(need.T.numpy(), norm=scale, cmap="cividis", aspect="auto")
    figure.colorbar(image, ax=above, label="nats a token", fraction=0.03, pad=0.02)
    above.set_yticks(range(heads) if heads <= 4 else [0, heads - 1])
    above.set_xlabel("layer (rows: KV heads)", fontsize=9)
    above.locator_params(axis="x", integer=True)
    above.set_title(title, fontsize=10)
    shown = {name: [(x, y) for x, y in points if y > 0] for name, points in curves.items()}
    panel = Panel("KL to dense by level of the order", shown, "MSR", "nats a token", yscale="log", marker="o")
    drawn = _draw(below, panel, list(shown))
    below.legend(drawn.values(), drawn.keys(), fontsize=7, frameon=False, ncols=2)
    return figure


def _draw(axis: Any, panel: Panel, labels: Sequence[str]) -> dict[str, Any]:
    """Draw a panel; its lines by label."""
    drawn = {}
    for label, points in panel.lines.items():
        x, y = zip(*points, strict=True) if points else ((), ())
        marker = panel.marker or ("o" if panel.xticks else None)  # few points at named places
        place = labels.index(label)
        if marker == "o":  # another one where colours come round again
            marker = "os^"[place // 10 % 3]
        style = {"color": f"C{place % 10}", "marker": marker, "markersize": 4, "linewidth": 1.5}
        drawn[label] = axis.plot(x, y, label=label, **style)[0]
        if panel.halves:
            axis.errorbar(x, y, panel.halves[label], fmt="none", ecolor=style["color"], elinewidth=0.8)
    axis.set_title(panel.title, fontsize=11)
    axis.set_xlabel(panel.xlabel, fontsize=10)
    axis.set_ylabel(panel.ylabel, fontsize=10)
    axis.set_xscale(panel.xscale)
    axis.set_yscale(panel.yscale)
    if panel.xticks:
        axis.set_xticks(list(panel.xticks), labels=list(panel.xticks.values()), minor=False)
        axis.set_xticks([], minor=True)
    if panel.yscale == "log":
        _plain_ticks(axis.yaxis)
    axis.tick_params(labelsize=9)
    axis.grid(alpha=0.25)
    return drawn


def _plain_ticks(axis: Any) -> None:
    """1, 2, 5 and 10 in plain numbers on a logarithmic axis, every digit where it spans little."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high > 8 * low else range(1, 10)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def curves_figure(panels: Mapping[str, Mapping[str, Curve]], xlabel: str = "step", marker: str = "") -> Any:
    """Line plots side by side: {panel title: {line label: [(x, y), ...]}}; a matplotlib `Figure`. `marker` is
    matplotlib's, for curves of few points.

    Raises:
        ValueError: no panel.
    """
    return panels_figure([[Panel(title, lines, xlabel, marker=marker) for title, lines in panels.items()]])


def bars_figure(panels: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Any:
    """Grouped bars, one panel above the other: {panel title: {bar label: {group: height}}}; a matplotlib `Figure`.

    Raises:
        ValueError: no panel, or one without bars.
    """
    if not panels or not all(panels.values()):
        raise ValueError("no bars to draw; expected {title: {label: {group: height}}}")
    groups = {title: list(dict.fromkeys(g for bars in lines.values() for g in bars)) for title, lines in panels.items()}
    figure = _figure(max(6.0, 1.2 + 0.75 * max(map(len, groups.values()))), 2.7 * len(panels))
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        width = 0.8 / len(lines)
        for place, (label, bars) in enumerate(lines.items()):
            x = [groups[title].index(group) + (place + 0.5) * width - 0.4 for group in bars]
            axis.bar(x, list(bars.values()), width=width, label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(groups[title])), groups[title], fontsize=7, rotation=25, ha="right")
        axis.tick_params(axis="y", labelsize=8)
        if len(lines) > 1:
            axis.legend(fontsize=7, frameon=False)
    return figure


def save_png(figure: Any, path: str | Path, dpi: int = 150) -> Path:
    """Write a figure as PNG with a palette of 256 colours, a third of the bytes; the folder is made if needed.

    Raises:
        ValueError: another file ending.
    """
    from PIL import Image

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path} does not end in .png; pictures are written as PNG")
    with io.BytesIO() as drawn:
        figure.savefig(drawn, format="png", dpi=dpi)
        picture = Image.open(drawn).convert("RGB")
    with new_file(path) as scratch:
        picture.quantize(256, dither=Image.Dither.NONE).save(scratch, "PNG", optimize=True)
    return path


def smooth(points: Curve, weight: float = 0.8) -> list[tuple[float, float]]:
    """Exponential moving average of a noisy curve, corrected for its start."""
    total, norm, result = 0.0, 0.0, []
    for x, y in points:
        total, norm = weight * total + (1 - weight) * y, weight * norm + (1 - weight)
        result.append((x, total / norm))
    return result


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def image_of(figure: Any) -> Tensor:
    """Pixels of a figure, uint8 [3, height, width], as TensorBoard's `add_image` takes them."""
    import numpy as np

    figure.canvas.draw()
    return torch.from_numpy(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)
