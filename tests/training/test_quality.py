"""The second objective: divergence from the dense backbone, its budget, and a run through the command."""

import itertools

import pytest
import torch
from torch import nn

from elastic import cli
from elastic.data.tasks import TASKS, task_index
from elastic.training.config import ObjectiveConfig, OptimiserConfig
from elastic.training.losses import chunked_divergence, labelled_samples
from elastic.training.multipliers import BudgetMultipliers
from elastic.training.objective import QualityObjective, RoutedPass, quality_loss
from tests.helpers.training import ROOT, build_data, router_tensors, small_run

QUALITY = ObjectiveConfig("quality", budget=0.05)
QUICK = OptimiserConfig(lr=1e-2, multiplier_lr=50.0, multiplier_limit=1000.0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def plain_divergence(routed, dense, weight):
    """KL(dense || routed) per position as the definition reads, in fp64."""
    p, q = ((hidden.double() @ weight.double().T).softmax(-1) for hidden in (dense, routed))
    return (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_divergence_and_its_gradient_equal_the_plain_fp64_one(chunk):
    torch.manual_seed(0)
    head = nn.Linear(8, 31, bias=False)
    routed, dense = torch.randn(20, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    weights = torch.rand(20)
    mine = chunked_divergence(routed, dense, head, chunk)
    gradients = torch.autograd.grad((mine * weights).sum(), [routed, dense], allow_unused=True)
    theirs = plain_divergence(routed, dense.detach(), head.weight.detach())
    expected = torch.autograd.grad((theirs * weights).sum(), routed)[0]
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0].double(), expected.double(), rtol=1e-4, atol=1e-6)
    assert gradients[1] is None  # the teacher learns nothing


def test_divergence_of_equal_states_is_zero_and_shapes_must_agree():
    head = nn.Linear(4, 9)
    hidden = torch.randn(5, 4)
    assert chunked_divergence(hidden, hidden, head, 2).abs().max() < 1e-6
    assert chunked_divergence(hidden[:0], hidden[:0], head, 2).shape == (0,)
    with pytest.raises(ValueError, match=r"routed hidden states \[5, 4\] and dense ones \[3, 4\] differ"):
        chunked_divergence(hidden, hidden[:3], head, 2)
    with pytest.raises(ValueError, match="chunk=0 is below 1"):
        chunked_divergence(hidden, hidden, head, 0)


def test_quality_loss_by_hand():
    task = torch.tensor([task_index(name) for name in ("single_qa", "single_qa", "code")])
    multipliers = BudgetMultipliers()
    with torch.no_grad():
        multipliers.l.copy_(torch.arange(1.0, 1.0 + len(TASKS)))
    budget = torch.full((len(TASKS),), 0.1)
    loss = quality_loss(torch.tensor([0.2, 0.4, 0.8]), torch.tensor([0.3, 0.5, 0.0]), task, budget, 2.0, multipliers)
    code = 1.0 + task_index("code")
    whole = 2.0 * (1 - (0.3 + 0.8) / 2) + 1.0 * (0.4 - 0.1) + code * (0.0 - 0.1)
    assert loss.item() == pytest.approx(whole, abs=1e-6)
    samples = torch.zeros(len(TASKS))
    samples[task[0]], samples[task[2]] = 2 / 2, 1 / 2  # of a step of two passes, whose mean is descended
    passes = [
        quality_loss(torch.tensor(msr), torch.tensor(kl), task[which], budget, 2.0, multipliers, samples)
        for msr, kl, which in (([0.2], [0.3], [0]), ([0.4, 0.8], [0.5, 0.0], [1, 2]))
    ]
    assert torch.stack(passes).mean().item() == pytest.approx(whole, abs=1e-6)


def test_prices_rise_over_budget_fall_below_it_and_never_leave_their_range():
    multipliers = BudgetMultipliers(limit=3.0)
    ascent = torch.optim.SGD(multipliers.parameters(), lr=10.0, maximize=True)
    task = torch.tensor([task_index("single_qa"), task_index("code")])
    budget = torch.full((len(TASKS),), 0.1)

    def step(divergence: list[float]) -> list[float]:
        ascent.zero_grad()
        quality_loss(torch.zeros(2), torch.tensor(divergence), task, budget, 1.0, multipliers).backward()
        ascent.step()
        multipliers.project()
        return multipliers.l.tolist()

    first = step([0.3, 0.05])
    assert first[0] == pytest.approx(2.0) and first[task_index("code")] == 0.0
    assert first[task_index("summarization")] == 0.0  # absent
    assert step([0.9, 0.05])[0] == 3.0
    assert step([0.0, 0.05])[0] == pytest.approx(2.0)
    assert set(multipliers.by_class()) == {f"l/{name}" for name in TASKS}


def test_prices_begin_where_they_are_told():
    assert BudgetMultipliers(10.0, 4.0).l.tolist() == [4.0] * len(TASKS)
    objective = QualityObjective(ObjectiveConfig("quality", price=5.0), 10.0)
    assert objective.multipliers.l.tolist() == [5.0] * len(TASKS) and objective.settings()["price"] == 5.0
    with pytest.raises(
        ValueError, match=r"start at \{.l.: 20\.0\}, not within 0 and their limit=10\.0; raise the limit"
    ):
        QualityObjective(ObjectiveConfig("quality", price=20.0), 10.0)
    with pytest.raises(ValueError, match=r"objective\.price=-1 is below 0"):
        ObjectiveConfig(price=-1)
    with pytest.raises(ValueError, match=r"objective\.damping=-1 is below 0"):
        ObjectiveConfig(damping=-1)


def packed_problem():
    """Three samples of two tasks in a row of 12 tokens."""
    torch.manual_seed(1)
    labels = torch.full((1, 12), -100)
    for position in (2, 3, 6, 9, 10, 11):
        labels[0, position] = position
    batch = {
        "labels": labels,
        "cu_seq_lens": torch.tensor([0, 4, 8, 12], dtype=torch.int32),
        "task_id": torch.tensor([task_index(name) for name in ("code", "single_qa", "code")]),
    }
    return batch, torch.randn(1, 12, 6, requires_grad=True), torch.randn(6, 6), nn.Linear(6, 13, bias=False)


def test_objective_and_all_its_gradients_equal_a_plain_fp64_implementation():
    batch, hidden, dense, head = packed_problem()
    objective = QualityObjective(ObjectiveConfig("quality", 1.5, 0.2, {"code": 0.1}), 10.0)
    with torch.no_grad():
        objective.multipliers.l.copy_(torch.tensor([2.0, 0.0, 0.0, 3.0, 0.0]))
    ratio = torch.tensor([0.5, 0.25, 0.75], requires_grad=True)
    verdict = objective.judge(RoutedPass(batch, hidden, ratio, dense, head, 2))
    mine = torch.autograd.grad(verdict.loss, [hidden, ratio, objective.multipliers.l])

    answers = [[2, 3], [6], [9, 10, 11]]
    first = list(itertools.accumulate([0, *map(len, answers)]))
    h, r = hidden.detach().double().requires_grad_(), ratio.detach().double().requires_grad_()
    l = objective.multipliers.l.detach().double().requires_grad_()  # noqa: E741
    divergence = [
        plain_divergence(h[0, [p - 1 for p in of_sample]], dense[a:b], head.weight.detach()).mean()
        for of_sample, (a, b) in zip(answers, itertools.pairwise(first), strict=True)
    ]
    code, qa = (divergence[0] + divergence[2]) / 2, divergence[1]
    msr = ((r[0] + r[2]) / 2 + r[1]) / 2
    expected = 1.5 * (1 - msr) + l[task_index("single_qa")] * (qa - 0.2) + l[task_index("code")] * (code - 0.1)
    torch.testing.assert_close(verdict.loss.double(), expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(mine, torch.autograd.grad(expected, [h, r, l]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(verdict.per_task["kl"].double(), torch.stack(divergence).detach(), rtol=1e-4, atol=1e-6)


def test_samples_of_labelled_positions():
    batch, *_ = packed_problem()
    sample, count = labelled_samples(batch["labels"], batch["cu_seq_lens"])
    assert sample.tolist() == [0, 0, 1, 2, 2, 2] and count.tolist() == [2, 1, 3]


def test_a_run_raises_the_price_of_what_is_over_budget(data, tmp_path):
    tight, _, trainer = small_run(data, tmp_path, 3, objective=ObjectiveConfig("quality", budget=1e-4), optimiser=QUICK)
    loose, *_ = small_run(data, tmp_path, 3, objective=ObjectiveConfig("quality", budget=50.0), optimiser=QUICK)
    assert tight.multipliers.l[task_index("single_qa")] > 0
    assert tight.multipliers.l[task_index("code")] == 0  # not in the data
    assert loose.multipliers.l.abs().max() == 0
    names = set(trainer.callback_metrics)
    assert {"train/kl/single_qa", "train/l/single_qa", "train/msr/single_qa", "train/loss"} <= names
    assert not {name for name in names if "regulariser" in name or "/u/" in name}
    bias = [
        [value for name, value in router_tensors(module).items() if name.endswith("head.4.bias")]
        for module in (tight, loose)
    ]
    assert all(b[1] > b[0] for b in bias[1])  # nothing but the cost of full heads: towards sparse
    assert not all(torch.equal(a, b) for a, b in zip(*bias, strict=True))


def test_the_dense_pass_leaves_routes_and_gradients_of_the_routed_pass(data, tmp_path):
    plain, *_ = small_run(data, tmp_path, 2, objective=QUALITY, optimiser=QUICK)
    saving, *_ = small_run(data, tmp_path, 2, objective=QUALITY, optimiser=QUICK, gradient_checkpointing=True)
    one, two = router_tensors(plain), router_tensors(saving)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(value.abs().max() > 0 for name, value in one.items() if name.endswith("head.4.weight"))


def test_a_run_goes_on_under_its_own_objective_only(data, tmp_path):
    _, _, trainer = small_run(data, tmp_path, 2, objective=QUALITY, optimiser=QUICK)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for settings in ({}, {"objective": ObjectiveConfig("quality", budget=0.06)}):
        module, loader, other = small_run(data, tmp_path, 3, fit=False, optimiser=QUICK, **settings)
        with pytest.raises(ValueError, match=r"trained with objective .*'quality'.*this run has"):
            other.fit(module, loader, ckpt_path=str(tmp_path / "a.ckpt"))


def test_two_steps_through_the_command_then_test_and_load(data, tmp_path):
    import elastic
    from elastic.model.checkpoint import read_elastic

    files = [word for name in ("debug.yaml", "objective/quality.yaml") for word in ("-c", str(ROOT / "configs" / name))]
    root = tmp_path / "run"
    flags = [f"--data.data_dir={data}", f"--trainer.default_root_dir={root}", "--trainer.enable_progress_bar=false"]
    assert cli.main(["fit", *files, *flags, "--trainer.max_steps=2", "--model.objective.budgets.single_qa=0.01"]) == 0
    recipe = read_elastic(root / "checkpoint")["recipe"]
    assert recipe["objective"]["kind"] == "quality" and recipe["objective"]["budgets"]["single_qa"] == 0.01
    state = torch.load(root / "last.ckpt", weights_only=True)["state_dict"]
    assert "multipliers.l" in state and "multipliers.u" not in state
    more = [*flags, "--trainer.max_steps=3", "--model.objective.budgets.single_qa=0.01", "--ckpt_path=last"]
    assert cli.main(["fit", *files, *more]) == 0
    assert cli.main(["test", *files, *flags, "--ckpt_path=last", "--model.objective.kind=quality"]) == 0
    assert elastic.load(root / "checkpoint")[0] is not None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ObjectiveConfig("best"), "objective.kind='best' is not known; use one of target, quality"),
        (lambda: ObjectiveConfig(cost=0), "objective.cost=0 is not positive; 1.0 is usual"),
        (lambda: ObjectiveConfig(budget=-1), "objective.budget=-1 is below 0; it counts nats"),
        (lambda: ObjectiveConfig(budgets={"code": float("nan")}), r"objective.budgets\['code'\]=nan is not a finite"),
        (lambda: ObjectiveConfig(budgets={"needle": 0.1}), "unknown task 'needle'"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
