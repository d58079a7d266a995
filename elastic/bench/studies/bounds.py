"""What equal quality means: bounds on what a method may lose against the dense model, one for retrieval and one for
each other source.

Retrieval is the mean of exact answers over the sources of sensitive tasks, each source of the same weight. Sources of
robust tasks have a bound each, so that no rise of one is hidden by another's fall: loss where answers are running text
(summaries, continuations, code), exact answers elsewhere. Sources that differ only in length and system prompt
(`foreign_code-2048-long`) are bound together: each has too few samples to tell 2 % from noise.
Values are tensors of any one shape: a point's means, or means by draw and level (`paired.Resamples`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.data.source_names import generator_of, kind_of
from elastic.data.tasks import SENSITIVE, bound_score

KEPT, RISE = 0.97, 0.02  # equal quality: share of dense's exact answers that must stay, rise of loss that may be
CHOSEN = 0.99  # share of retrieval that a point to be chosen keeps: the best of several owes some of its lead to luck
RETRIEVAL = "retrieval"
# Task class by generator, for results from before they told it (`source_tasks`).
GENERATOR_TASKS = {
    **dict.fromkeys(("needle_single", "needle_multi_key", "needle_multi_value", "needle_multi_query"), "single_qa"),
    **dict.fromkeys(("verbatim_copy", "passage_qa"), "single_qa"),
    **dict.fromkeys(("fact_chain", "variable_tracking"), "multihop_qa"),
    **dict.fromkeys(("continuation", "summary"), "summarization"),
    "code_completion": "code",
    "many_shot": "in_context",
    **dict.fromkeys(("foreign_pass_key", "foreign_needle", "foreign_json", "foreign_play"), "single_qa"),
    **dict.fromkeys(("foreign_last_paragraph", "foreign_chat"), "single_qa"),
    "foreign_multi_needle": "multihop_qa",
    **dict.fromkeys(("foreign_continuation", "foreign_summary"), "summarization"),
    "foreign_code": "code",
}


def task_of(source: str, known: Mapping[str, str]) -> str:
    """Task class of a source: as the results tell, or of a generator by its name.

    Raises:
        ValueError: neither knows it.
    """
    task = known.get(source) or GENERATOR_TASKS.get(generator_of(source))
    if task is None:
        raise ValueError(
            f"source {source!r} is of no task class that its results tell; evaluate again (results have `source_tasks` "
            "now), and give each source one task"
        )
    return task


@dataclass(frozen=True)
class Kept:
    """What a method keeps of the dense model's quality.

    Attributes:
        shares: `retrieval` and the kinds of sources judged by exact answers: exact answers as a share of dense's.
        losses: the kinds of sources judged by loss: loss as a multiple of dense's.
    """

    shares: dict[str, Tensor]
    losses: dict[str, Tensor]

    def slack(self, kept: float = KEPT, only_retrieval: bool = False) -> Tensor:
        """How far inside all bounds: 1 = as good as dense, 0 = on a bound, below 0 = worse.

        Args:
            kept: share of retrieval that must stay; sources have `KEPT` and `RISE`.
            only_retrieval: leave the sources of robust tasks out.
        """
        inside = [(self.shares[RETRIEVAL] - kept) / (1 - kept)] if RETRIEVAL in self.shares else []
        if not only_retrieval:
            inside += [(share - KEPT) / (1 - KEPT) for name, share in self.shares.items() if name != RETRIEVAL]
            inside += [(RISE - (loss - 1)) / RISE for loss in self.losses.values()]
        if not inside:
            raise ValueError("no source of a sensitive task, so retrieval cannot be judged; evaluate on such data too")
        return torch.stack(torch.broadcast_tensors(*inside)).amin(0)


def kept(tasks: Mapping[str, str], mine: Callable[[str, str], Tensor], dense: Callable[[str, str], Tensor]) -> Kept:
    """Compare a method with the dense model.

    Args:
        tasks: task class of every source.
        mine, dense: mean of a source's score, by source and score.
    """
    sensitive = [source for source, task in tasks.items() if task in SENSITIVE]
    shares: dict[str, Tensor] = {}
    if sensitive:
        shares[RETRIEVAL] = _share(*(_mean(of(source, "exact") for source in sensitive) for of in (mine, dense)))
    losses = {}
    robust: dict[tuple[str, str], list[str]] = {}
    for source, task in tasks.items():
        if task not in SENSITIVE:
            robust.setdefault((kind_of(source), bound_score(task)), []).append(source)
    for (kind, score), sources in robust.items():
        of_kind = [_mean(of(source, score) for source in sources) for of in (mine, dense)]
        if score == "loss":
            losses[kind] = of_kind[0] / of_kind[1]
        else:
            shares[kind] = _share(*of_kind)
    return Kept(shares, losses)


def _mean(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _share(mine: Tensor, dense: Tensor) -> Tensor:
    """A dense model that answers nothing right has nothing to lose."""
    return torch.where(dense > 0, mine / dense.clamp_min(torch.finfo(dense.dtype).tiny), torch.ones_like(mine))
