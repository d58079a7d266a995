"""A stretched backbone rotates as transformers' own scalings do, the same for every prompt."""

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from elastic.data.context_length import context_length
from elastic.model.attach import attach
from elastic.model.rope_scaling import stretch
from tests.helpers.models import random_ids, small_config, tiny_model


def rotation(model):
    return model.get_decoder().rotary_emb.inv_freq


@pytest.mark.parametrize("factor", [2, 4.5])
def test_yarn_is_that_of_transformers(factor):
    model, other = tiny_model("llama"), tiny_model("llama")
    trained = context_length(model.config)
    stretch(model, "yarn", factor)
    assert context_length(model.config) == int(factor * trained) == model.config.max_position_embeddings
    scaled = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": trained}
    other.config.rope_parameters = {**other.config.rope_parameters, **scaled}
    wanted, scaling = ROPE_INIT_FUNCTIONS["yarn"](other.config, torch.device("cpu"))
    torch.testing.assert_close(rotation(model), wanted)
    assert model.get_decoder().rotary_emb.attention_scaling == scaling > 1


def test_ntk_is_the_dynamic_one_at_the_stretched_length():
    model, other = tiny_model("llama"), tiny_model("llama")
    trained = context_length(model.config)
    stretch(model, "ntk", 4)
    other.config.rope_parameters = {**other.config.rope_parameters, "rope_type": "dynamic", "factor": 1.0}
    wanted, _ = ROPE_INIT_FUNCTIONS["dynamic"](other.config, torch.device("cpu"), seq_len=4 * trained)
    torch.testing.assert_close(rotation(model), wanted)
    before = rotation(model).clone()
    short, _ = random_ids(2, 12)
    with torch.no_grad():
        first = model(short[None]).logits
        model(random_ids(1, 64))
        assert torch.equal(model(short[None]).logits, first)  # whatever was asked before
    assert torch.equal(rotation(model), before)


@pytest.mark.parametrize("scaling", ["yarn", "ntk"])
def test_an_attached_model_is_stretched_too_and_dense_is_the_stock_model(scaling):
    model, stock = tiny_model("llama"), tiny_model("llama")
    attach(model, small_config())
    for one in (model, stock):
        stretch(one, scaling, 2)
    ids = random_ids(2, 40)
    from elastic.model.attach import override_routes

    with torch.no_grad(), override_routes(model, 0):
        assert torch.equal(model(ids).logits, stock(ids).logits)


def test_what_cannot_be_stretched_is_refused():
    model = tiny_model("llama")
    before = rotation(model).clone()
    stretch(model, "yarn", 1)
    assert torch.equal(rotation(model), before)
    with pytest.raises(ValueError, match=r"factor=0\.5 is below 1"):
        stretch(model, "yarn", 0.5)
    stretch(model, "yarn", 2)
    with pytest.raises(ValueError, match="RoPE is 'yarn', expected 'default': it is stretched already"):
        stretch(model, "ntk", 2)
    with pytest.raises(ValueError, match="RoPE is 'several kinds'"):
        stretch(tiny_model("gemma3_text"), "yarn", 2)
