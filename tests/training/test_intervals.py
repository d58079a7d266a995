"""Intervals of means: against tables, and how often they hold the true mean where samples are few."""

import pytest
import torch

from elastic.data.tasks import TASKS
from elastic.training.intervals import half_width, normal_half_width, wilson
from elastic.training.metrics import TaskMeans


def test_wilson_against_tables():
    """8 of 10 gives 0.490 to 0.943."""
    assert wilson(0.8, 10) == pytest.approx((0.490, 0.943), abs=1e-3)
    low, high = wilson(1.0, 2)
    assert high == 1.0 and low == pytest.approx(0.342, abs=1e-3)
    assert wilson(0.0, 2)[0] == 0.0
    with pytest.raises(ValueError, match="n=0"):
        wilson(0.5, 0)


@pytest.mark.parametrize("n", [1, 2, 5, 10, 40])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8, 0.95, 1.0])
def test_intervals_of_shares_hold_the_share(n, share):
    """19 times out of 20, roughly; those of the normal approximation hold 0.95 in a tenth of all pairs of samples."""
    generator = torch.Generator().manual_seed(n)
    right = torch.bernoulli(torch.full((4000, n), share), generator=generator).sum(1).tolist()
    held = [abs(total / n - share) <= half_width(total, total, n) + 1e-12 for total in right]
    assert sum(held) / len(held) > 0.89
    if n == 2 and share == 0.95:
        held = [abs(total / n - share) <= normal_half_width(total, total, n) for total in right]
        assert sum(held) / len(held) < 0.15


def test_intervals_of_many_graded_scores_are_those_of_the_normal_approximation():
    scores = 0.4 + 0.2 * torch.rand(5000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sums = float(scores.sum()), float(scores.square().sum()), 5000
    assert half_width(*sums) == pytest.approx(normal_half_width(*sums), rel=0.03)
    assert normal_half_width(*sums) == pytest.approx(1.96 * float(scores.std()) / 5000**0.5)


def test_two_samples_that_agree_have_an_interval():
    means = TaskMeans(("dense_exact", "dense_loss", "elastic_kl", "msr"))
    ones = torch.ones(2)
    means.update(torch.zeros(2, dtype=torch.int64), dict.fromkeys(means.columns, ones))
    means.update(torch.ones(1, dtype=torch.int64), dict.fromkeys(means.columns, ones[:1]))
    found = means.compute()
    two, one = found[TASKS[0]], found[TASKS[1]]
    assert two["dense_exact"] == 1.0 and two["dense_exact_95"] > 0.6 < two["msr_95"]
    assert one["dense_exact_95"] > 0.7 and one["dense_loss_95"] != one["dense_loss_95"]  # NaN
