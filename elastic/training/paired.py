"""Intervals of what two methods differ by on the same samples, and over seeds of training.

The bootstrap draws samples anew with replacement within each source (stratified: every source keeps its number), the
same draws for all methods, so that what a sample adds to both cancels. Intervals are the 2.5 % and 97.5 % quantiles.
Legend: M samples, S sources, R draws, the first of which is the samples themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor

RESAMPLES = 2000
LEVEL = 0.95
# Two-sided 95 % quantiles of Student's t by number of seeds.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws_R: Tensor) -> "Interval":
        """From the values of all draws, the samples' own first."""
        tail = (1 - LEVEL) / 2
        low, high = torch.quantile(draws_R[1:], torch.tensor([tail, 1 - tail], dtype=draws_R.dtype)).tolist()
        return cls(float(draws_R[0]), low, high)

    @property
    def excludes_zero(self) -> bool:
        """Whether all of it is on one side of 0."""
        return self.low > 0 or self.high < 0


class Resamples:
    """Draws of samples within sources, fixed by a seed and the samples' sources.

    Args:
        sources: of each sample.
        count: draws.
        seed: of the draws.

    Raises:
        ValueError: no samples, or fewer than two draws.
    """

    def __init__(self, sources: Sequence[str], count: int = RESAMPLES, seed: int = 0) -> None:
        if not sources:
            raise ValueError("no samples to draw from; give the source of each")
        if count < 2:
            raise ValueError(f"{count} draws make no interval; {RESAMPLES} are usual")
        self.size, self.names = len(sources), tuple(sorted(set(sources)))
        generator = torch.Generator().manual_seed(seed)
        self.places = [torch.tensor([at for at, source in enumerate(sources) if source == name]) for name in self.names]
        self.hits = [_hits(len(place), count, generator) for place in self.places]

    def means(self, values_M: Tensor) -> Tensor:
        """Mean of each source in every draw, fp64 [R, S]; of values [M, L] at several levels, [R, S, L].

        Raises:
            ValueError: not a value for every sample.
        """
        if values_M.shape[0] != self.size:
            raise ValueError(f"{values_M.shape[0]} values for {self.size} samples; expected one for each")
        pairs = zip(self.places, self.hits, strict=True)
        of_source = [hits @ values_M[place].double() / len(place) for place, hits in pairs]
        return torch.stack(of_source, dim=1)


def _hits(size: int, count: int, generator: torch.Generator) -> Tensor:
    """How often each of `size` samples is in a draw, fp64 [1 + count, size]; once each in the first."""
    drawn = torch.randint(size, (count, size), generator=generator)
    hits = torch.zeros(count, size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(count, size).double())
    return torch.cat([torch.ones(1, size, dtype=torch.float64), hits])


def difference(mine_M: Tensor, theirs_M: Tensor, draws: Resamples) -> Interval:
    """What two methods differ by on the same samples, mine - theirs: mean over the sources, each of the same weight."""
    if mine_M.shape != theirs_M.shape:
        raise ValueError(f"values of {mine_M.shape[0]} and {theirs_M.shape[0]} samples are not pairs")
    return Interval.of(draws.means(mine_M - theirs_M).mean(1))


def over_seeds(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the half width of its 95 % interval by Student's t; None for a single seed.

    Args:
        values: one for each seed of training; for what two methods differ by, the difference of each seed's pair.

    Raises:
        ValueError: more seeds than `STUDENT` knows.
    """
    if len(values) > max(STUDENT):
        raise ValueError(f"{len(values)} seeds; quantiles are known for up to {max(STUDENT)}, add them to STUDENT")
    half = STUDENT[len(values)] * stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return fmean(values), half
