"""What training and evaluation measure per task: scores of the answers, and how often each head ran sparse.

Legend: N samples, T task classes, L layers, K KV heads, S tokens, P labelled positions, E hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from elastic.attention.row_slice import RowSlice
from elastic.data.tasks import TASKS
from elastic.routing.methods import Method, columns
from elastic.training.intervals import half_width, normal_half_width
from elastic.training.losses import WHOLE, every_position, labelled_positions, labelled_samples

DIVERGENCE = "kl"


def judged_columns(methods: Sequence[Method]) -> tuple[str, ...]:
    """Names of everything that evaluation measures per sample: `columns` of the methods, and `<method>_kl`, the
    divergence from the dense model in nats an answer token, of all but that model itself.
    """
    return (*columns(methods), *(f"{method.name}_{DIVERGENCE}" for method in methods if method.kind != "dense"))


@dataclass(frozen=True)
class Answers:
    """Teacher-forced answers of N samples.

    Attributes:
        scores: `loss` (mean cross-entropy in nats a token), `accuracy` (share of answer tokens predicted) and `exact`
            (1 if all are), each [N].
        predicted_P, sample_P: most likely token at every labelled position, and the sample it belongs to.
    """

    scores: dict[str, Tensor]
    predicted_P: Tensor
    sample_P: Tensor


@torch.no_grad()
def score_answers(
    hidden_1SE: Tensor,
    lm_head: nn.Module,
    labels_1S: Tensor,
    cu_seq_lens: Tensor,
    chunk: int,
    row_slice: RowSlice = WHOLE,
) -> Answers:
    """Score the answers of a packed row, `chunk` positions of logits at a time; all of them on every process, whichever
    slice of the row the hidden states are of.

    Raises:
        ValueError: a sample without a labelled token.
    """
    hidden_pE, target_p = labelled_positions(hidden_1SE, labels_1S, row_slice)
    sample_P, count = labelled_samples(labels_1S, cu_seq_lens)
    losses, picks = [hidden_pE.new_zeros(0, dtype=torch.float32)], [target_p[:0]]
    for start in range(0, target_p.shape[0], chunk):
        logits, target = lm_head(hidden_pE[start : start + chunk]).float(), target_p[start : start + chunk]
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        picks.append(logits.argmax(-1))
    loss_P, predicted_P, target_P = (
        every_position(of_slice, labels_1S, hidden_1SE.shape[1], row_slice)
        for of_slice in (torch.cat(losses), torch.cat(picks), target_p)
    )
    zeros = torch.zeros_like(count)
    loss = zeros.index_add(0, sample_P, loss_P)
    hits = zeros.index_add(0, sample_P, (predicted_P == target_P).float())
    scores = {"loss": loss / count, "accuracy": hits / count, "exact": (hits == count).float()}
    return Answers(scores, predicted_P, sample_P)


class StepAverages:
    """Scalars of one optimiser step, gathered over its micro-batches and all processes: plain means, and means per
    task.

    What is added stays on its device until `means`, so that a step waits for the GPU once. All processes add the same
    names in the same order.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}  # [2, groups]: sums of the observations and their numbers

    def add(self, name: str, value: Tensor, observations: int = 1) -> None:
        """A scalar, the mean of so many observations."""
        one = torch.full((1,), float(observations), dtype=torch.float64, device=value.device)
        self._add(name, value.detach() * one, one)

    def add_per_task(self, name: str, task_N: Tensor, values_N: Tensor) -> None:
        """One observation per sample, under `name/task`."""
        values_N = values_N.detach().double()
        empty = values_N.new_zeros(len(TASKS))
        task_N = task_N.to(empty.device)
        self._add(name, empty.index_add(0, task_N, values_N), empty.index_add(0, task_N, torch.ones_like(values_N)))

    def _add(self, name: str, total: Tensor, count: Tensor) -> None:
        both = torch.stack([total, count])
        self.sums[name] = self.sums[name] + both if name in self.sums else both

    def means(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Mean of everything observed.

        Args:
            over_processes: sums a tensor over all processes.
        """
        names = [
            place
            for name, both in self.sums.items()
            for place in ([name] if both.shape[1] == 1 else [f"{name}/{task}" for task in TASKS])
        ]
        device = next(iter(self.sums.values())).device
        found = over_processes(torch.cat([both.to(device) for both in self.sums.values()], dim=1))
        return {name: total / count for name, total, count in zip(names, *found.tolist(), strict=True) if count}


class TaskMeans(Metric):
    """Means per group of any number of named columns, over all processes. Groups are the task classes, or those given
    in `names`: for results by source, the sources of the data's manifest (`shards.sources_of`).
    """

    total: Tensor
    square: Tensor
    count: Tensor

    def __init__(self, columns: tuple[str, ...], names: tuple[str, ...] = TASKS) -> None:
        super().__init__()
        self.columns, self.names = columns, names
        zeros = torch.zeros(len(names), len(columns), dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("square", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("count", zeros[:, 0].clone(), dist_reduce_fx="sum")

    def update(self, group_N: Tensor, values: dict[str, Tensor]) -> None:
        """Add samples: the place of each one's group among the names, and one value [N] per column."""
        stacked = torch.stack([values[name].to(self.total.device).double() for name in self.columns], dim=1)
        group_N = group_N.to(self.total.device)
        self.total.index_add_(0, group_N, stacked)
        self.square.index_add_(0, group_N, stacked.square())
        self.count.index_add_(0, group_N, torch.ones_like(stacked[:, 0]))

    def compute(self) -> dict[str, dict[str, float]]:
        """{group: {column: mean, f"{column}_95": half width of its 95 % interval, "n": samples}} of the groups that
        occurred; losses and divergences have no bounds, all other columns are between 0 and 1.
        """
        ways = [normal_half_width if c.endswith(("_loss", f"_{DIVERGENCE}")) else half_width for c in self.columns]
        found: dict[str, dict[str, float]] = {}
        for i, name in enumerate(self.names):
            n = int(self.count[i])
            if n:
                mean = (self.total[i] / n).tolist()
                sums = zip(ways, self.total[i].tolist(), self.square[i].tolist(), strict=True)
                half = [way(total, square, n) for way, total, square in sums]
                widths = [f"{column}_95" for column in self.columns]
                found[name] = dict(zip((*self.columns, *widths), [*mean, *half], strict=True))
                found[name]["n"] = n
        return found


class RouteShare(Metric):
    """Share of samples whose head ran route 1, per task, layer and KV head, over all processes."""

    total: Tensor
    count: Tensor

    def __init__(self, layers: int, kv_heads: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(len(TASKS), layers, kv_heads), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(TASKS)), dist_reduce_fx="sum")

    def update(self, task_N: Tensor, route_LNK: Tensor) -> None:
        """Add the routes of N samples."""
        self.total.index_add_(0, task_N, route_LNK.float().transpose(0, 1))
        self.count.index_add_(0, task_N, torch.ones_like(task_N, dtype=torch.float32))

    def compute(self) -> dict[str, Any]:
        """{task: [L, K]} of the tasks that occurred."""
        return {name: (self.total[i] / self.count[i]).cpu() for i, name in enumerate(TASKS) if self.count[i] > 0}


class LayerDensity(Metric):
    """Share of the query-key pairs that XAttention heads visited, per method and layer: the mean over samples and
    these heads, over all processes. The methods are those whose modes include XAttention.
    """

    total: Tensor
    count: Tensor

    def __init__(self, methods: tuple[str, ...], layers: int) -> None:
        super().__init__()
        self.methods = methods
        self.add_state("total", torch.zeros(len(methods), layers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(len(methods), layers, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, method: str, density_LNK: Tensor, runs_LNK: Tensor) -> None:
        """Add N samples; `runs_LNK` says which heads ran XAttention."""
        place = self.methods.index(method)
        self.total[place] += (density_LNK * runs_LNK).sum((1, 2))
        self.count[place] += runs_LNK.sum((1, 2))

    def compute(self) -> dict[str, list[float | None]]:
        """{method: one number per layer, None without such heads} of the methods that had any."""
        found: dict[str, list[float | None]] = {}
        for method, total, count in zip(self.methods, self.total.tolist(), self.count.tolist(), strict=True):
            if any(count):
                found[method] = [t / c if c else None for t, c in zip(total, count, strict=True)]
        return found
