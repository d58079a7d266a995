"""Results by sample, read from the files of `elastic test` and `validate` (docs/design.md section 10).

Legend: M samples.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from elastic.routing.methods import ratio_columns
from elastic.training.sample_records import ABOUT, IDENTITY


@dataclass(frozen=True)
class Samples:
    """What one evaluation found of each sample.

    Attributes:
        ids: identity of each, in the order of the file.
        sources, tasks: of each.
        columns: measured values by column, fp64 [M] each.
    """

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    tasks: tuple[str, ...]
    columns: dict[str, Tensor]

    def score(self, method: str, score: str) -> Tensor:
        """`loss`, `accuracy`, `exact` or `kl` of a method, [M]; the dense model does not diverge from itself.

        Raises:
            ValueError: the evaluation did not measure it.
        """
        if (method, score) == ("dense", "kl"):
            return torch.zeros(len(self.ids), dtype=torch.float64)
        return self._column(f"{method}_{score}")

    def ratio(self, method: str, ratio: str = "msr") -> Tensor:
        """MSR or ESR of a method, [M]; the dense model has 0.

        Raises:
            ValueError: the evaluation did not measure it.
        """
        if method == "dense":
            return torch.zeros(len(self.ids), dtype=torch.float64)
        return self._column(ratio_columns(method)[ratio])

    def _column(self, name: str) -> Tensor:
        if name not in self.columns:
            raise ValueError(f"the samples have no column {name!r}; they have {', '.join(self.columns)}")
        return self.columns[name]

    def reordered(self, ids: tuple[str, ...]) -> "Samples":
        """The same samples in another order.

        Raises:
            ValueError: not the same samples: only those that both evaluations saw could be compared in pairs.
        """
        if ids == self.ids:
            return self
        place = {name: index for index, name in enumerate(self.ids)}
        if set(ids) != set(place) or len(ids) != len(place):
            alone, there = len(set(ids) - set(place)), len(set(place) - set(ids))
            raise ValueError(
                f"two evaluations of {len(ids)} and {len(place)} samples differ in {alone} and {there} of them; pairs "
                "need the same split of the same data, without limits on its batches"
            )
        order = torch.tensor([place[name] for name in ids])
        return Samples(
            ids,
            tuple(self.sources[index] for index in order.tolist()),
            tuple(self.tasks[index] for index in order.tolist()),
            {name: values[order] for name, values in self.columns.items()},
        )


def read_samples(file: Path) -> Samples:
    """Read `samples_<stage>.jsonl`.

    Raises:
        ValueError: no samples, a line that is not JSON or lacks a field, columns that differ between lines, or a sample
            twice; with the line.
    """
    lines = [_line(file, number, text) for number, text in enumerate(file.read_text("utf-8").splitlines(), 1)]
    if not lines:
        raise ValueError(f"{file} holds no samples; expected a line for each, as `elastic test` writes them")
    names = [name for name in lines[0] if name not in ABOUT]
    for number, line in enumerate(lines, 1):
        if line.keys() != lines[0].keys():
            raise ValueError(f"line {number} of {file} has other columns than its first line; write it again")
    ids = tuple("/".join(str(line[name]) for name in IDENTITY) for line in lines)
    if twice := _twice(ids):
        raise ValueError(f"{file} holds sample {twice} twice; write it again")
    values = torch.tensor([[line[name] for name in names] for line in lines], dtype=torch.float64)
    sources, tasks = (tuple(str(line[name]) for line in lines) for name in ("source", "task"))
    return Samples(ids, sources, tasks, dict(zip(names, values.unbind(1), strict=True)))


def _line(file: Path, number: int, text: str) -> dict[str, object]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"line {number} of {file} is not JSON: {error}") from error
    if missing := [name for name in ABOUT if not isinstance(line, dict) or name not in line]:
        raise ValueError(f"line {number} of {file} lacks {', '.join(missing)}; `elastic test` writes such lines")
    wrong = [name for name, value in line.items() if name not in ABOUT and not isinstance(value, int | float)]
    if wrong:
        raise ValueError(f"line {number} of {file}: {wrong[0]!r} is {line[wrong[0]]!r}, expected a number")
    return dict(line)


def _twice(ids: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            return name
        seen.add(name)
    return None
