"""The pictures of a file of records, whichever benchmark it is of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elastic.bench.e2e_tables import FIRST_TOKEN, e2e_figure
from elastic.bench.pictures import attention_figure
from elastic.bench.records import Measurement
from elastic.bench.scaling_tables import of_scaling, scaling_figure
from elastic.bench.studies import evaluation, pareto_tables, routing_tables
from elastic.plots import save_png


def figures(found: Sequence[Measurement]) -> dict[str, Any]:
    """matplotlib `Figure`s by the ending of their file's name; none for records that are not curves."""
    if any(record["case"] == routing_tables.HEADLINE for record in found):
        return routing_tables.figures(found)
    if any(record["metric"] == FIRST_TOKEN for record in found):
        return {"": e2e_figure(found)}
    if any(record["metric"] == evaluation.SCORE for record in found):
        return {"": evaluation.score_figure(found)}
    if any(record["metric"] == pareto_tables.KEPT for record in found):
        return {"": pareto_tables.figure(found)}
    if of_scaling(found):
        return {"": scaling_figure(found)}
    if any(record["metric"] == "eff" and record.get("msr") is not None for record in found):
        return {"": attention_figure(found)}
    return {}


def draw(path: Path, found: Sequence[Measurement]) -> list[Path]:
    """Write the pictures of the records in `path` beside it, as `<name>.png` or `<name>-<what>.png`."""
    return [save_png(figure, path.with_name(f"{path.stem}{ending}.png")) for ending, figure in figures(found).items()]
