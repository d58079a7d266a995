"""`elastic bench training` on the CPU: the reference recipe equals routed training, and the options are checked."""

import argparse
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic import cli
from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import packed_layout
from elastic.attention.row_slice import RowSlice
from elastic.bench import step as step_module
from elastic.bench import training
from elastic.bench.step import Step, bounds_of, random_backbone, random_row
from elastic.bench.timing import Timing
from elastic.bench.training import BothModes, both_modes, routed_output, spread_routes
from elastic.config import ElasticConfig, SparseConfig
from elastic.data.packing import IGNORE
from elastic.model.attach import last_routes, routers, set_row_slice

CPU = torch.device("cpu")
SPARSE = SparseConfig(sink=64, window=64, block=64)


def test_the_recipe_of_both_modes_equals_the_routed_one() -> None:
    layout = packed_layout(torch.tensor([0, 140, 300]), None, 300, CPU)
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, 300, 16) for heads in (4, 2, 2)]
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    route = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(1, 300, 4, 16, generator=generator, dtype=torch.float64)
    plan, found = HeadPlan.build(route, SPARSE, layout), []
    for attend in (both_modes, routed_output):
        out = attend(*leaves, route, plan, 0.3)
        found.append((out, *torch.autograd.grad(out, (*leaves, route), grad)))
    for both, routed in zip(*found, strict=True):
        torch.testing.assert_close(both, routed, rtol=1e-4, atol=1e-5)
    assert found[0][-1].abs().min() > 1e-3


def test_routes_are_spread_evenly() -> None:
    routes = spread_routes(5, 1, 8, 0.7)
    assert routes.shape == (5, 1, 8) and routes.sum() == 28
    assert {int(layer.sum()) for layer in routes} <= {5, 6}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Shapes that a CPU can run, with a window shorter than their rows, each call timed once."""
    monkeypatch.setattr(training, "SparseConfig", lambda: SPARSE)
    monkeypatch.setattr(step_module, "ElasticConfig", lambda: ElasticConfig(sparse=SPARSE))
    for module in (training, step_module):
        for name, value in {"HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 64}.items():
            monkeypatch.setattr(module, name, value, raising=False)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    monkeypatch.setattr(step_module, "SHARED", {**step_module.SHARED, **sizes})
    for shape in step_module.SHAPES.values():
        for name, value in {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 99}.items():
            monkeypatch.setitem(shape, name, value)
    monkeypatch.setattr(training, "LAYERS", 1)
    monkeypatch.setattr(training, "measure", lambda call, **_: (call(), Timing(2.0, 1))[1])
    monkeypatch.setattr(training, "timed_steps", lambda call, *_: (call(), Timing(2.0, 1))[1])
    parser = argparse.ArgumentParser()
    training.add_arguments(parser)
    return parser.parse_args(["--length", "1152", "--layers", "2", "--msr", "0.5"])


def test_records_of_attention(small: argparse.Namespace) -> None:
    found = {(r["who"], r["metric"]): r["value"] for r in training.attention_records(small, CPU)}
    assert found["routed", "largest difference"] < 0.02
    for who in ("routed, share 1", "routed, share 0.125"):
        assert found[who, "step time"] == 2.0 and found[who, "speed over both modes"] == 1.0


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen3-4b"])
def test_a_step_of_both_recipes_has_the_same_gradients(small: argparse.Namespace, name: str) -> None:
    model = random_backbone(name, 2, small.msr, False, CPU).float()
    batch = random_row(1152, 1, 99, CPU)
    assert (batch["labels"] != IGNORE).sum() == step_module.ANSWER and bounds_of(2560, 2).tolist() == [0, 1280, 2560]
    for router in routers(model):
        torch.nn.init.normal_(router.head[-1].weight, std=0.1)
    found: list[list[Tensor]] = []
    for row_slice in (BothModes(), RowSlice()):
        step = Step(model, batch, 1.0, small.msr)
        step.descent.zero_grad = lambda: None  # type: ignore[method-assign,misc,assignment]
        set_row_slice(model, row_slice)
        step()
        found.append([p.grad.clone() for p in step.weights if p.grad is not None])
        model.zero_grad()
    assert 0 < last_routes(model).route.mean() < 1 and len(found[0]) == 20
    for both, routed in zip(*found, strict=True):
        torch.testing.assert_close(both, routed, rtol=1e-3, atol=1e-6 + 1e-3 * float(both.abs().max()))


def test_records_of_a_step(small: argparse.Namespace) -> None:
    found = training.step_records(small, CPU, "llama-3.1-8b")
    assert next(r["value"] for r in found if r["metric"] == "MSR") == small.msr
    assert {r["case"] for r in found} == {"llama-3.1-8b-2l-1k"}
    assert [r["who"] for r in found if r["metric"] == "step time"] == [
        "both modes", "routed, share 1", "routed, share 0.125",
    ]  # fmt: skip


BAD: list[tuple[list[str], str]] = [
    (["--msr", "1"], "expected an MSR in (0, 1)"),
    (["--samples", "3"], "a length that is a multiple of 128 per sample"),
    (["--backbones", "gpt-2"], "invalid choice: 'gpt-2'"),
    ([], "needs an NVIDIA GPU"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m[:20] for _, m in BAD])
def test_bad_options(options: list[str], message: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code: Any = cli.main(["bench", "training", *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err
