"""What `elastic calibrate` tells: rows, cost of the order, agreement with another one, a picture, what to do next."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from elastic.console import table
from elastic.routing.calibration import BUDGET, Calibration, agreement

if TYPE_CHECKING:
    from elastic.data.calibration_rows import RowSet

SHARES = (0.1, 0.2, 0.3)  # of the heads, that two orders are compared on


def describe(purpose: str, rows: "RowSet") -> str:
    """One line about a set of rows."""
    found = rows.summary()
    return (
        f"Rows for the {purpose}: {found['samples']} samples of {len(found['sources'])} sources, "
        f"{found['tokens']} tokens in {len(rows.batches)} batches"
    )


def cost_table(found: Calibration) -> str:
    """What the order costs at each level: the mean over sources, and the source that pays most."""
    rows = []
    for place, (msr, kl) in enumerate(zip(found.curve.msr, found.curve.kl, strict=True)):
        worst = max(found.curve.sources, key=lambda name: found.curve.sources[name][place])
        rows.append([f"{msr:g}", f"{kl:.4f}", f"{found.curve.sources[worst][place]:.4f}", worst])
    return table(["MSR", "KL to dense", "highest", "of source"], rows)


def comparison(mine: Calibration, reference: Calibration) -> str:
    """How well one order finds the heads that another needs most, as a table."""
    found = [agreement(mine, reference, share) for share in SHARES]
    rows = [
        [f"{share:.0%}", str(of.heads), f"{of.shared:.0%}", f"{of.covered:.3f}"]
        for share, of in zip(SHARES, found, strict=True)
    ]
    title = f"order by {mine.provenance['by']} beside {reference.provenance['by']}"
    return f"{title}\n{table(['most needed', 'heads', 'in both', 'need covered'], rows)}"


def draw(found: Calibration, path: Path) -> Path:
    """Write the picture."""
    from elastic.plots import need_figure, save_png

    title = f"{found.backbone}: need by {found.provenance['by']}"
    curves = {"mean": found.curve.kl, **found.curve.sources}
    points = {name: list(zip(found.curve.msr, kl, strict=True)) for name, kl in curves.items()}
    return save_png(need_figure(found.need, points, title), path)


def advice(found: Calibration, out: Path, levels: Path | None = None) -> str:
    """What `static:` makes of the file, and what to do next."""
    if levels is not None:
        return f'Next: elastic generate --checkpoint {shlex.quote(str(levels))} --prompt "..."'
    level, sizes = found.level(), found.sparse
    beyond = "" if sizes.route0 == "full" else f" beyond what {sizes.route0} heads cost"
    if level:
        cost = found.curve.kl[found.curve.msr.index(level)] - found.floor
        says = f"runs at MSR {level:g}, the highest level that costs at most {BUDGET} nats a token{beyond} ({cost:.4f})"
    else:
        all_zero = f"runs all heads as {sizes.route0}" if beyond else "is the dense model"
        says = f"{all_zero}, because every level costs more than {BUDGET} nats a token{beyond}; name one after an @"
    at = shlex.quote(f"static:{out}@{level or 0.5:g}")
    told = f'static:{out} {says}\nNext: elastic generate --checkpoint {at} --prompt "..."'
    if (sizes.route0, sizes.route1) != ("full", "streaming"):
        return told  # what `elastic eval` runs a file's heads as
    return (
        f"{told}\n"
        f"  or: elastic eval --backbone {shlex.quote(found.backbone)} --sink {sizes.sink} --window {sizes.window} "
        f"--block {sizes.block} --methods dense {at}"
    )
