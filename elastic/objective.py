"""The training objective (spec section 5; paper eq. 8): language loss, task targets on MSR, and Lagrange multipliers.

Legend: N samples, T task classes, S tokens, E hidden size, V vocabulary.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from elastic.packed import IGNORE
from elastic.tasks import SENSITIVE, TASKS, task_index

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


class LagrangeMultipliers(nn.Module):
    """l1 and l2 per task class: the price of an MSR outside its target. They ascend while the routers descend.

    Args:
        limit: bound on |l1| and l2, so that a target that cannot be met does not wind a multiplier up for ever.
    """

    def __init__(self, limit: float = 10.0) -> None:
        super().__init__()
        if not limit > 0:
            raise ValueError(f"multiplier limit={limit} is not positive; 10 is usual")
        self.limit = limit
        self.l1 = nn.Parameter(torch.zeros(len(TASKS)))
        self.l2 = nn.Parameter(torch.zeros(len(TASKS)))

    def by_task(self) -> dict[str, float]:
        """`l1/<task>` and `l2/<task>` of every task class."""
        rows = (("l1", self.l1.tolist()), ("l2", self.l2.tolist()))
        return {f"{name}/{task}": value for name, row in rows for task, value in zip(TASKS, row, strict=True)}

    @torch.no_grad()
    def project(self) -> None:
        """Back into the allowed range: |l1| <= limit, 0 <= l2 <= limit. Call after every ascent step."""
        self.l1.clamp_(-self.limit, self.limit)
        self.l2.clamp_(0.0, self.limit)


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
    price = multipliers.l1[task_N] * distance + multipliers.l2[task_N] * distance.square()
    share = torch.bincount(task_N, minlength=len(TASKS)).to(price.dtype)
    return (price / share[task_N]).sum() / (share > 0).sum()


def chunked_cross_entropy(hidden_1SE: Tensor, lm_head: nn.Module, labels_1S: Tensor, chunk: int) -> Tensor:
    """Mean next-token cross-entropy over labelled tokens, `chunk` positions of logits [chunk, V] at a time.

    Only positions that predict a labelled token reach the head, and their logits are recomputed in the backward pass:
    no [S, V] tensor ever exists. Labels are aligned with the inputs and shifted here.

    Raises:
        ValueError: no labelled token, or a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is below 1; it counts positions, 1024 is usual")
    hidden_PE, target_P = labelled_positions(hidden_1SE, labels_1S)
    if not target_P.numel():
        raise ValueError("the batch has no labelled token; every sample needs an answer")
    total = hidden_PE.new_zeros((), dtype=torch.float32)
    for start in range(0, target_P.shape[0], chunk):
        part = slice(start, start + chunk)
        total = total + checkpoint(_summed_loss, hidden_PE[part], target_P[part], lm_head, use_reentrant=False)
    return total / target_P.shape[0]


def labelled_positions(hidden_1SE: Tensor, labels_1S: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [P, E] that predict a labelled token, and those tokens [P]."""
    target = labels_1S[:, 1:]
    chosen = target != IGNORE
    return hidden_1SE[:, :-1][chosen], target[chosen]


def _summed_loss(hidden_PE: Tensor, target_P: Tensor, lm_head: nn.Module) -> Tensor:
    return F.cross_entropy(lm_head(hidden_PE).float(), target_P, reduction="sum")
