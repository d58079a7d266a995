"""The objective: targets, multipliers, regulariser, chunked language loss, schedules."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from elastic.data.tasks import ROBUST, SENSITIVE, TASKS, task_index
from elastic.training import schedules
from elastic.training.config import ObjectiveConfig
from elastic.training.losses import answer_losses, chunked_cross_entropy, labelled_positions
from elastic.training.multipliers import CLASSES, LagrangeMultipliers
from elastic.training.objective import (
    RoutedPass,
    TargetObjective,
    slacks,
    sparsity_loss,
    target_intervals,
)


def test_default_targets_are_the_papers():
    assert target_intervals({}) == [(0.7, 0.7) if task in SENSITIVE else (1.0, 1.0) for task in TASKS]
    assert {"code": (0.5, 0.9)}.items() <= dict(zip(TASKS, target_intervals({"code": [0.5, 0.9]}), strict=True)).items()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({"retrieval": 0.5}, "unknown task 'retrieval'; known tasks are single_qa"),
        ({"code": 1.5}, "target of task 'code' is 1.5; expected t or \\[lo, hi\\]"),
        ({"code": [0.9, 0.5]}, "0 <= lo <= hi <= 1"),
        ({"code": [0.1, 0.5, 0.9]}, "expected t or"),
        ({"code": math.nan}, "is nan; expected"),
    ],
)
def test_bad_targets_are_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        target_intervals(targets)


def test_slacks_are_signed_and_of_one_bound_each():
    intervals = target_intervals({"code": [0.4, 0.6]})
    task = torch.full((4,), task_index("code"))
    above, below = slacks(torch.tensor([0.3, 0.4, 0.6, 0.8]), task, intervals)
    torch.testing.assert_close(above, torch.tensor([-0.3, -0.2, 0.0, 0.2]))
    torch.testing.assert_close(below, torch.tensor([0.1, 0.0, -0.2, -0.4]))


def filled(u: float = 0.0, v: float = 0.0, l2: float = 0.0) -> LagrangeMultipliers:
    multipliers = LagrangeMultipliers()
    with torch.no_grad():
        for name, value in (("u", u), ("v", v), ("l2", l2)):
            getattr(multipliers, name).fill_(value)
    return multipliers


def test_regulariser_averages_within_tasks_and_sums_over_them():
    ratio = torch.tensor([0.5, 0.7, 0.7, 0.8])
    task = torch.tensor([task_index(t) for t in ("single_qa", "single_qa", "single_qa", "code")])
    intervals = target_intervals({"single_qa": [0.6, 0.65]})
    loss = sparsity_loss(ratio, task, intervals, filled(u=2.0, v=5.0, l2=3.0))
    msr = (0.5 + 0.7 + 0.7) / 3
    qa = 2 * (msr - 0.65) + 5 * (0.6 - msr) + 3 * (0.1**2 + 0.05**2 + 0.05**2) / 3
    code = 2 * (0.8 - 1) + 5 * (1 - 0.8) + 3 * 0.04
    assert loss.item() == pytest.approx(qa + code, abs=1e-6)
    parts = [
        sparsity_loss(ratio[part], task[part], intervals, filled(2.0, 5.0, 3.0), torch.tensor([3.0, 0, 0, 1.0, 0]) / 2)
        for part in (slice(0, 2), slice(2, 4))
    ]  # two passes of a step, whose mean is descended
    assert torch.stack(parts).mean().item() == pytest.approx(qa + code, abs=1e-6)


def test_ascent_moves_multipliers_against_the_violation_and_descent_moves_msr_to_its_target():
    multipliers = filled()
    ratio = torch.tensor([0.9, 0.5], requires_grad=True)  # single_qa too sparse, code too full
    task = torch.tensor([task_index("single_qa"), task_index("code")])
    ascent = torch.optim.SGD(multipliers.parameters(), lr=1.0, maximize=True)
    sparsity_loss(ratio, task, target_intervals({}), multipliers).backward()
    ascent.step()
    multipliers.project()
    code = task_index("code")
    assert multipliers.u[0] > 0 == multipliers.v[0] and multipliers.v[code] > 0 == multipliers.u[code]
    assert multipliers.l2[0] > 0 < multipliers.l2[code]
    assert multipliers.u[1] == multipliers.v[1] == multipliers.l2[1] == 0  # absent tasks stay
    ratio.grad = None
    sparsity_loss(ratio, task, target_intervals({}), multipliers).backward()
    assert ratio.grad is not None and ratio.grad[0] > 0 > ratio.grad[1]


def test_projection_bounds_the_multipliers():
    multipliers = filled(u=-50.0, v=50.0, l2=-1.0)
    multipliers.project()
    assert multipliers.u.tolist() == multipliers.l2.tolist() == [0.0] * len(CLASSES)
    assert multipliers.v.tolist() == [10.0] * len(CLASSES)
    names = {f"{name}/{task}" for name in ("u", "v", "l2") for task in (*SENSITIVE, *ROBUST, "span")}
    assert set(multipliers.by_class()) == names


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunked_cross_entropy_equals_the_plain_one_with_its_gradients(chunk):
    torch.manual_seed(0)
    head = nn.Linear(8, 31, bias=False)
    hidden = torch.randn(1, 20, 8, requires_grad=True)
    labels = torch.randint(0, 31, (1, 20))
    labels[0, :9] = -100
    labels[0, 12:14] = -100
    loss = chunked_cross_entropy(hidden, head, labels, chunk)
    mine = torch.autograd.grad(loss, [hidden, head.weight])
    plain = F.cross_entropy(head(hidden)[0, :-1], labels[0, 1:], ignore_index=-100)
    theirs = torch.autograd.grad(plain, [hidden, head.weight])
    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-6)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def packed_answers():
    """Hidden states, labels and bounds of four answers of 1, 2, 6 and 3 tokens; the task of each."""
    torch.manual_seed(0)
    labels = torch.full((1, 24), -100)
    bounds = torch.tensor([0, 4, 9, 18, 24])
    for end, length in zip(bounds[1:].tolist(), (1, 2, 6, 3), strict=True):
        labels[0, end - length : end] = torch.randint(0, 31, (length,))
    return torch.randn(1, 24, 8, requires_grad=True), labels, bounds, torch.tensor([1, 1, 3, 0])


@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_losses_of_answers_equal_the_plain_ones(chunk):
    hidden, labels, bounds, _ = packed_answers()
    head = nn.Linear(8, 31, bias=False)
    found = answer_losses(hidden, head, labels, bounds, chunk)
    for i, (begin, end) in enumerate(pairwise(bounds.tolist())):
        alone = chunked_cross_entropy(hidden[:, begin:end], head, labels[:, begin:end], 1000)
        torch.testing.assert_close(found[i], alone)
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert gradient[0, 17].abs().sum() == 0 < gradient[0, 16].abs().sum()  # the last position predicts nothing


def test_an_average_over_tasks_lets_short_answers_count():
    hidden, labels, bounds, task = packed_answers()
    head = nn.Linear(8, 31, bias=False)
    batch = {"labels": labels, "cu_seq_lens": bounds, "task_id": task}
    routed = RoutedPass(batch, hidden, torch.full((4,), 0.7), None, head, 4)
    by = {name: TargetObjective({}, 10.0, name).judge(routed).parts["loss"] for name in ("tokens", "tasks")}
    one, two, six, three = answer_losses(hidden, head, labels, bounds, 4).detach()
    torch.testing.assert_close(by["tokens"], (one + 2 * two + 6 * six + 3 * three) / 12)
    torch.testing.assert_close(by["tasks"], ((one + two) / 2 + six + three) / 3)
    with pytest.raises(ValueError, match=r"objective\.average='rows' is not known; use one of tokens, tasks"):
        ObjectiveConfig(average="rows")


def test_inputs_that_are_routed_alike_share_the_widest_target():
    hidden, labels, bounds, task = packed_answers()
    batch = {"labels": labels, "cu_seq_lens": bounds, "task_id": task}
    targets = {"single_qa": [0.5, 0.6], "multihop_qa": [0.6, 0.7], "code": [0.9, 1.0], "summarization": 0.95}
    objective = TargetObjective({**targets, "in_context": 1.0}, 10.0)
    objective.multipliers = filled(u=2.0, v=2.5, l2=3.0)
    head = nn.Linear(8, 31, bias=False)

    def judged(ratio, shared_target, samples=None):
        objective.multipliers.zero_grad()
        routed = RoutedPass(batch, hidden, torch.tensor(ratio), None, head, 4, shared_target, samples)
        verdict = objective.judge(routed)
        verdict.loss.backward()
        return float(verdict.parts["regulariser"]), objective.multipliers.v.grad.nonzero()[:, 0].tolist()

    assert objective.span == (0.5, 1.0)
    mean = 0.45  # one class: the mean is over all samples
    alike = 2.0 * (mean - 1.0) + 2.5 * (0.5 - mean) + 3.0 * (0.1**2 + 0.1**2) / 4
    every = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.0])
    for samples in (None, every):
        assert judged([0.4, 0.5, 0.5, 0.4], True, samples) == (pytest.approx(alike), [len(TASKS)])  # the span's alone
        assert judged([0.75] * 4, False, samples)[1] == sorted({0, 1, 3})  # those of the tasks that are there


def test_only_labelled_positions_reach_the_head_a_chunk_at_a_time():
    seen = []

    class Head(nn.Module):
        def forward(self, hidden):
            seen.append(hidden.shape[0])
            return hidden @ torch.ones(4, 5)

    labels = torch.full((1, 50), -100)
    labels[0, 40:] = 1
    hidden = torch.randn(1, 50, 4, requires_grad=True)
    chunked_cross_entropy(hidden, Head(), labels, 4).backward()
    assert max(seen) == 4 and sum(seen) == 20  # ten positions, once forward and once recomputed
    assert labelled_positions(hidden, labels)[1].tolist() == [1] * 10


def test_a_batch_without_labels_is_refused():
    with pytest.raises(ValueError, match="no labelled token; every sample needs an answer"):
        chunked_cross_entropy(torch.randn(1, 4, 2), nn.Linear(2, 3), torch.full((1, 4), -100), 8)
    with pytest.raises(ValueError, match="chunk=0 is below 1"):
        chunked_cross_entropy(torch.randn(1, 4, 2), nn.Linear(2, 3), torch.ones(1, 4, dtype=torch.int64), 0)


def test_temperature_reaches_its_floor_when_told():
    assert schedules.temperature(0.0, 2.0, 0.3, 0.6) == 2.0
    assert schedules.temperature(0.6, 2.0, 0.3, 0.6) == pytest.approx(0.3)
    assert schedules.temperature(0.59, 2.0, 0.3, 0.6) > 0.3
    assert schedules.temperature(1.0, 2.0, 0.3, 0.6) == 0.3


def test_learning_rate_warms_up_linearly_and_decays_by_a_cosine():
    assert schedules.learning_rate(0.1, 1.0, 0.2) == pytest.approx(0.5)
    assert schedules.learning_rate(0.2, 1.0, 0.2) == pytest.approx(1.0)
    assert schedules.learning_rate(0.6, 1.0, 0.2) == pytest.approx(0.5)
    assert schedules.learning_rate(1.0, 1.0, 0.2) == pytest.approx(0.0)
    for progress, same in ((0.3, 0.0), (0.5, 0.0), (0.55, 0.1), (0.8, 0.6), (1.0, 1.0)):
        late = schedules.learning_rate(progress, 1.0, 0.2, begin=0.5)
        assert late == pytest.approx(schedules.learning_rate(same, 1.0, 0.2))


@given(st.floats(0, 1), st.floats(0.01, 0.99), st.floats(0, 0.99))
def test_learning_rate_stays_in_range(progress, warmup, begin):
    assert -1e-12 <= schedules.learning_rate(progress, 3.0, warmup, begin) <= 3.0 + 1e-12
