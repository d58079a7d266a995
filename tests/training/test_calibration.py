"""Measuring heads on the tiny backbone: what matters comes last in the order, runs repeat, resume and share work."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic.commands.calibration_data import Wanted, build
from elastic.config import SparseConfig
from elastic.files import write_atomic
from elastic.model.loading import load_backbone
from elastic.routing.calibration import LEVELS, agreement
from elastic.training.calibration import HeadNeed
from elastic.training.calibration_run import measure
from elastic.training.head_need import Recipe
from elastic.training.partial_results import partial_file, read_partial, write_partial
from tests.helpers.forked import forked_ranks, run_command, say_to
from tests.helpers.models import tiny_model

SPARSE = SparseConfig(sink=4, window=16, block=4)
GRADIENT, ABLATION = Recipe(rates=(0.1, 0.3), draws=1), Recipe("ablation", levels=(0.0, 0.5))


def wanted(**changes):
    values = {
        "backbone": "tiny", "gguf_file": None, "sparse": SPARSE, "samples": 12, "lengths": (100,), "batch_tokens": 256,
        "seed": 0, "folder": None, "split": "train", "texts": None, **changes,
    }  # fmt: skip
    return Wanted(**values)


@pytest.fixture(scope="module")
def rows():
    return build(wanted())[0]  # 12 samples: each head runs sparse in at least one of them


def calibrate(rows, out, recipe=GRADIENT, backbone="tiny", sparse=SPARSE, **settings):
    module = HeadNeed(backbone, sparse, recipe, rows, partial_file(out), **settings)
    return measure(module, progress=False)


@pytest.fixture(scope="module")
def one_head(tmp_path_factory):
    """A random backbone with the words of the tiny one, in which only KV head 1 of layer 1 has any effect."""
    model, (_, tokenizer) = tiny_model("llama", initializer_range=0.1), load_backbone("tiny")
    with torch.no_grad():
        for number, layer in enumerate(model.get_decoder().layers):
            columns = layer.self_attn.o_proj.weight.view(-1, 2, 32)  # two query heads of a KV head
            columns[:, [0] if number == 1 else [0, 1]] = 0
    folder = tmp_path_factory.mktemp("one")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("modes", [("full", "streaming"), ("full", "xattention"), ("xattention", "streaming")])
@pytest.mark.parametrize("recipe", [GRADIENT, ABLATION], ids=lambda recipe: recipe.by)
def test_the_only_head_that_matters_is_the_most_needed(recipe, modes, one_head, rows, tmp_path):
    sparse = replace(SPARSE, route0=modes[0], route1=modes[1], stride=4, threshold=0.5)
    found = calibrate(rows, tmp_path / "cal.json", recipe, one_head, sparse)
    need = torch.tensor(found.need)
    assert found.order[-1] == 3 and need[1, 1] > 1e-3
    need[1, 1] = 0
    assert need.abs().max() < 1e-6
    below = [kl for msr, kl in zip(LEVELS, found.curve.kl, strict=True) if round(6 * msr) < 6]
    assert max(below) - found.floor < 1e-6 < 1e-3 < found.curve.kl[-1] - found.floor
    assert found.level(1e-3) == 0.9, "the highest level that leaves one head on route 0"


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Both ways on the tiny backbone, on samples that its answers need the whole of."""
    rows, _ = build(wanted(samples=36, lengths=(160,), batch_tokens=4096))
    folder = tmp_path_factory.mktemp("both")
    gradient = Recipe(rates=(0.1,) * 4, draws=0)  # of six heads two are vital: seldom both at once
    return [calibrate(rows, folder / f"{recipe.by}.json", recipe) for recipe in (gradient, Recipe("ablation"))]


def test_gradient_and_ablation_agree(both):
    gradient, ablation = both
    assert set(ablation.order[-2:]) == {0, 1}, "keys are matched in the first layer"
    assert agreement(gradient, ablation, 1 / 3).covered > 0.9
    assert gradient.curve.kl[0] == ablation.curve.kl[0] == 0.0
    assert gradient.curve.kl[-1] == ablation.curve.kl[-1] > 0.5
    assert {*gradient.curve.sources} == {"single_qa", "in_context", "code"}
    assert gradient.curve.kl[-1] == pytest.approx(sum(kl[-1] for kl in gradient.curve.sources.values()) / 3, rel=1e-4)


def test_provenance(both):
    gradient, ablation = (found.provenance for found in both)
    assert (gradient["by"], ablation["by"]) == ("gradient", "ablation")
    assert gradient["settings"] == {"rates": (0.1, 0.1, 0.1, 0.1), "draws": 0, "seed": 0}
    assert ablation["settings"] == {"levels": (0.0, 0.5, 0.75)}
    assert gradient["backbone"] == "tiny" and gradient["architecture"]["num_layers"] == 3
    assert gradient["data"]["order"]["samples"] == 36 and gradient["data"]["curve"]["samples"] == 18
    assert gradient["data"] == ablation["data"] and gradient["backend"] == "torch (cpu)"


def test_gradients_are_those_of_each_sample_alone(rows, tmp_path):
    """Packed samples do not mix, and recomputing layers changes nothing."""
    plain, again = (HeadNeed("tiny", SPARSE, GRADIENT, rows, tmp_path / "p", checkpointing=c) for c in (False, True))
    for module in (plain, again):
        module.configure_model()
        module.model.train(module.checkpointing)
    batch = plain._read((0, 0))["batch"]
    routes = plain._routes(plain.rounds[0])[: len(batch["task_id"])]
    found, recomputed = (module.judged(batch).gradients(routes) for module in (plain, again))
    assert torch.equal(found, recomputed) and found.shape == routes.shape and found.abs().max() > 0
    changed = routes.clone()
    changed[1:] = 1 - changed[1:]
    torch.testing.assert_close(plain.judged(batch).gradients(changed)[0], found[0])


def die_in_the_second_round(folder):
    say_to(folder / "log")
    rows, _ = build(wanted())
    step = HeadNeed.test_step

    def dying(self, work, batch_idx):
        step(self, work, batch_idx)
        if batch_idx == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    HeadNeed.test_step = dying
    calibrate(rows, folder / "killed.json")


def test_a_run_that_is_killed_ends_with_the_same_bytes(tmp_path):
    """It kills itself in the second round, of which three batches are kept by then."""
    assert forked_ranks(1, die_in_the_second_round, tmp_path) == [-signal.SIGKILL], (tmp_path / "log").read_text()
    partial = partial_file(tmp_path / "killed.json")
    kept = partial.read_bytes()
    rows, _ = build(wanted())
    steps = []
    found = {}
    for name in ("whole", "killed"):
        module = HeadNeed("tiny", SPARSE, GRADIENT, rows, partial_file(tmp_path / f"{name}.json"))
        inner = module.test_step
        module.test_step = lambda work, batch_idx, inner=inner: (steps.append(work["round"]), inner(work, batch_idx))
        found[name] = measure(module, progress=False)
        found[name].write(tmp_path / f"{name}.json")
        steps.append(-1)
    whole, resumed = (steps[: steps.index(-1)], steps[steps.index(-1) + 1 : -1])
    assert (whole, resumed) == ([0] * 5 + [1] * 5 + [2] * 3, [1] * 2 + [2] * 3), "what was kept is not measured again"
    assert (tmp_path / "whole.json").read_bytes() == (tmp_path / "killed.json").read_bytes()
    partial.write_bytes(kept)  # of another seed: of no use
    other = calibrate(rows, tmp_path / "killed.json", Recipe(rates=(0.1, 0.3), draws=1, seed=1))
    assert other.need != found["whole"].need


def test_two_processes_share_the_rows_and_write_the_same_bytes(rows, tmp_path):
    arguments = ["--sink", "4", "--window", "16", "--block", "4", "--samples", "12", "--lengths", "100"]
    arguments += ["--backbone", "tiny", "--batch-tokens", "256", "--rates", "0.1,0.3", "--draws", "1", "--devices", "2"]
    log = tmp_path / "log"
    codes = forked_ranks(2, run_command, ["calibrate", *arguments, "--out", "two.json"], tmp_path, log)
    said = log.read_text()
    assert codes == [0, 0], said[-3000:]
    assert said.count("Rows for the order") == said.count("Written:") == 1
    _, origin = build(wanted())
    calibrate(rows, tmp_path / "one.json", data=origin).write(tmp_path / "one.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert not partial_file(tmp_path / "two.json").exists()


def test_partial_results(tmp_path):
    file, found = tmp_path / "p", {("beside 0.5", 3): torch.rand(2, 3), ("curve", 0): torch.rand(1, 11)}
    assert read_partial(file, "key") == {}
    write_partial(file, "key", found)
    again = read_partial(file, "key")
    assert again.keys() == found.keys() and all(torch.equal(again[place], found[place]) for place in found)
    assert read_partial(file, "other") == {}
    write_atomic(file, "of another program")
    assert read_partial(file, "key") == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": "guess"}, "by='guess' is not known"),
        ({"rates": (0.0, 0.5)}, "expected shares of the heads between 0 and 1"),
        ({"rates": ()}, "expected shares"),
        ({"draws": -1}, "draws=-1 is below 0"),
        ({"levels": (0.5,)}, "expected MSR levels that ascend from 0"),
        ({"levels": (0.0, 0.5, 0.5)}, "expected MSR levels"),
        ({"levels": (0.0, 1.0)}, "to below 1"),
        ({"seed": -1}, "seed=-1 is not in"),
    ],
)
def test_recipes_that_cannot_be_followed_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**settings)


def test_a_dtype_is_checked(rows):
    with pytest.raises(ValueError, match="dtype='int8' is not supported"):
        HeadNeed("tiny", SPARSE, GRADIENT, rows, Path("p"), dtype="int8")
