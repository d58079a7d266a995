"""A training step is that of its rows, however they are cut into micro-batches: routes, scalars, gradients."""

from types import SimpleNamespace

import pytest
import torch

from elastic.data.tasks import TASKS
from elastic.model import fused_parts
from elastic.model.fused_parts import Parts
from elastic.training.config import ObjectiveConfig, OptimiserConfig
from elastic.training.metrics import StepAverages
from elastic.training.module import ElasticModule
from tests.helpers.training import SMALL, build_data, router_tensors, small_run

OBJECTIVES = {
    "target, mean over tokens": ObjectiveConfig(),
    "target, mean over tasks": ObjectiveConfig(average="tasks"),
    "quality": ObjectiveConfig("quality", budget=1e-4, price=1.0),
}
SPEED = {"train/step_seconds", "train/tokens_per_second"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def two_steps(data, folder, objective, cut):
    """Scalars, routes of the last step, and what was trained, in micro-batches of `cut` out of 8 rows."""
    optimiser = OptimiserConfig(lr=1e-2, multiplier_lr=0.5)
    _, loader, trainer = small_run(data, folder, fit=False, rows_per_step=8)
    module, seen = ElasticModule(elastic=SMALL, objective=objective, optimiser=optimiser), []
    judge = module.objective.judge
    module.objective.judge = lambda routed: (seen.append(routed.msr_N.detach()), judge(routed))[1]
    loader.micro_batch_rows = cut
    torch.manual_seed(0)
    trainer.fit(module, loader)
    scalars = {name: float(value) for name, value in trainer.callback_metrics.items() if name not in SPEED}
    return scalars, torch.cat(seen), router_tensors(module)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_step_is_that_of_its_rows(data, tmp_path, kind):
    whole = two_steps(data, tmp_path, OBJECTIVES[kind], 8)
    assert {"train/loss", "train/objective", "train/router_entropy", "train/gradient_norm"} < whole[0].keys()
    for cut in (1, 2):
        scalars, ratios, trained = two_steps(data, tmp_path, OBJECTIVES[kind], cut)
        torch.testing.assert_close(ratios, whole[1])
        assert scalars == pytest.approx(whole[0], rel=1e-4, abs=1e-6)
        for name, value in trained.items():
            torch.testing.assert_close(value, whole[2][name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_both_passes_of_a_divergence_run_by_the_same_parts(data, tmp_path, monkeypatch):
    """However few tokens they have: of a GPU that rounds, a model as dense as its teacher would else differ from it."""
    take, runs = Parts.take, set()

    def taken(parts, hidden, *weights):
        on_gpu = SimpleNamespace(device=torch.device("cuda"), shape=hidden.shape)
        runs.add((torch.is_grad_enabled(), take(parts, on_gpu)))
        return take(parts, hidden, *weights)

    monkeypatch.setattr(fused_parts, "unfused_reason", lambda _: None)
    monkeypatch.setattr(Parts, "take", taken)
    two_steps(data, tmp_path, OBJECTIVES["quality"], 8)
    assert runs == {(False, True), (True, True)}


def test_averages_are_over_observations_of_all_processes():
    """Each of three equal processes adds what is added here, so that the means stay and counts triple."""
    averages, sent = StepAverages(), []
    averages.add("entropy", torch.tensor(1.0), 3)
    averages.add("entropy", torch.tensor(5.0), 1)
    averages.add_per_task("msr", torch.tensor([0, 2, 0]), torch.tensor([0.0, 0.25, 1.0]))
    averages.add_per_task("msr", torch.tensor([0]), torch.tensor([0.5]))

    def tripled(part):
        sent.append(part)
        return 3 * part

    assert averages.means(tripled) == {"entropy": 2.0, f"msr/{TASKS[0]}": 0.5, f"msr/{TASKS[2]}": 0.25}
    assert len(sent) == 1
