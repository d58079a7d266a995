"""The two training objectives (docs/design.md section 5) and their Lagrange multipliers, which ascend while the routers
descend.

`target` is the paper's (eq. 8): language loss, and a price on MSR outside the task's target. `quality` asks for the
sparsest routes whose answers stay within a budget of divergence from the dense backbone.
Legend: N samples, T task classes, S tokens, P labelled positions, E hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.data.packing import Batch
from elastic.data.tasks import SENSITIVE, TASKS, task_index
from elastic.training.config import ObjectiveConfig
from elastic.training.losses import (
    answer_losses,
    chunked_cross_entropy,
    chunked_divergence,
    labelled_positions,
    labelled_samples,
)

Interval = float | list[float] | tuple[float, float]


def target_intervals(targets: Mapping[str, Interval]) -> list[tuple[float, float]]:
    """MSR interval [lo, hi] per task class, in the order of TASKS; a number t means [t, t], as in the paper.

    Defaults: 0.7 for sensitive tasks, 1.0 for robust ones.

    Raises:
        ValueError: an unknown task, or an interval outside 0 <= lo <= hi <= 1.
    """
    intervals = [(0.7, 0.7) if task in SENSITIVE else (1.0, 1.0) for task in TASKS]
    for task, value in targets.items():
        bounds = tuple(value) if isinstance(value, list | tuple) else (value, value)
        if len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
            raise ValueError(f"target of task {task!r} is {value!r}; expected t or [lo, hi] with 0 <= lo <= hi <= 1")
        intervals[task_index(task)] = (float(bounds[0]), float(bounds[1]))
    return intervals


class Multipliers(nn.Module):
    """One price per task class under each name in `lowest`.

    Args:
        limit: bound on every price, so that it cannot grow without bound where a constraint cannot be met.
        lowest: name -> lowest allowed price in units of the limit, 0 or -1.
        start: what all begin at, within the limit.
    """

    def __init__(self, limit: float, lowest: dict[str, float], start: float = 0.0) -> None:
        super().__init__()
        if not limit > 0:
            raise ValueError(f"multiplier limit={limit} is not positive; 10 is usual")
        if abs(start) > limit:
            raise ValueError(f"multipliers start at {start}, beyond their limit={limit}; raise the limit")
        self.limit, self.lowest = limit, lowest
        for name in lowest:
            self.register_parameter(name, nn.Parameter(torch.full((len(TASKS),), start)))

    def by_task(self) -> dict[str, float]:
        """`<name>/<task>` of every multiplier and task class."""
        rows = [(name, getattr(self, name).tolist()) for name in self.lowest]
        return {f"{name}/{task}": value for name, row in rows for task, value in zip(TASKS, row, strict=True)}

    @torch.no_grad()
    def project(self) -> None:
        """Back into the allowed range. Call after every ascent step."""
        for name, lowest in self.lowest.items():
            getattr(self, name).clamp_(lowest * self.limit, self.limit)


class LagrangeMultipliers(Multipliers):
    """l1 and l2 per task class, the price of an MSR outside its target: |l1| <= limit, 0 <= l2 <= limit."""

    l1: Tensor
    l2: Tensor

    def __init__(self, limit: float = 10.0) -> None:
        super().__init__(limit, {"l1": -1.0, "l2": 0.0})


class BudgetMultipliers(Multipliers):
    """l per task class, the price of a divergence over its budget: 0 <= l <= limit."""

    l: Tensor  # noqa: E741 - the symbol of the equation

    def __init__(self, limit: float = 10.0, start: float = 0.0) -> None:
        super().__init__(limit, {"l": 0.0}, start)


def signed_distance(msr_N: Tensor, task_N: Tensor, intervals: list[tuple[float, float]]) -> Tensor:
    """Distance [N] of each sample's MSR to its task's interval: negative below, 0 inside, positive above."""
    bounds = torch.tensor(intervals, dtype=msr_N.dtype, device=msr_N.device)[task_N]
    return F.relu(msr_N - bounds[:, 1]) - F.relu(bounds[:, 0] - msr_N)


def sparsity_loss(
    msr_N: Tensor, task_N: Tensor, intervals: list[tuple[float, float]], multipliers: LagrangeMultipliers
) -> Tensor:
    """Mean over the tasks present of the mean over their samples of l1 d + l2 d^2, d = `signed_distance`. Scalar.

    Its gradient raises l1 where MSR is above its target and lowers it where below.
    """
    distance = signed_distance(msr_N, task_N, intervals)
    price_T, present_T = mean_per_task(multipliers.l1[task_N] * distance + multipliers.l2[task_N] * distance**2, task_N)
    return price_T.sum() / present_T.sum()


def quality_loss(
    msr_N: Tensor,
    divergence_N: Tensor,
    task_N: Tensor,
    budget_T: Tensor,
    cost: float,
    multipliers: BudgetMultipliers,
) -> Tensor:
    """cost (1 - MSR) + sum over the tasks present of l (KL - budget); MSR and KL averaged within tasks. Scalar.

    MSR is the mean over the tasks present, so that every task weighs the same however many samples it has. The
    gradient raises l where the divergence exceeds its budget and lowers it where it does not.
    """
    msr_T, present_T = mean_per_task(msr_N, task_N)
    divergence_T, _ = mean_per_task(divergence_N, task_N)
    full = 1.0 - msr_T.sum() / present_T.sum()
    return cost * full + (multipliers.l * (divergence_T - budget_T.to(divergence_T)) * present_T).sum()


def mean_per_task(values_N: Tensor, task_N: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over each task's samples, [T] (0 where a task has none), and whether it has any, bool [T]."""
    count_T = torch.bincount(task_N, minlength=len(TASKS))
    total_T = values_N.new_zeros(len(TASKS)).index_add(0, task_N, values_N)
    return total_T / count_T.clamp_min(1), count_T > 0


@dataclass(frozen=True)
class RoutedPass:
    """What an objective judges: one forward pass of a packed batch in training.

    Attributes:
        batch: the packed row, labels included.
        hidden_1SE: final hidden states of the routed model.
        msr_N: MSR per sample, with the routes' gradient.
        dense_PE: final hidden states of the dense model at the labelled positions; None unless the objective asked for
            them (`needs_dense`).
        lm_head: the output head.
        chunk: positions whose logits exist at a time.
        shared_target: whether routes are learnt for all inputs alike, so that targets cannot differ by task.
    """

    batch: Batch
    hidden_1SE: Tensor
    msr_N: Tensor
    dense_PE: Tensor | None
    lm_head: nn.Module
    chunk: int
    shared_target: bool = False


@dataclass(frozen=True)
class Judgement:
    """An objective's verdict on one pass.

    Attributes:
        loss: what the routers descend and the multipliers ascend.
        parts: its parts by name, scalars on the device without gradient.
        per_task: values per sample to be reported by task, [N] each, without gradient.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    per_task: dict[str, Tensor]


class TargetObjective:
    """The paper's objective: language loss plus `sparsity_loss`.

    Args:
        targets: wanted MSR per task class, see `target_intervals`.
        limit: bound on the multipliers.
        average: what cross-entropy is the mean over: answer `tokens`, or answers within a task, then `tasks`.
    """

    needs_dense = False

    def __init__(self, targets: Mapping[str, Interval], limit: float, average: str = "tokens") -> None:
        self.intervals, self.average = target_intervals(targets), average
        self.span = (min(lo for lo, _ in self.intervals), max(hi for _, hi in self.intervals))
        self.multipliers = LagrangeMultipliers(limit)

    def judge(self, routed: RoutedPass) -> Judgement:
        """Cross-entropy of the answers, and the price of MSR outside its targets; while all inputs share one target,
        outside the interval that spans them all, so that robust tasks do not drop what sensitive ones need.
        """
        batch = routed.batch
        language = self._language(routed)
        intervals = [self.span] * len(self.intervals) if routed.shared_target else self.intervals
        regulariser = sparsity_loss(routed.msr_N, batch["task_id"], intervals, self.multipliers)
        parts = {"loss": language.detach(), "regulariser": regulariser.detach()}
        return Judgement(language + regulariser, parts, {})

    def _language(self, routed: RoutedPass) -> Tensor:
        batch, answers = routed.batch, (routed.hidden_1SE, routed.lm_head, routed.batch["labels"])
        if self.average == "tokens":
            return chunked_cross_entropy(*answers, routed.chunk)
        loss_N = answer_losses(*answers, batch["cu_seq_lens"], routed.chunk)
        loss_T, present_T = mean_per_task(loss_N, batch["task_id"])
        return loss_T.sum() / present_T.sum()

    def settings(self) -> dict[str, Any]:
        """Kind, targets, and what cross-entropy is averaged over."""
        return {"kind": "target", "targets": dict(zip(TASKS, self.intervals, strict=True)), "average": self.average}


class QualityObjective:
    """The sparsest routes within a budget of divergence from the dense backbone: `quality_loss`.

    No labels are fitted: the dense pass of the same frozen backbone is the teacher, so nothing is fine-tuned through
    the choice of heads. Full heads are kept only where they pay.

    Args:
        config: cost and budgets.
        limit: bound on the multipliers.
    """

    needs_dense = True

    def __init__(self, config: ObjectiveConfig, limit: float) -> None:
        self.config = config
        self.budgets = {task: float(config.budgets.get(task, config.budget)) for task in TASKS}
        self.multipliers = BudgetMultipliers(limit, config.price)

    def judge(self, routed: RoutedPass) -> Judgement:
        """Share of full heads, and the price of divergence over budget; no cross-entropy is computed."""
        if routed.dense_PE is None:
            raise ValueError("objective quality needs the dense pass of the batch; needs_dense says so")
        batch, task = routed.batch, routed.batch["task_id"]
        hidden_PE, _ = labelled_positions(routed.hidden_1SE, batch["labels"])
        sample_P, count_N = labelled_samples(batch["labels"], batch["cu_seq_lens"])
        divergence_P = chunked_divergence(hidden_PE, routed.dense_PE, routed.lm_head, routed.chunk)
        divergence_N = divergence_P.new_zeros(count_N.shape).index_add(0, sample_P, divergence_P) / count_N
        budget_T = torch.tensor(list(self.budgets.values()))
        loss = quality_loss(routed.msr_N, divergence_N, task, budget_T, self.config.cost, self.multipliers)
        return Judgement(loss, {"loss": loss.detach()}, {"kl": divergence_N.detach()})

    def settings(self) -> dict[str, Any]:
        """Kind, cost and budgets."""
        return {"kind": "quality", "cost": self.config.cost, "budgets": self.budgets, "price": self.config.price}


Objective = TargetObjective | QualityObjective


def build_objective(config: ObjectiveConfig, targets: Mapping[str, Interval], limit: float) -> Objective:
    """The objective that a configuration names; targets are read by `target` only."""
    kinds: dict[str, Callable[[], Objective]] = {
        "target": lambda: TargetObjective(targets, limit, config.average),
        "quality": lambda: QualityObjective(config, limit),
    }
    return kinds[config.kind]()
