"""What follows a prompt on its cache: padding stays where it was, also where no mask says so; what cannot follow is
refused, on any cache.
"""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from elastic.model.attach import (
    attach,
    elastic_config,
    last_features,
    override_routes,
    route_of,
    routers,
    set_config,
)
from tests.helpers.cached import new_cache
from tests.helpers.models import FAMILIES, left_padded, random_ids, small_config, tiny_model, varied_routers

CACHES = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=90),
    "full": lambda model: new_cache(model, kv_cache="full"),
    "elastic": lambda model: new_cache(model, kv_cache="elastic"),
}
each_cache = pytest.mark.parametrize("kind", CACHES)


def routed(family="llama"):
    model = attach(tiny_model(family, eos_token_id=None, initializer_range=0.3), small_config())
    varied_routers(model)
    return model


@torch.no_grad()
def filled(model, kind, mask=None, rows=2):
    cache = CACHES[kind](model)
    model(random_ids(rows, 50), attention_mask=mask, past_key_values=cache)
    return cache


LEFT = left_padded(random_ids(2, 50), [17, 0])[1]
RIGHT = LEFT.flip(1)
PATTERN = torch.tensor([[0, 1], [1, 0], [1, 1]])


@each_cache
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_later_turn_without_a_mask_keeps_the_padding(family, kind):
    model, turn = routed(family), random_ids(2, 9, 3)
    whole = torch.cat([LEFT, torch.ones_like(turn)], 1)
    with_mask, without = (filled(model, kind, LEFT) for _ in range(2))
    expected = model(turn, attention_mask=whole, past_key_values=with_mask).logits
    assert torch.equal(model(turn, past_key_values=without).logits, expected)
    assert route_of(without).prompt_lengths.tolist() == [42, 59]
    token = random_ids(2, 1, 4)
    torch.testing.assert_close(
        model(token, past_key_values=without).logits, model(token, past_key_values=with_mask).logits
    )


@each_cache
def test_a_later_turn_with_other_padding_is_refused(kind):
    model = routed()
    for before, pads in ((LEFT, [0, 0]), (LEFT, [18, 0]), (None, [3, 0])):
        _, mask = left_padded(random_ids(2, 59), pads)
        with pytest.raises(ValueError, match="attention_mask does not continue the prompt's"):
            model(random_ids(2, 9), attention_mask=mask, past_key_values=filled(model, kind, before))


@each_cache
@pytest.mark.parametrize("tokens", [1, 9], ids=["a token", "a turn"])
def test_nothing_follows_a_prompt_that_is_padded_on_the_right(kind, tokens):
    model = routed()
    with pytest.raises(ValueError, match="padded on the right, so new tokens would follow padding; pad prompts on the"):
        model(random_ids(2, tokens), past_key_values=filled(model, kind, RIGHT))


@each_cache
@pytest.mark.parametrize("steps", [1, 2])
def test_generate_refuses_a_prompt_that_is_padded_on_the_right(kind, steps):
    model = routed()
    ids = random_ids(2, 50).masked_fill(RIGHT == 0, 0)
    for options in ({"attention_mask": RIGHT}, {}, {"num_beams": 2}):  # transformers sees padding by its id, too
        with pytest.raises(ValueError, match="padded on the right, so new tokens would follow padding"):
            model.generate(ids, max_new_tokens=steps, do_sample=False, past_key_values=CACHES[kind](model), **options)


@each_cache
@pytest.mark.parametrize("route", [None, 1, PATTERN], ids=["own", "sparse", "pattern"])
def test_rows_that_the_cache_does_not_have_are_refused(kind, route):
    model = routed()
    with override_routes(model, route):
        cache = filled(model, kind)
        for rows, tokens in ((6, 9), (1, 9), (6, 1)):
            with pytest.raises(ValueError, match=f"new tokens for {rows} rows came with a cache of 2"):
                model(random_ids(rows, tokens), past_key_values=cache)
        with pytest.raises(ValueError, match=r"new tokens for 6 rows came with a cache of 2.*batch_repeat_interleave"):
            model.generate(random_ids(2, 59), past_key_values=cache, max_new_tokens=2, num_beams=3)


@pytest.mark.parametrize("kind", ["dynamic", "static", "full"])
@pytest.mark.parametrize("route", [1, PATTERN], ids=["sparse", "pattern"])
@torch.no_grad()
def test_dense_decode_holds_under_given_routes(kind, route):
    model, token = routed(), random_ids(2, 1, 3)
    with override_routes(model, route):
        cache = filled(model, kind)
    twin = copy.deepcopy(cache)
    with override_routes(model, 0):
        expected = model(token, past_key_values=twin).logits
    set_config(model, replace(elastic_config(model), dense_decode=True))
    with override_routes(model, route):
        assert torch.equal(model(token, past_key_values=cache).logits, expected)


@each_cache
@torch.no_grad()
def test_a_copy_decodes_under_the_routes_that_it_was_filled_under(kind):
    model, token = routed(), random_ids(2, 1, 3)
    with override_routes(model, PATTERN):
        cache = filled(model, kind)
        model(token, past_key_values=cache)
        twin = copy.deepcopy(cache)
        assert torch.equal(model(token, past_key_values=twin).logits, model(token, past_key_values=cache).logits)


def test_an_operation_that_a_cache_does_not_have_leaves_its_routes():
    model = routed()
    cache = filled(model, "static")
    before = route_of(cache).route
    for act in (lambda: cache.batch_select_indices(torch.tensor([1])), lambda: cache.batch_repeat_interleave(2)):
        with pytest.raises(ValueError, match="a StaticCache cannot select or repeat the rows of its StaticLayer"):
            act()
    assert torch.equal(route_of(cache).route, before)


@pytest.mark.parametrize("kind", ["dynamic", "full", "elastic"])
@pytest.mark.parametrize("route", [None, 0, PATTERN], ids=["own", "full", "pattern"])
def test_a_crop_into_the_padding_is_refused(kind, route):
    model = routed()
    with override_routes(model, route):
        cache = filled(model, kind, LEFT)
        for cut in (-40, -33):
            with pytest.raises(ValueError, match="start from an empty cache"):
                cache.crop(cut)
    assert cache.get_seq_length() == 50


@each_cache
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_routers_that_look_at_keys_see_those_alone_that_were_read(family, kind):
    """A static cache hands out room for more."""
    config = small_config()
    model = attach(
        tiny_model(family, initializer_range=0.3), replace(config, router=replace(config.router, kind="level"))
    )
    for router in routers(model):
        router.update_statistics(torch.rand(32, router.weight.shape[0]))
        torch.nn.init.normal_(router.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    model(random_ids(2, 50))
    expected = last_features(model)
    filled(model, kind)
    torch.testing.assert_close(last_features(model), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_heads_that_dropped_keys_stay_streaming_under_given_routes(family):
    model, turn = routed(family), random_ids(2, 9, 3)
    cache, whole = filled(model, "elastic"), filled(model, "full")
    with override_routes(model, 0):
        model(turn, past_key_values=cache)
        held = route_of(cache).route
        assert held.any() and not held.all()
        found = model(random_ids(2, 1, 4), past_key_values=cache).logits
    with override_routes(model, held):
        model(turn, past_key_values=whole)
        expected = model(random_ids(2, 1, 4), past_key_values=whole).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static", "full"])
@pytest.mark.parametrize("given", [0, PATTERN], ids=["full", "pattern"])
@torch.no_grad()
def test_a_turn_after_given_routes_is_routed_as_if_they_were_not(given, kind):
    """The prompt's keys before attention are the same in the first layer, whatever its heads did."""
    model = routed()
    decided = []
    for route in (None, given):
        cache = CACHES[kind](model)
        with override_routes(model, route):
            model(random_ids(2, 12), past_key_values=cache)
        model(random_ids(2, 9, 3), past_key_values=cache)
        decided.append(last_features(model)[0])
    assert torch.equal(*decided)
