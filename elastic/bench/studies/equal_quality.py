"""At which MSR a method keeps a share of the dense model's quality, and by how much two methods differ there, with
paired bootstrap intervals.

A method is a family of operating points (levels), from few sparse heads to many. Along a family quality can only fall;
noise that says otherwise is averaged out (isotonic regression). Between neighbouring levels, and from the dense model
to the first, quality and MSR are taken as straight: drawing one of the two levels for each input would give that.
Legend: M samples, S sources, L levels, R draws (`paired.Resamples`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.bench.studies.bounds import KEPT, kept
from elastic.bench.studies.samples import Samples
from elastic.data.tasks import ROBUST, SENSITIVE, TASKS, bound_score
from elastic.training.paired import Interval, Resamples

PARTS = {"mean MSR": TASKS, "MSR sensitive": SENSITIVE, "MSR robust": ROBUST}


@dataclass(frozen=True)
class Family:
    """Operating points of one method, on the same samples as the dense model.

    Attributes:
        name: of the method.
        score_ML: the score that counts for each sample, `bound_score` of its task.
        msr_ML: its MSR.
    """

    name: str
    score_ML: Tensor
    msr_ML: Tensor


def family(name: str, samples: Samples, methods: Sequence[str]) -> Family:
    """A family out of the columns of one evaluation.

    Args:
        methods: its operating points, in any order.

    Raises:
        ValueError: no operating points, or one that was not measured.
    """
    if not methods:
        raise ValueError(f"family {name!r} has no operating points")
    scores = [counted_score(samples, method) for method in methods]
    msr = [samples.ratio(method) for method in methods]
    return Family(name, torch.stack(scores, dim=1), torch.stack(msr, dim=1))


def counted_score(samples: Samples, method: str) -> Tensor:
    """What a method is judged by on each sample, [M]: exact answers, or loss where answers are running text."""
    by_loss = torch.tensor([bound_score(task) == "loss" for task in samples.tasks])
    return torch.where(by_loss, samples.score(method, "loss"), samples.score(method, "exact"))


@dataclass(frozen=True)
class Reached:
    """MSR at which a family keeps a share, in every draw.

    Attributes:
        msr_R: by part of the tasks (`PARTS`).
        open_ended: whether the sparsest level keeps it still, so that the MSR is a lower bound (of the samples
            themselves).
    """

    msr_R: dict[str, Tensor]
    open_ended: bool


@dataclass(frozen=True)
class Lead:
    """What a family's MSR differs by from that of its strongest rival, where both keep the same share.

    Attributes:
        rival: its name.
        msr_R: the difference in every draw, by part of the tasks (`PARTS`).
        at_least, at_most: whether the family's, and the rival's, MSR is a lower bound.
    """

    rival: str
    msr_R: dict[str, Tensor]
    at_least: bool
    at_most: bool

    def interval(self, part: str = "mean MSR") -> Interval:
        """The difference and its 95 % interval."""
        return Interval.of(self.msr_R[part])


class Comparison:
    """Families on the same samples, compared with the dense model in the same draws.

    Args:
        samples: any evaluation of these samples that has the dense model; tells their sources and tasks.
        draws: of its samples.

    Raises:
        ValueError: a source of more than one task, or no dense model.
    """

    def __init__(self, samples: Samples, draws: Resamples) -> None:
        self.draws, self.tasks = draws, source_tasks(samples)
        self.dense_RS = draws.means(counted_score(samples, "dense"))

    def reached(self, of: Family, share: float = KEPT, only_retrieval: bool = True) -> Reached:
        """The largest MSR at which the family keeps `share` of dense retrieval and, unless `only_retrieval`, stays
        within the bound of every other source.

        Raises:
            ValueError: a share that is not between 0 and 1.
        """
        if not 0 < share < 1:
            raise ValueError(f"share={share} is not between 0 and 1; 0.97 is usual")
        order = self._mean_msr(self.draws.means(of.msr_ML), TASKS)[0].argsort()
        score_RSL, msr_RSL = (self.draws.means(x[:, order]) for x in (of.score_ML, of.msr_ML))
        place = {name: index for index, name in enumerate(self.draws.names)}
        found = kept(
            self.tasks,
            lambda source, _: score_RSL[:, place[source]],
            lambda source, _: self.dense_RS[:, place[source], None],
        )
        slack_RL = _with_dense(found.slack(share, only_retrieval), 1.0)
        at_R = crossing(falling(slack_RL))
        msr = {part: self._mean_msr(msr_RSL, tasks) for part, tasks in PARTS.items() if self._has(tasks)}
        along = {part: interpolated(_with_dense(msr_RL, 0.0), at_R) for part, msr_RL in msr.items()}
        return Reached(along, bool(at_R[0] >= slack_RL.shape[1] - 1))

    def lead(self, mine: Family, rivals: Sequence[Family], share: float = KEPT, only_retrieval: bool = True) -> "Lead":
        """By how much more MSR a family keeps a share than the strongest of its rivals, the one of the largest mean MSR
        there.

        Raises:
            ValueError: no rivals.
        """
        if not rivals:
            raise ValueError(f"{mine.name} has no rival to be compared with")
        theirs = {rival.name: self.reached(rival, share, only_retrieval) for rival in rivals}
        strongest = max(theirs, key=lambda name: float(theirs[name].msr_R["mean MSR"][0]))
        own, rival = self.reached(mine, share, only_retrieval), theirs[strongest]
        draws = {part: own.msr_R[part] - rival.msr_R[part] for part in own.msr_R}
        return Lead(strongest, draws, own.open_ended, rival.open_ended)

    def _has(self, tasks: Sequence[str]) -> bool:
        return any(task in tasks for task in self.tasks.values())

    def _mean_msr(self, msr_RSL: Tensor, tasks: Sequence[str]) -> Tensor:
        """Mean over tasks of the mean over a task's sources, [R, L]."""
        of_task = [
            msr_RSL[:, places].mean(1)
            for task in tasks
            if (places := [at for at, name in enumerate(self.draws.names) if self.tasks[name] == task])
        ]
        return torch.stack(of_task).mean(0)


def source_tasks(samples: Samples) -> dict[str, str]:
    """Task class of every source.

    Raises:
        ValueError: a source of more than one.
    """
    pairs = sorted(set(zip(samples.sources, samples.tasks, strict=True)))
    names = [source for source, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"source {twice[0]} has samples of several task classes; give each its own source")
    return dict(pairs)


def falling(values_RL: Tensor) -> Tensor:
    """The nearest sequences that never rise along levels (least squares): isotonic regression by its min-max formula,
    value i = min over a <= i of max over b >= i of the mean of values a to b.
    """
    levels = values_RL.shape[1]
    sums = torch.cat([torch.zeros_like(values_RL[:, :1]), values_RL.cumsum(1)], dim=1)
    fitted = torch.full_like(values_RL, torch.inf)
    for first in range(levels):
        lengths = torch.arange(1, levels - first + 1, dtype=values_RL.dtype)
        means = (sums[:, first + 1 :] - sums[:, first : first + 1]) / lengths  # of first to each later level
        highest = means.flip(1).cummax(1).values.flip(1)  # over ends from each level on
        fitted[:, first:] = torch.minimum(fitted[:, first:], highest)
    return fitted


def crossing(slack_RL: Tensor) -> Tensor:
    """Where a slack that never rises falls below 0, [R]: 1.25 is a quarter of the way from level 1 to level 2; the last
    level where it never does.
    """
    last = slack_RL.shape[1] - 1
    inside = ((slack_RL >= 0).sum(1) - 1).clamp_min(0)
    beyond = (inside + 1).clamp_max(last)
    near, far = (slack_RL.gather(1, at[:, None])[:, 0] for at in (inside, beyond))
    step = torch.where(beyond > inside, near / (near - far).clamp_min(torch.finfo(near.dtype).tiny), 0.0)
    return inside + step


def interpolated(values_RL: Tensor, at_R: Tensor) -> Tensor:
    """Values between levels, straight, [R]."""
    below = at_R.floor().long().clamp_max(values_RL.shape[1] - 1)
    above = (below + 1).clamp_max(values_RL.shape[1] - 1)
    near, far = (values_RL.gather(1, at[:, None])[:, 0] for at in (below, above))
    return near + (far - near) * (at_R - below)


def _with_dense(values_RL: Tensor, dense: float) -> Tensor:
    """The dense model as the level before the first."""
    return torch.cat([torch.full_like(values_RL[:, :1], dense), values_RL], dim=1)
