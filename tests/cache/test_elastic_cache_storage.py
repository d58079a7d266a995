"""Storage of the elastic KV cache: how much, when it grows, when it goes, and what is refused."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch

from elastic.cache.elastic_cache import ElasticCache
from elastic.model.attach import elastic_config, override_routes, route_of, set_config
from tests.helpers.cached import generate, new_cache, routed, same
from tests.helpers.models import KV_HEADS, LAYERS, left_padded, random_ids


def test_storage_is_what_the_routes_need_and_grows_in_steps():
    model = routed()
    ids, mask = left_padded(random_ids(2, 50), [0, 21])
    cache = new_cache(model, step=8)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    sparse_heads = route_of(cache).route.sum((0, 2)).tolist()
    head_bytes = 2 * 16 * 4
    expected = [
        (streaming * 20 + (LAYERS * KV_HEADS - streaming) * room) * head_bytes
        for streaming, room in zip(sparse_heads, (56, 32), strict=True)
    ]
    assert cache.sample_bytes() == expected and cache.nbytes == sum(expected)
    assert cache.steps_left == 3
    version, held = cache.version, cache.nbytes
    token = random_ids(2, 1)
    for step in range(4):
        mask = torch.cat([mask, torch.ones_like(token)], 1)
        with torch.no_grad():
            model(token, attention_mask=mask, past_key_values=cache, use_cache=True)
        assert (cache.version == version) == (step < 3)
    assert cache.nbytes > held and cache.steps_left == 2


def test_reserve_lets_no_step_move_memory():
    model = routed()
    cache = new_cache(model, step=1, reserve=12)
    with torch.no_grad():
        model(random_ids(1, 50), past_key_values=cache, use_cache=True)
        cache.settle()
        addresses = [layer.pool.keys.data_ptr() for layer in cache.layers]
        for _ in range(12):
            model(random_ids(1, 1), past_key_values=cache, use_cache=True)
    assert [layer.pool.keys.data_ptr() for layer in cache.layers] == addresses


def test_a_cache_is_freed_when_it_is_dropped():
    """No reference cycle keeps gigabytes until the garbage collector comes."""
    model = routed()
    cache = new_cache(model)
    with torch.no_grad():
        model(random_ids(1, 40), past_key_values=cache, use_cache=True)
        model(random_ids(1, 1), past_key_values=cache, use_cache=True)
    alive = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert alive() is None
    finally:
        gc.enable()


def test_reset_empties():
    model = routed()
    cache, ids = new_cache(model), random_ids(1, 40)
    first = generate(model, ids, None, cache, steps=5)
    cache.reset()
    assert cache.get_seq_length() == 0
    same(generate(model, ids, None, cache, steps=5), first)


def without_routers(model):
    from elastic.model.attach import detach

    cache = new_cache(model)
    detach(model)(random_ids(1, 9), past_key_values=cache, use_cache=True)


def other_routes(model):
    cache = new_cache(model)
    model(random_ids(1, 40), past_key_values=cache, use_cache=True)
    with override_routes(model, 0):
        model(random_ids(1, 1), past_key_values=cache, use_cache=True)


def dense_later(model):
    cache = new_cache(model)
    model(random_ids(1, 40), past_key_values=cache, use_cache=True)
    set_config(model, replace(elastic_config(model), kv_cache="full", dense_decode=True))
    model(random_ids(1, 1), past_key_values=cache, use_cache=True)


def other_batch(model):
    cache = new_cache(model)
    model(random_ids(2, 40), past_key_values=cache, use_cache=True)
    model(random_ids(3, 1), past_key_values=cache, use_cache=True)


def right_padded(model):
    ids, mask = random_ids(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, 15:] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, past_key_values=new_cache(model))


def other_sizes(model):
    cache = new_cache(model)
    set_config(model, replace(elastic_config(model), sparse=replace(elastic_config(model).sparse, window=20)))
    model(random_ids(1, 40), past_key_values=cache, use_cache=True)


REFUSED = {
    "other sizes": (other_sizes, "the cache was made for SparseConfig.*; make a new cache with elastic.new_cache"),
    "a model without routers": (without_routers, "an ElasticCache was given to a model without routers"),
    "other routes while decoding": (other_routes, "override_routes changed after the prompt was read into an elastic"),
    "dense decode": (dense_later, "dense_decode was set after the prompt was read into an elastic KV cache"),
    "another batch": (other_batch, "new tokens for 3 rows came with a cache of 2"),
    "right padding": (right_padded, "pad prompts on the left"),
    "a negative reserve": (lambda m: ElasticCache(3, elastic_config(m), -1), "reserve=-1, step=1024; expected 0 or"),
    "bytes of an empty cache": (lambda m: new_cache(m).nbytes, "the cache is empty; run the prompt"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message), torch.no_grad():
        call(routed())
