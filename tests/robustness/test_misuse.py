"""An attached model that is used in a way that no route survives: one clear error, never an answer."""

import pytest
import torch
from transformers import DynamicCache

from elastic.inference.generate import new_cache
from elastic.model.attach import attach, last_routes
from tests.helpers.models import FAMILIES, random_ids, small_config, tiny_model


def attached(**changes):
    return attach(tiny_model(**changes), small_config())


# transformers itself refuses SDPA to gpt-oss.
@pytest.mark.parametrize(
    ("family", "name"), [(f, name) for f in FAMILIES for name in ("sdpa", "eager") if (f, name) != ("gpt_oss", "sdpa")]
)
def test_another_attention_after_attach_is_refused(family, name):
    model = attached(family=family)
    ids = random_ids(1, 30)
    expected = model(ids).logits
    model.set_attn_implementation(name)
    for call in (lambda: model(ids), lambda: model.generate(ids, max_new_tokens=2)):
        with pytest.raises(ValueError, match=f"switched to attention implementation '{name}', by which no route"):
            call()
    model.set_attn_implementation("elastic")
    assert torch.equal(model(ids).logits, expected)


def dynamic_of(other):
    cache = DynamicCache(config=other.config)
    other(random_ids(1, 20), past_key_values=cache)
    return cache


def bare_dynamic_of(other):
    cache = DynamicCache()
    other(random_ids(1, 20), past_key_values=cache)
    return cache


def elastic_of(other):
    cache = new_cache(other, 4)
    other(random_ids(1, 20), past_key_values=cache)
    return cache


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("depth", [2, 5])
@pytest.mark.parametrize("make", [dynamic_of, bare_dynamic_of, elastic_of])
def test_a_cache_of_a_model_of_other_depth_is_refused(make, depth, tokens):
    cache = make(attached(num_hidden_layers=depth))
    with pytest.raises(ValueError, match=f"belongs to a model of {depth} layers, but this one has 3; start from an"):
        attached()(random_ids(1, tokens), past_key_values=cache)


def test_an_unused_cache_of_a_model_of_other_depth_is_refused():
    for depth in (2, 5):
        with pytest.raises(ValueError, match=f"a model of {depth} layers, but this one has 3"):
            attached()(random_ids(1, 9), past_key_values=new_cache(attached(num_hidden_layers=depth)))


EMPTY = {
    "no rows": (torch.zeros(0, 5, dtype=torch.int64), "0 rows of 5 tokens"),
    "no tokens": (torch.zeros(2, 0, dtype=torch.int64), "2 rows of 0 tokens"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_batch_is_refused(name):
    ids, message = EMPTY[name]
    model = attached()
    for batch in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        with pytest.raises(ValueError, match=f"the batch is empty: {message}; give at least one each"):
            model(**batch)
    with pytest.raises(RuntimeError):
        last_routes(model)
