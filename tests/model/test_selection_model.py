"""Methods that choose key blocks in a model: `elastic test`, `elastic eval` and `elastic.load` read the same names."""

from dataclasses import replace

import pytest
import torch

import elastic
from elastic.config import SparseConfig
from elastic.inference.decode_graph import can_graph
from elastic.inference.generate import generate, new_cache
from elastic.model.attach import attach, last_routes, override_routes
from elastic.routing.methods import parse_method
from elastic.routing.sparsity import esr
from tests.helpers.models import KV_HEADS, LAYERS, left_padded, random_ids, small_config, tiny_model
from tests.helpers.training import SMALL, build_data, small_run

METHODS = ["moba:2:8", "nsa:3", "infllm:2", "flexprefill:0.5:4", "flashprefill:0.5"]
EVERYTHING = ["moba:1000:4", "nsa:1000", "infllm:1000", "flexprefill:1:100000"]
SIZES = SparseConfig(sink=4, window=8, block=4, stride=4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_leaves_out_what_its_density_says(name, family):
    model, ids = tiny_model(family, initializer_range=0.3), random_ids(2, 90)
    with torch.no_grad():
        dense = model(ids).logits
        attach(model, small_config())
        sparse = parse_method(name).sparse(SIZES)
        with override_routes(model, parse_method(name).routes(LAYERS, KV_HEADS), sparse):
            assert not torch.allclose(model(ids).logits, dense, rtol=1e-3)
        state = last_routes(model)
        assert state.density.shape == (LAYERS, 2, KV_HEADS) and bool((state.density < 1).all())
        _, overall = esr(state.route, state.lengths, sparse, state.density)
        torch.testing.assert_close(overall, 1 - state.density.mean((0, 2)))
        with override_routes(model, 0, sparse):
            assert torch.equal(model(ids).logits, dense)
    with pytest.raises(ValueError, match=f"what the {sparse.route1} heads of FA-.* visit depends on the input"):
        esr(state.route, state.lengths, sparse)


@pytest.mark.parametrize("name", EVERYTHING)
def test_a_choice_of_everything_is_the_stock_model_bit_for_bit(name):
    model, ids = tiny_model(), random_ids(2, 90)
    with torch.no_grad():
        dense = model(ids).logits
        attach(model, small_config())
        with override_routes(model, 1, parse_method(name).sparse(SIZES)):
            assert torch.equal(model(ids).logits, dense)
            assert bool((last_routes(model).density == 1).all())


@pytest.mark.parametrize("name", METHODS)
def test_batches_answer_as_their_samples_alone(name):
    """Prefill of left-padded rows, then cached steps."""
    model = attach(tiny_model(initializer_range=0.3), small_config())
    ids, mask = left_padded(random_ids(2, 70), [0, 23])
    how = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with override_routes(model, 1, parse_method(name).sparse(SIZES)):
        alone = [model.generate(ids[row : row + 1, pad:], **how)[0, -5:].tolist() for row, pad in ((0, 0), (1, 23))]
        both = model.generate(ids, attention_mask=mask, **how)
    assert both[:, -5:].tolist() == alone


@pytest.mark.parametrize("name", ["nsa:3", "infllm:2"])
def test_methods_that_choose_in_every_step_say_what_they_cannot(name):
    """The same answers from an elastic cache; no graph, no candidates."""
    model = attach(tiny_model(initializer_range=0.3), small_config())
    ids, sparse = random_ids(1, 70), parse_method(name).sparse(SIZES)
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with override_routes(model, 1, sparse):
        answer = model.generate(ids, **how)
        assert torch.equal(model.generate(ids, past_key_values=new_cache(model, 80, "elastic"), **how), answer)
        assert not can_graph(model, 16)
        with pytest.raises(
            ValueError, match=r"prompt_lookup_num_tokens verifies several tokens at once, but heads of FA-"
        ):
            model.generate(ids, prompt_lookup_num_tokens=3, **how)
    assert not can_graph(model, 16, sparse)
    full = replace(sparse, route1="moba")
    with override_routes(model, 1, full):
        assert not torch.equal(model.generate(ids, **how), answer)
        model.generate(ids, prompt_lookup_num_tokens=3, **how)


def test_elastic_test_compares_them(tmp_path):
    module, loader, trainer = small_run(
        build_data(tmp_path), tmp_path, fit=False, elastic=replace(SMALL, sparse=replace(SMALL.sparse, stride=4)),
        methods=["dense", "elastic", *METHODS],
    )  # fmt: skip
    trainer.test(module, loader, verbose=False)
    assert set(module.densities) == set(METHODS)
    assert all(0 < share < 1 for layers in module.densities.values() for share in layers)
    for row in module.results.values():
        assert all(row[f"{name}_msr"] == 1 and 0 < row[f"{name}_esr_all"] < 1 for name in METHODS)
        assert all(row[f"{name}_loss"] > 0 for name in METHODS)


@pytest.mark.parametrize("name", ["moba:3:128", "nsa", "streaming", "dense"])
def test_a_method_is_loaded_by_name(name):
    model, tokenizer = elastic.load(name, "tiny")
    (answer,) = generate(model, tokenizer, "Where is the key? " * 40, max_new_tokens=4, chat_template=False)
    assert answer.report.msr == (0 if name == "dense" else 1)
    chosen = parse_method(name).sparse(SparseConfig()).chooser
    assert (chosen is not None) == bool(answer.report.density)
    if chosen:
        assert f"{chosen} heads compute" in answer.report.render()
    with pytest.raises(ValueError, match=f"method {name} does not say which backbone it runs on; name it"):
        elastic.load(name)


def test_a_misspelt_method_is_refused_by_load():
    with pytest.raises(ValueError, match="'0' is not a number of blocks of 1 or more"):
        elastic.load("moba:0", "tiny")
