"""What moves, repeats, selects or drops rows or tokens of a stock cache takes the routes along, or is refused."""

import pytest
import torch
from transformers import DynamicCache

from elastic.cache.elastic_cache import ElasticCache
from elastic.model.attach import attach, elastic_config, route_of
from elastic.model.layer_types import stock_layers
from tests.helpers.models import FAMILIES, HYBRIDS, LINEAR, random_ids, small_config, tiny_model, varied_routers

ROWS = 4


def filled(family, ids):
    model = attach(tiny_model(family, initializer_range=0.3), small_config())
    varied_routers(model)
    return model, filling(model, ids)


def filling(model, ids):
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    return cache


# name -> (what is done to the cache, rows that it then holds)
OPERATIONS = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 3, 1])), [2, 0, 3, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True, False])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
}


@pytest.mark.parametrize("tokens", [1, 6], ids=["a token", "a turn"])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_routes_follow_rows(family, name, tokens):
    ids = random_ids(ROWS, 40)
    act, rows = OPERATIONS[name]
    model, cache = filled(family, ids)
    before = route_of(cache).route
    if family in LINEAR and name != "reorder":
        with pytest.raises(ValueError, match="DynamicCache cannot select or repeat the rows of its Linear"):
            act(cache)
        assert torch.equal(route_of(cache).route, before)
        cache = ElasticCache(5, elastic_config(model), windows=stock_layers(model.config))
        model(ids, past_key_values=cache)
        act(cache)
    else:
        act(cache)
    assert torch.equal(route_of(cache).route, before[:, rows])
    expected = filling(model, ids[rows])
    more = random_ids(len(rows), tokens, 5)
    found, right = (model(more, past_key_values=held).logits for held in (cache, expected))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert torch.equal(route_of(cache).route, route_of(expected).route)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_crop_keeps_the_start_or_is_refused(family):
    ids = random_ids(1, 40)
    model, cache = filled(family, ids)
    for cut in (-37, 3):
        with pytest.raises(ValueError, match=r"cropping to 3 tokens cuts the tokens up to \[8\] that the routes"):
            cache.crop(cut)
    assert cache.get_seq_length() == 40
    if family in LINEAR:
        with pytest.raises(ValueError, match="cropping 30 tokens would take them out of the state of a layer"):
            cache.crop(-30)
        assert cache.get_seq_length() == 40
        return
    if family in HYBRIDS:
        with pytest.raises(ValueError, match="the model's sliding layers of 12 tokens have dropped"):
            cache.crop(-30)
        assert cache.get_seq_length() == cache.get_seq_length(1) == 40
        return
    cache.crop(-30)
    model(ids[:, 10:], past_key_values=cache)
    assert cache.get_seq_length() == 40
    cache.crop(-40)
    assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_second_turn_among_the_first_tokens_is_not_cut_either():
    model, cache = filled("llama", random_ids(1, 5))
    model(random_ids(1, 10), past_key_values=cache)
    with pytest.raises(ValueError, match=r"up to \[8\]"):
        cache.crop(-9)
    cache.crop(-7)
