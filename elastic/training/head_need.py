"""The rounds in which the need of heads is measured: which routes each of them runs, and what follows from the outcome.
`Recipe` says which rounds there are.

All means are over samples within a source first, then over sources, so that every source counts the same.
Legend: N samples, L layers, K KV heads, T = L * K heads, C tried routes, D random draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from elastic.routing.calibration import LEVELS, first_heads
from elastic.training.resume import noise_seed

CURVE = "curve"
# Shares of random routes in which a head runs sparse, by its place in the order: those that are cheap usually do, those
# that are needed seldom, and every head is seen both ways.
CHEAP, NEEDED = (0.5, 0.8), (0.85, 0.1)  # place from 0 to 1, share; between the two it falls in a line


class Ranking(NamedTuple):
    """What is known of the heads: all of them, the least needed first, and their need [T] in nats per answer token."""

    order: list[int]
    need_T: Tensor

    @classmethod
    def unknown(cls, heads: int) -> "Ranking":
        """Before anything was measured."""
        return cls(list(range(heads)), torch.zeros(heads, dtype=torch.float64))


class Judged(Protocol):
    """One batch on its way through the model."""

    def divergences(self, routes_CLK: Tensor) -> Tensor:
        """KL(dense || routes) of each sample under each of C routes, [N, C]."""
        ...

    def gradients(self, routes_NDLK: Tensor) -> Tensor:
        """d KL / d route of each sample under D routes of its own, [N, D, L, K]."""
        ...


class Round(Protocol):
    """One pass over all samples."""

    @property
    def name(self) -> str:
        """Names what it measured in the file of partial results."""
        ...

    def routes(self, known: Ranking, size: tuple[int, int], sources: Sequence[str], /) -> Tensor:
        """What it runs, given what is known so far; `size` is (L, K), `sources` the source of every sample."""
        ...

    def measure(self, batch: Judged, routes: Tensor, place: slice, /) -> Tensor:
        """Values [n, ...] of the samples of a batch, which are at `place` among all samples."""
        ...

    def learn(self, known: Ranking, routes: Tensor, values: Tensor, sources: Sequence[str], /) -> Ranking:
        """What is known after it."""
        ...


@dataclass(frozen=True)
class GradientRound:
    """One backward pass gives d KL / d route of all heads at once, under routes drawn at random.

    KL is flat where a head is full and steep where it is sparse, and the mean of both slopes is what the way from one
    to the other costs (the trapezoid rule, exact for a parabola). So the need of a head is the mean of the two means,
    over the draws in which it ran full and over those in which it ran sparse.

    Attributes:
        name: see `Round`.
        rates: share of heads that run sparse, by draw; None: by what is known of each head (`in_context`).
        draws: routes drawn for each sample where `rates` is None.
        seed: of the draws.
    """

    name: str
    rates: tuple[float, ...] | None
    draws: int
    seed: int

    def routes(self, known: Ranking, size: tuple[int, int], sources: Sequence[str]) -> Tensor:
        """Random routes [N, D, L, K]."""
        heads = size[0] * size[1]
        if self.rates is None:
            share_DT = in_context(known.order).expand(self.draws, -1)
        else:
            share_DT = torch.tensor(self.rates)[:, None].expand(-1, heads)
        drawn = [balanced(share_T, sources, noise_seed(self.seed, draw)) for draw, share_T in enumerate(share_DT)]
        return torch.stack(drawn, dim=1).view(len(sources), len(drawn), *size)

    def measure(self, batch: Judged, routes: Tensor, place: slice) -> Tensor:
        """Gradients [n, D, L, K]."""
        return batch.gradients(routes[place])

    def learn(self, known: Ranking, routes: Tensor, values: Tensor, sources: Sequence[str]) -> Ranking:
        """All needs and the order are those of this round."""
        need_T = need_of_gradients(values.flatten(2), routes.flatten(2), sources)
        return Ranking(by_need(need_T, known.order), need_T)


@dataclass(frozen=True)
class AblationRound:
    """Heads that are cheap as far as is known run sparse, and then each other head beside them, one at a time.

    Attributes:
        name: see `Round`.
        level: MSR of the heads that run sparse throughout.
    """

    name: str
    level: float

    def routes(self, known: Ranking, size: tuple[int, int], _sources: Sequence[str]) -> Tensor:
        """[C, L, K]: the cheap heads alone, then with each other head by number."""
        base_T = first_heads(known.order, self.level, *size).flatten()
        rest = (base_T == 0).nonzero()[:, 0]
        tried = base_T.repeat(1 + len(rest), 1)
        tried[torch.arange(1, 1 + len(rest)), rest] = 1.0
        return tried.view(-1, *size)

    def measure(self, batch: Judged, routes: Tensor, _place: slice) -> Tensor:
        """Divergences [n, C]."""
        return batch.divergences(routes)

    def learn(self, known: Ranking, routes: Tensor, values: Tensor, sources: Sequence[str]) -> Ranking:
        """The cheap heads stay first; the others follow by what each adds to the KL, which is their new need."""
        kl_C, tried = mean_over_sources(values, sources), routes.flatten(1)
        rest = (tried[0] == 0).nonzero()[:, 0].tolist()
        need_T = known.need_T.clone()
        need_T[rest] = kl_C[1:] - kl_C[0]
        kept = [head for head in known.order if head not in set(rest)]
        return Ranking(kept + by_need(need_T, rest), need_T)


@dataclass(frozen=True)
class CurveRound:
    """What the order costs at each of `LEVELS`."""

    name: str = CURVE

    def routes(self, known: Ranking, size: tuple[int, int], _sources: Sequence[str]) -> Tensor:
        """[levels, L, K]."""
        return torch.stack([first_heads(known.order, level, *size) for level in LEVELS])

    def measure(self, batch: Judged, routes: Tensor, _place: slice) -> Tensor:
        """Divergences [n, levels]."""
        return batch.divergences(routes)

    def learn(self, known: Ranking, _routes: Tensor, _values: Tensor, _sources: Sequence[str]) -> Ranking:
        """Nothing: its samples are others than those that make the order."""
        return known


@dataclass(frozen=True)
class Recipe:
    """How the need of heads is measured.

    Attributes:
        by: `gradient` or `ablation`.
        rates: gradient: shares of sparse heads in the random routes of the first round, one draw each.
        draws: gradient: random routes of the second round, in which cheap heads mostly run sparse; 0 leaves it out.
        levels: ablation: the MSR that each round begins at, ascending from 0.
        seed: of the random routes.
    """

    by: str = "gradient"
    rates: tuple[float, ...] = (0.1, 0.2, 0.35)
    draws: int = 3
    levels: tuple[float, ...] = (0.0, 0.5, 0.75)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("gradient", "ablation"):
            raise ValueError(f"by={self.by!r} is not known; use gradient or ablation")
        if not self.rates or not all(0 < rate < 1 for rate in self.rates):
            raise ValueError(f"rates={list(self.rates)}; expected shares of the heads between 0 and 1")
        if self.draws < 0:
            raise ValueError(f"draws={self.draws} is below 0; 0 leaves the second round out")
        if self.levels[:1] != (0.0,) or list(self.levels) != sorted(set(self.levels)) or self.levels[-1] >= 1:
            raise ValueError(f"rounds={list(self.levels)}; expected MSR levels that ascend from 0 to below 1")
        if not 0 <= self.seed < 2**40:
            raise ValueError(f"seed={self.seed} is not in [0, 2**40)")

    def rounds(self) -> list[Round]:
        """Those that make the order."""
        if self.by == "ablation":
            return [AblationRound(f"beside {level:g}", level) for level in self.levels]
        first = GradientRound("random", self.rates, 0, self.seed)
        return [first, GradientRound("in context", None, self.draws, self.seed + 1)] if self.draws else [first]

    def settings(self) -> dict[str, Any]:
        """Those that this way of measuring reads."""
        names = ("levels",) if self.by == "ablation" else ("rates", "draws", "seed")
        return {name: getattr(self, name) for name in names}


def source_means(values_N: Tensor, sources: Sequence[str]) -> dict[str, Tensor]:
    """Mean over the samples of each source, in fp64, by source in alphabetical order.

    Args:
        values_N: [N, ...], a value or tensor of each sample.
        sources: name of each sample's source.
    """
    return {name: values_N[place].double().mean(0) for name, place in _places(sources).items()}


def mean_over_sources(values_N: Tensor, sources: Sequence[str]) -> Tensor:
    """Mean of `source_means`."""
    return torch.stack(list(source_means(values_N, sources).values())).mean(0)


def need_of_gradients(gradient_NDT: Tensor, route_NDT: Tensor, sources: Sequence[str]) -> Tensor:
    """Need [T]: the mean of two means of the gradient, where the head ran full and where it ran sparse, each over the
    sources that have such draws; a head that never ran one way is judged by the other.
    """
    means: list[Tensor] = []
    for way in (0.0, 1.0):
        seen = [(route_NDT[place] == way).double().flatten(0, 1) for place in _places(sources).values()]
        found = [gradient_NDT[place].double().flatten(0, 1) for place in _places(sources).values()]
        count_ST = torch.stack([of.sum(0) for of in seen])
        total_ST = torch.stack([(of * values).sum(0) for of, values in zip(seen, found, strict=True)])
        means.append((total_ST / count_ST.clamp_min(1)).sum(0) / (count_ST > 0).sum(0))  # 0 / 0 where there is none
    return torch.stack(means).nanmean(0)


def in_context(order: Sequence[int]) -> Tensor:
    """Share [T] of random routes in which each head runs sparse, by its place in an order (`CHEAP`, `NEEDED`)."""
    (begin, high), (end, low) = CHEAP, NEEDED
    place = (torch.arange(len(order)) + 0.5) / len(order)
    share_T = torch.empty(len(order))
    share_T[list(order)] = high + (low - high) * ((place - begin) / (end - begin)).clamp(0, 1)
    return share_T


def balanced(share_T: Tensor, sources: Sequence[str], seed: int) -> Tensor:
    """Random routes [N, T] in which each head runs sparse in its share of the samples of every source, and of all
    samples, up to one.
    """
    generator = torch.Generator().manual_seed(seed)
    route_NT = torch.empty(len(sources), len(share_T))
    start_T = torch.rand(len(share_T), generator=generator)  # which way shares are rounded
    for place in _places(sources).values():
        rank = torch.rand(len(place), len(share_T), generator=generator).argsort(0).argsort(0)
        end_T = start_T + share_T * len(place)
        route_NT[place] = (rank < end_T.floor() - start_T.floor()).float()
        start_T = end_T
    return route_NT


def by_need(need_T: Tensor, heads: Sequence[int]) -> list[int]:
    """The heads with the least needed first; equal ones by number."""
    need = need_T.tolist()
    return sorted(heads, key=lambda head: (need[head], head))


def rounded(value: float) -> float:
    """Six significant digits: the rest is below the noise of any measurement, and files stay the same."""
    return float(f"{value:.6g}")


def _places(sources: Sequence[str]) -> dict[str, list[int]]:
    """Where the samples of each source are, by source in alphabetical order."""
    return {name: [i for i, of in enumerate(sources) if of == name] for name in sorted(set(sources))}
