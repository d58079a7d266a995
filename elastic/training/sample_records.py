"""What evaluation found of every sample, over all processes, and the lines of its file (docs/design.md section 10).

Legend: N samples of a batch, M of the split, X whole numbers that identify a sample, C columns.
"""

import json
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from elastic.data.tasks import TASKS

IDENTITY = ("corpus", "row", "index")  # of a sample within its split, stable across methods, runs and processes
ABOUT = (*IDENTITY, "source", "task", "tokens")
SOURCE, TASK = ABOUT.index("source"), ABOUT.index("task")
DIGITS = 6


class SampleRecords(Metric):
    """A line per sample: six whole numbers (`ABOUT`; names by their place in a list) and the measured columns."""

    about: list[Tensor]
    values: list[Tensor]

    def __init__(self, columns: tuple[str, ...]) -> None:
        super().__init__()
        self.columns = columns
        self.add_state("about", [], dist_reduce_fx="cat")
        self.add_state("values", [], dist_reduce_fx="cat")

    def update(self, about_NX: Tensor, values: dict[str, Tensor]) -> None:
        """Add samples, possibly none: every process has to add equally often."""
        self.about.append(about_NX)
        self.values.append(torch.stack([values[name].double() for name in self.columns], dim=1))

    def compute(self) -> tuple[Tensor, Tensor]:
        """[M, X] int64 and [M, C] fp64 of all processes' samples on the CPU, in the order of their identity."""
        if not len(self.about):
            return torch.zeros(0, len(ABOUT), dtype=torch.int64), torch.zeros(0, len(self.columns), dtype=torch.float64)
        about, values = (torch.cat(list(x)) if isinstance(x, list) else x for x in (self.about, self.values))
        lines = about[:, : len(IDENTITY)].tolist()
        order = torch.tensor(sorted(range(len(lines)), key=lines.__getitem__), dtype=torch.int64)
        return about.cpu()[order], values.cpu()[order]


def sample_lines(
    found: tuple[Tensor, Tensor], columns: Sequence[str], corpora: Sequence[str], sources: Sequence[str]
) -> Iterator[str]:
    """A line of JSON per sample: `ABOUT` by name, then the columns with six significant digits.

    Args:
        found: as `SampleRecords.compute` gave it.
        corpora, sources: names by their number.
    """
    for (corpus, row, index, source, task, tokens), values in zip(*(x.tolist() for x in found), strict=True):
        about = (corpora[corpus], row, index, sources[source], TASKS[task], tokens)
        numbers = (float(f"{value:.{DIGITS}g}") for value in values)
        yield json.dumps({**dict(zip(ABOUT, about, strict=True)), **dict(zip(columns, numbers, strict=True))}) + "\n"
