"""The two training objectives (docs/design.md section 5), which routers descend and multipliers ascend.

`target` is the paper's (eq. 8): language loss, and a price on MSR outside the task's target. `quality` asks for the
sparsest routes whose answers stay within a budget of divergence from the dense backbone.
Legend: N samples, T task classes, C = T + 1 classes of `multipliers`, S tokens, P labelled positions, E hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.attention.row_slice import RowSlice
from elastic.data.packing import Batch
from elastic.data.tasks import SENSITIVE, TASKS, task_index
from elastic.training.config import ObjectiveConfig
from elastic.training.losses import WHOLE, answer_divergence, answer_losses, chunked_cross_entropy
from elastic.training.multipliers import CLASSES, SPAN, BudgetMultipliers, LagrangeMultipliers

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


def slacks(msr_N: Tensor, class_N: Tensor, intervals: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """By how much each sample's MSR is above its class's interval and below it, MSR - hi and lo - MSR, [N] each;
    negative where the bound holds.
    """
    bounds = torch.tensor(intervals, dtype=msr_N.dtype, device=msr_N.device)[class_N]
    return msr_N - bounds[:, 1], bounds[:, 0] - msr_N


def sparsity_loss(
    msr_N: Tensor,
    class_N: Tensor,
    intervals: list[tuple[float, float]],
    multipliers: LagrangeMultipliers,
    samples_C: Tensor | None = None,
) -> Tensor:
    """Sum over classes of the mean over their samples of u (MSR - hi) + v (lo - MSR) + l2 d^2, with d the distance of
    MSR to [lo, hi], 0 inside. Scalar.

    Its gradients to u and v are the signed slacks, so that either falls while its bound holds. For lo = hi = t the
    linear part is (u - v) (MSR - t), the paper's l1 = u - v.

    Args:
        class_N: class of each sample, a place in `intervals`.
        samples_C: samples of each class that the means are over; default: those given.
    """
    above_N, below_N = slacks(msr_N, class_N, intervals)
    distance_N = F.relu(above_N) + F.relu(below_N)
    linear_N = multipliers.u[class_N] * above_N + multipliers.v[class_N] * below_N
    samples_C = torch.bincount(class_N, minlength=len(intervals)) if samples_C is None else samples_C
    return ((linear_N + multipliers.l2[class_N] * distance_N**2) / samples_C[class_N]).sum()


def quality_loss(
    msr_N: Tensor,
    divergence_N: Tensor,
    task_N: Tensor,
    budget_T: Tensor,
    cost: float,
    multipliers: BudgetMultipliers,
    samples_T: Tensor | None = None,
) -> Tensor:
    """cost (1 - MSR) + sum over the tasks present of l (KL - budget); MSR and KL averaged within tasks. Scalar.

    MSR is the mean over the tasks present, so that every task weighs the same however many samples it has.

    Args:
        samples_T: samples of each task that the means are over; default: those given.
    """
    samples_T = torch.bincount(task_N, minlength=len(TASKS)) if samples_T is None else samples_T
    over_N = divergence_N - budget_T.to(divergence_N)[task_N]
    full = 1.0 - (msr_N / samples_T[task_N]).sum() / (samples_T > 0).sum()
    return cost * full + (multipliers.l[task_N] * over_N / samples_T[task_N]).sum()


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
        samples_T: samples of each task in the step, divided by the number of its passes, whose mean loss is descended:
            what a sum over this pass's samples is divided by, to be its part of the step's mean. None: this pass is
            the step.
        answer_tokens: labelled tokens in the step, divided likewise.
        row_slice: which part of the row the hidden states are of.
    """

    batch: Batch
    hidden_1SE: Tensor
    msr_N: Tensor
    dense_PE: Tensor | None
    lm_head: nn.Module
    chunk: int
    shared_target: bool = False
    samples_T: Tensor | None = None
    answer_tokens: Tensor | None = None
    row_slice: RowSlice = WHOLE


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
        damping: what the price of the squared distance begins at.
    """

    needs_dense = False
    begins_anew = True  # tasks have prices of their own from when the shared router begins (`optimiser.heads_first`)

    def __init__(
        self, targets: Mapping[str, Interval], limit: float, average: str = "tokens", damping: float = 0.0
    ) -> None:
        self.intervals, self.average, self.damping = target_intervals(targets), average, damping
        self.span = (min(lo for lo, _ in self.intervals), max(hi for _, hi in self.intervals))
        self.multipliers = LagrangeMultipliers(limit, damping)

    def judge(self, routed: RoutedPass) -> Judgement:
        """Cross-entropy of the answers, and the price of MSR outside its targets; while all inputs share one target,
        outside the interval that spans them all, so that robust tasks do not drop what sensitive ones need. Prices that
        are not in force have no gradient, so they stay where they are: at their start until then.
        """
        language, class_N, samples_C = self._language(routed), routed.batch["task_id"], None
        if routed.samples_T is not None:
            samples_C = torch.cat([routed.samples_T, routed.samples_T.sum(0, keepdim=True)])
        if routed.shared_target:
            class_N = torch.full_like(class_N, CLASSES.index(SPAN))
        regulariser = sparsity_loss(routed.msr_N, class_N, [*self.intervals, self.span], self.multipliers, samples_C)
        parts = {"loss": language.detach(), "regulariser": regulariser.detach()}
        return Judgement(language + regulariser, parts, {})

    def _language(self, routed: RoutedPass) -> Tensor:
        batch, answers = routed.batch, (routed.hidden_1SE, routed.lm_head, routed.batch["labels"])
        if self.average == "tokens":
            return chunked_cross_entropy(*answers, routed.chunk, routed.answer_tokens, routed.row_slice)
        loss_N, task_N = (
            answer_losses(*answers, batch["cu_seq_lens"], routed.chunk, routed.row_slice),
            batch["task_id"],
        )
        samples_T = torch.bincount(task_N, minlength=len(TASKS)) if routed.samples_T is None else routed.samples_T
        return (loss_N / samples_T[task_N]).sum() / (samples_T > 0).sum()

    def settings(self) -> dict[str, Any]:
        """Kind, targets, what cross-entropy is averaged over, and damping."""
        targets = dict(zip(TASKS, self.intervals, strict=True))
        return {"kind": "target", "targets": targets, "average": self.average, "damping": self.damping}


class QualityObjective:
    """The sparsest routes within a budget of divergence from the dense backbone: `quality_loss`.

    No labels are fitted: the dense pass of the same frozen backbone is the teacher, so nothing is fine-tuned through
    the choice of heads. Full heads are kept only where they pay.

    Args:
        config: cost and budgets.
        limit: bound on the multipliers.
    """

    needs_dense = True
    begins_anew = False  # a budget is of a task from the start, whatever part of the routers learns

    def __init__(self, config: ObjectiveConfig, limit: float) -> None:
        self.config = config
        self.budgets = {task: float(config.budgets.get(task, config.budget)) for task in TASKS}
        self.multipliers = BudgetMultipliers(limit, config.price)

    def judge(self, routed: RoutedPass) -> Judgement:
        """Share of full heads, and the price of divergence over budget; no cross-entropy is computed."""
        if routed.dense_PE is None:
            raise ValueError("objective quality needs the dense pass of the batch; needs_dense says so")
        batch, task = routed.batch, routed.batch["task_id"]
        divergence_N = answer_divergence(
            routed.hidden_1SE, routed.dense_PE, routed.lm_head, batch["labels"], batch["cu_seq_lens"], routed.chunk,
            routed.row_slice,
        )  # fmt: skip
        budget_T = torch.tensor(list(self.budgets.values()))
        loss = quality_loss(
            routed.msr_N, divergence_N, task, budget_T, self.config.cost, self.multipliers, routed.samples_T
        )
        return Judgement(loss, {"loss": loss.detach()}, {"kl": divergence_N.detach()})

    def settings(self) -> dict[str, Any]:
        """Kind, cost and budgets."""
        return {"kind": "quality", "cost": self.config.cost, "budgets": self.budgets, "price": self.config.price}


Objective = TargetObjective | QualityObjective


def build_objective(config: ObjectiveConfig, targets: Mapping[str, Interval], limit: float) -> Objective:
    """The objective that a configuration names; targets are read by `target` only."""
    kinds: dict[str, Callable[[], Objective]] = {
        "target": lambda: TargetObjective(targets, limit, config.average, config.damping),
        "quality": lambda: QualityObjective(config, limit),
    }
    return kinds[config.kind]()
