"""Multipliers of bounds: which ascend when, that they relax, and that MSR settles inside its interval where one signed
multiplier for both bounds leaves it outside. The toy has no model: MSR = sigmoid of a few parameters, which a language
loss pulls one way.
"""

import pytest
import torch
from torch.nn import functional as F

from elastic.data.tasks import TASKS, task_index
from elastic.training import schedules
from elastic.training.multipliers import CLASSES, SPAN, BudgetMultipliers, LagrangeMultipliers
from elastic.training.objective import quality_loss, slacks, sparsity_loss, target_intervals

SENSITIVE, ROBUST = [0.55, 0.68], [0.95, 1.0]
INTERVALS = target_intervals(
    {task: SENSITIVE if task.endswith("_qa") else ROBUST for task in TASKS},
)
CLASS_INTERVALS = [*INTERVALS, (0.55, 1.0)]
STEPS, HEADS_FIRST, WARMUP = 300, 0.3, 0.2


class SignedPrice:
    """The rule before: one signed l1 for both bounds, a mean over the tasks present, no start of its own."""

    def __init__(self) -> None:
        self.l1, self.l2 = torch.zeros(len(TASKS)), torch.zeros(len(TASKS))
        self.rewards: list[torch.Tensor] = []  # by step and task: whether l1 rewards an MSR above its interval

    def step(self, msr_T, shared, progress, rate):
        """The price of a step; the multipliers ascend."""
        bounds = torch.tensor([CLASS_INTERVALS[-1]] * len(TASKS) if shared else INTERVALS)
        distance = F.relu(msr_T - bounds[:, 1]) - F.relu(bounds[:, 0] - msr_T)
        price = (self.l1 * distance + self.l2 * distance**2).mean()
        self.rewards.append((self.l1 < 0) & (distance > 0))
        lr = schedules.learning_rate(progress, rate, WARMUP)
        self.l1 = (self.l1 + lr * distance.detach() / len(TASKS)).clamp(-10, 10)
        self.l2 = (self.l2 + lr * distance.detach() ** 2 / len(TASKS)).clamp(0, 10)
        return price


class PricePerBound:
    """The rule now, by the code that trains."""

    def __init__(self, damping: float = 0.0) -> None:
        self.multipliers = LagrangeMultipliers(10.0, damping)
        self.ascent = torch.optim.SGD(self.multipliers.parameters(), maximize=True)

    def step(self, msr_T, shared, progress, rate):
        class_T = torch.full((len(TASKS),), CLASSES.index(SPAN)) if shared else torch.arange(len(TASKS))
        self.ascent.zero_grad()
        sparsity_loss(msr_T.detach(), class_T, CLASS_INTERVALS, self.multipliers).backward()
        price = sparsity_loss(msr_T, class_T, CLASS_INTERVALS, self._frozen())
        self.ascent.param_groups[0]["lr"] = schedules.learning_rate(
            progress, rate, WARMUP, 0.0 if shared else HEADS_FIRST
        )
        self.ascent.step()
        self.multipliers.project()
        return price

    def _frozen(self):
        """Copies, since the price's backward pass comes after the ascent."""
        copy = LagrangeMultipliers(10.0)
        copy.load_state_dict(self.multipliers.state_dict())
        return copy


def trained(rule, rate: float, pull: float, steps: int = STEPS) -> torch.Tensor:
    """MSR by step and task [steps, T]: what all tasks share learns first, then what is each task's own as well."""
    shared, own = torch.zeros(1, requires_grad=True), torch.zeros(len(TASKS), requires_grad=True)
    descent = torch.optim.SGD([{"params": [shared], "begin": 0.0}, {"params": [own], "begin": HEADS_FIRST}])
    seen = []
    for step in range(steps):
        progress = (step + 1) / (steps + 1)
        for group in descent.param_groups:
            group["lr"] = schedules.learning_rate(progress, 0.5, WARMUP, group["begin"])
        msr_T = torch.sigmoid(shared + own)
        seen.append(msr_T.detach())
        loss = pull * msr_T.sum() + rule.step(msr_T, progress <= HEADS_FIRST, progress, rate)
        descent.zero_grad()
        loss.backward()
        descent.step()
    return torch.stack(seen)


def outside(msr_T) -> torch.Tensor:
    """Signed distance of each task's MSR to its interval."""
    above, below = slacks(msr_T, torch.arange(len(TASKS)), INTERVALS)
    return F.relu(above) - F.relu(below)


@pytest.mark.parametrize("pull", [0.05, 0.2])
def test_msr_settles_inside_its_interval_where_one_signed_price_holds_it_on_the_wrong_side(pull):
    """The language loss pulls towards full heads. The rival's l1, wound up while MSR was below the span, then holds
    sensitive tasks above their interval, against that pull: it rewards what it should punish.
    """
    rival = SignedPrice()
    theirs = trained(rival, 0.6, pull)  # of a mean over five tasks: acts like 0.12
    qa = task_index("single_qa")
    assert outside(theirs[-1])[qa] > 0.05
    assert torch.stack(rival.rewards)[:, qa].sum() > STEPS / 10
    for damping in (0.0, 3.0):
        ours = trained(PricePerBound(damping), 0.12, pull)
        last = torch.stack([outside(msr_T) for msr_T in ours[-STEPS // 5 :]])
        assert last.abs().max() < 0.02, damping  # it leans on a bound; two heads of 90


def test_a_price_ends_where_it_balances_the_pull():
    """Complementary slackness: MSR on the bound that the pull leans on, that bound's price the pull, the other's 0."""
    rule = PricePerBound(damping=3.0)
    end = trained(rule, 0.12, 0.1, steps=6000)[-1]
    torch.testing.assert_close(end, torch.tensor([low for low, _ in INTERVALS]), atol=2e-3, rtol=0)
    torch.testing.assert_close(rule.multipliers.v[:-1], torch.full((len(TASKS),), 0.1), atol=5e-3, rtol=0)
    assert rule.multipliers.u.abs().max() == 0


def ascend(multipliers, msr_of: dict[str, float]) -> dict[str, float]:
    """One step of ascent on a sample of each class, of the MSR in `msr_of`; the prices of `code` after it."""
    ascent = torch.optim.SGD(multipliers.parameters(), lr=1.0, maximize=True)
    ascent.zero_grad()
    msr_N, class_N = torch.tensor(list(msr_of.values())), torch.tensor([CLASSES.index(name) for name in msr_of])
    sparsity_loss(msr_N, class_N, CLASS_INTERVALS, multipliers).backward()
    ascent.step()
    multipliers.project()
    return {name: value for name, value in multipliers.by_class().items() if name.endswith("/code")}


def test_prices_rise_while_their_bound_is_missed_relax_while_it_holds_and_never_reward():
    multipliers = LagrangeMultipliers(limit=0.3)
    assert ascend(multipliers, {"code": 0.8}) == pytest.approx({"u/code": 0, "v/code": 0.15, "l2/code": 0.0225})
    assert ascend(multipliers, {"code": 0.96}) == pytest.approx({"u/code": 0, "v/code": 0.14, "l2/code": 0.0225})
    assert ascend(multipliers, {"code": 0.2})["v/code"] == pytest.approx(0.3)  # the limit
    for _ in range(10):
        relaxed = ascend(multipliers, {"code": 1.0})
    assert relaxed["u/code"] == relaxed["v/code"] == 0
    assert all(value == 0 for name, value in multipliers.by_class().items() if not name.endswith("/code"))


def test_the_span_has_prices_of_its_own_and_those_of_the_tasks_begin_at_zero():
    rule = PricePerBound()
    trained(rule, 0.12, 0.2, steps=10)  # three steps of heads alone
    early = PricePerBound()
    msr_T = torch.full((len(TASKS),), 0.5)
    for step in range(3):
        early.step(msr_T, True, (step + 1) / 11, 0.12)
    found = early.multipliers.by_class()
    assert found.pop("v/span") > 0 == found.pop("u/span") and found.pop("l2/span") > 0
    assert set(found.values()) == {0.0}
    kept = early.multipliers.v[-1].item()
    early.step(msr_T, False, 0.5, 0.12)
    assert early.multipliers.v[-1].item() == kept and (early.multipliers.v[:-1] > 0).all()


def test_a_point_target_is_the_papers_with_l1_the_difference_of_the_two():
    """Price, the routers' gradient and the direction of ascent are those of l1 (MSR - t) + l2 (MSR - t)^2. While the
    slack keeps its sign u - v is l1 at every step; when it turns, both prices move, so that u - v comes back twice as
    fast until one is 0.
    """
    target, generator = 0.7, torch.Generator().manual_seed(0)
    multipliers, l1, l2 = LagrangeMultipliers(), torch.zeros(()), torch.zeros(())
    ascent = torch.optim.SGD(multipliers.parameters(), lr=0.5, maximize=True)
    signs = [1.0] * 20 + [-1.0] * 3
    for sign in signs:
        msr_N = (target + sign * 0.2 * torch.rand(3, generator=generator)).requires_grad_()
        ascent.zero_grad()
        loss = sparsity_loss(msr_N, torch.zeros(3, dtype=torch.int64), [(target, target)], multipliers)
        (gradient,) = torch.autograd.grad(loss, msr_N, retain_graph=True)
        loss.backward()
        distance_N = (msr_N - target).detach()
        u, v = multipliers.u[0].item(), multipliers.v[0].item()
        torch.testing.assert_close(torch.tensor(u - v), l1, atol=1e-6, rtol=0)
        torch.testing.assert_close(loss.detach(), (l1 * distance_N + l2 * distance_N**2).mean())
        torch.testing.assert_close(gradient, (l1 + 2 * l2 * distance_N) / 3)
        torch.testing.assert_close(multipliers.u.grad[0], distance_N.mean())
        torch.testing.assert_close(multipliers.v.grad[0], -distance_N.mean())
        ascent.step()
        multipliers.project()
        both = 2.0 if sign < 0 else 1.0  # u falls and v rises
        l1, l2 = l1 + 0.5 * both * distance_N.mean(), l2 + 0.5 * (distance_N**2).mean()
    assert multipliers.u[0] > 0 < multipliers.v[0]


def test_prices_of_a_budget_settle_on_it_and_relax():
    """KL rises with MSR, and is far over budget at first whatever the routers do; the cost pulls towards sparse."""
    multipliers, budget_T = BudgetMultipliers(50.0, 2.0), torch.full((len(TASKS),), 0.02)
    theta = torch.full((len(TASKS),), -1.0, requires_grad=True)
    descent, ascent = torch.optim.SGD([theta], lr=1.0), torch.optim.SGD(multipliers.parameters(), 1.0, maximize=True)
    highest = 0.0
    for step in range(4000):
        msr_T = torch.sigmoid(theta)
        divergence_T = torch.exp(12 * (msr_T - 1)) + (0.5 if step < 40 else 0.0)
        loss = quality_loss(msr_T, divergence_T, torch.arange(len(TASKS)), budget_T, 3.0, multipliers)
        for optimiser in (descent, ascent):
            optimiser.zero_grad()
        loss.backward()
        descent.step()
        ascent.step()
        multipliers.project()
        highest = max(highest, multipliers.l.max().item())
    torch.testing.assert_close(divergence_T.detach(), budget_T, atol=1e-3, rtol=0)
    assert highest > 20 > 3 > multipliers.l.max()  # 0.6 of cost a task over a slope of 12 * 0.02


def test_starts_and_limits_are_checked():
    with pytest.raises(ValueError, match="multiplier limit=0 is not positive"):
        LagrangeMultipliers(0)
    with pytest.raises(ValueError, match=r"start at \{.*'l2': 20\.0\}, not within 0 and their limit=10; raise"):
        LagrangeMultipliers(10, damping=20.0)
    assert LagrangeMultipliers(10, damping=2.0).l2.tolist() == [2.0] * len(CLASSES)
