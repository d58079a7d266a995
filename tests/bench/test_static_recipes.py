"""The recipes of static rivals: gates that mix two modes, their objectives, and the pattern files that they write."""

import pytest
import torch

from elastic.config import ElasticConfig
from elastic.data.calibration_rows import of_folder
from elastic.data.packing import collate
from elastic.data.shards import read_manifest
from elastic.model.attach import attach, override_routes, routers, set_row_slice
from elastic.routing.methods import parse_method
from elastic.training.evaluation_module import packed_hidden_states
from tests.bench import static_recipes as recipes
from tests.helpers.models import tiny_model
from tests.helpers.training import SMALL, build_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def batch(data):
    (rows, _) = of_folder(data, read_manifest(data), "train", (8, 1), 256, 0)
    return collate(rows.batches[0])


@pytest.fixture
def mixing():
    return mixing_model("llama")


def mixing_model(family):
    """A small model that mixes both modes, its layers and KV heads."""
    model = attach(tiny_model(family, vocab_size=64), ElasticConfig(SMALL.router, SMALL.sparse))
    set_row_slice(model, recipes.BothModes())
    return model, len(routers(model)), routers(model)[0].kv_heads


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_gates_of_one_and_zero_are_the_two_modes(family, batch):
    """Attention sinks included, which both modes have."""
    model, layers, heads = mixing_model(family)
    for gate in (1.0, 0.0):
        with torch.no_grad(), override_routes(model, 1 - int(gate)):
            wanted = packed_hidden_states(model, batch)
            got = recipes.mixed(model, batch, torch.full((layers, heads), gate))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_the_gradient_of_a_gate_is_the_slope_of_the_loss(name, mixing, batch):
    model, layers, heads = mixing
    gates = torch.full((layers, heads), 0.4, requires_grad=True)
    weight = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def loss(of):
        return (recipes.mixed(model, batch, of)[0] @ weight).sum()

    loss(gates).backward()
    step = torch.zeros(layers, heads)
    step[1, 0] = 1e-2
    with torch.no_grad():
        slope = (loss(gates + step) - loss(gates - step)) / 2e-2
    torch.testing.assert_close(gates.grad[1, 0], slope, rtol=2e-2, atol=1e-3)


def test_duo_attention_steps_as_its_paper_says(mixing, batch):
    """The first gradient is that of the price alone, since the mixture of full heads is the dense model."""
    model, layers, heads = mixing
    recipe = recipes.DuoAttention(layers, heads, torch.device("cpu"))
    shown = recipe.step(model, batch, recipe.gates(), 0.2)
    assert shown == {"distance": pytest.approx(0.0, abs=1e-9), "mean gate": 1.0}
    torch.testing.assert_close(recipe.scores(), torch.full((layers, heads), 1 - recipe.LR))  # AdamW's first step
    with torch.no_grad():
        recipe.gate_LK.fill_(-3.0)
    assert recipe.gates().unique().tolist() == [0.0]


def test_prulong_reaches_its_target(batch, mixing, monkeypatch):
    """Loss apart, which knows nothing of gates here, masks and prices settle at the wanted share."""
    model, layers, heads = mixing
    monkeypatch.setattr(recipes, "mixed", lambda *_: None)
    monkeypatch.setattr(recipes, "logit_head", lambda _: None)
    monkeypatch.setattr(recipes, "chunked_cross_entropy", lambda *_: torch.zeros((), requires_grad=True))
    recipe = recipes.PruLong(layers, heads, torch.device("cpu"), end=0.6, lr=0.1)
    assert recipe.sparsity() < 0.01
    for step in range(600):
        recipe.step(model, batch, recipe.gates(), step / 600)
    assert recipe.sparsity().item() == pytest.approx(0.6, abs=0.1)


def test_the_expected_sparsity_is_that_of_samples():
    recipe = recipes.PruLong(1, 3, torch.device("cpu"))
    recipe.log_alpha_LK.data = torch.tensor([[-1.0, 0.0, 1.0]])
    torch.manual_seed(0)
    zero = torch.stack([(recipe.gates() == 0).float().mean() for _ in range(4000)]).mean()
    torch.testing.assert_close(zero, recipe.sparsity().detach(), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_the_command_writes_a_pattern_that_methods_read(name, data, tmp_path, capsys):
    words = [name, "--data-dir", str(data), "--out", str(tmp_path), "--backbone", "tiny", "--steps", "3"]
    sizes = ["--sink", "4", "--window", "16", "--block", "4", "--batch-tokens", "256", "--seeds", "1"]
    assert recipes.main([*words, *sizes, "--device", "cpu", "--dtype", "float32"]) == 0
    path = tmp_path / f"{name}-1.tsv"
    assert f"wrote {path}" in capsys.readouterr().out
    lines = path.read_text().splitlines()
    routes = parse_method(f"static:{path}@0.5").routes(len(lines), len(lines[0].split("\t")))
    assert routes.mean() == 0.5


def test_a_loss_that_is_not_finite_ends_the_run(mixing, batch, monkeypatch):
    model, layers, heads = mixing
    recipe = recipes.DuoAttention(layers, heads, torch.device("cpu"))
    monkeypatch.setattr(recipes, "mixed", lambda model, batch, gates: packed_hidden_states(model, batch) * float("nan"))
    before = set_row_slice(model, recipes.BothModes())
    with pytest.raises(FloatingPointError, match="step 0 gave"):
        recipes.learn(model, recipe, iter([batch]), 1)
    assert set_row_slice(model, before) is not before
