"""The keyword of the KV cache, which transformers 5.24 has renamed: one place knows it, and no cache is overlooked."""

import copy
from dataclasses import dataclass
from inspect import signature

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaModel

from elastic.cache import keyword as names
from elastic.cache.keyword import NEW, OLD, cache_of, given, keyword, without_cache
from elastic.model.attach import last_routes, route_of
from tests.helpers.cached import new_cache, routed
from tests.helpers.models import random_ids

TAKEN = (OLD,) if keyword() == OLD else (OLD, NEW)  # the old name is renamed by transformers itself


def test_it_is_that_of_transformers():
    model, cache = routed(), DynamicCache()
    assert [name for name in (OLD, NEW) if name in signature(LlamaModel.forward).parameters] == [keyword()]
    assert model(random_ids(1, 9), **given(cache))[keyword()] is cache and cache.get_seq_length() == 9


@pytest.mark.parametrize("name", TAKEN)
@torch.no_grad()
def test_the_cache_is_found_by_every_name_that_transformers_takes(name):
    model, ids = routed(), random_ids(1, 40)
    for call in (model, model.get_decoder()):
        cache = new_cache(model)
        call(ids, **{name: cache})
        twin = copy.deepcopy(cache)
        assert torch.equal(call(ids[:, :1], **{name: cache})[0], call(ids[:, :1], **given(twin))[0])
        model(ids, use_cache=False)
        assert torch.equal(route_of(cache).route, last_routes(model).route) and cache.get_seq_length() == 41
    cache, options = new_cache(model), {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(ids, **{name: cache}, **options), model.generate(ids, **options))
    assert cache.get_seq_length() == 42


@pytest.mark.parametrize("used", [OLD, NEW])
def test_where_a_cache_is_looked_for(used, monkeypatch):
    monkeypatch.setattr(names, "keyword", lambda: used)
    cache = DynamicCache()
    assert given(cache) == {used: cache}
    assert cache_of({"input_ids": 1, used: cache}) is cache and cache_of({used: None}) is None and cache_of({}) is None
    with pytest.raises(
        ValueError, match=rf"came as cache_params, but transformers [\d.]+ takes it by the keyword {used}"
    ):
        cache_of({"cache_params": cache})
    with pytest.raises(ValueError, match=f"came as positional argument 1, .*pass {used}="):
        cache_of({}, (1, cache))
    if used == NEW:
        assert cache_of({OLD: cache}) is cache
        with pytest.raises(ValueError, match=f"two names of one KV cache; pass {NEW}=... alone"):
            cache_of({OLD: cache, NEW: None})
    else:  # transformers would take it for a keyword of the attention function
        with pytest.raises(ValueError, match=f"came as {NEW}, .*pass {OLD}="):
            cache_of({NEW: cache, OLD: None})


def test_a_name_that_nobody_knows_is_refused(monkeypatch):
    @dataclass
    class Output:
        logits: int
        kv: int

    monkeypatch.setattr(names, "CausalLMOutputWithPast", Output)
    with pytest.raises(ValueError, match=rf"transformers [\d.]+ names the KV cache neither {NEW} nor {OLD}"):
        keyword.__wrapped__()


@torch.no_grad()
def test_a_model_refuses_a_cache_that_it_would_not_see():
    model, ids = routed(), random_ids(1, 9)
    for call in (model, model.get_decoder()):
        with pytest.raises(ValueError, match="a KV cache came as kv, but"):
            call(ids, kv=new_cache(model))
    with pytest.raises(ValueError, match="a KV cache came as positional argument 3, but"):
        model.get_decoder()(ids, None, None, new_cache(model))
    with pytest.raises(ValueError, match="a KV cache came as kv, but"):
        model.generate(ids, kv=new_cache(model), max_new_tokens=1)


WITHHELD = {"kv": "a KV cache came as kv, but", None: "given a KV cache of 9 tokens, but its layer 1 none"}


@pytest.mark.parametrize("renamed, told", WITHHELD.items())
@torch.no_grad()
def test_a_layer_that_is_not_handed_the_cache_is_refused(renamed, told):
    model, cache = routed(), DynamicCache()
    model(random_ids(1, 9), **given(cache))

    def withhold(_module, args, kwargs):
        cache = kwargs.pop(keyword())
        return args, kwargs if renamed is None else {**kwargs, renamed: cache}

    layer = model.get_decoder().layers[1]
    layer.self_attn.register_forward_pre_hook(withhold, with_kwargs=True, prepend=True)
    with pytest.raises(ValueError, match=told):
        model(random_ids(1, 1), **given(cache))


def test_a_layer_may_be_called_without_its_cache():
    cache, mask = DynamicCache(), torch.ones(1, 2)
    assert without_cache({"cache_params": cache, NEW: cache, "mask": mask}) == {
        "cache_params": None, NEW: None, "mask": mask
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["full", "elastic"])
def test_transformers_may_take_tokens_back_from_a_full_cache_alone(kind):
    for family in ("llama", "gemma3_text", "qwen3_next"):
        croppable = kind == "full" and family != "qwen3_next"
        assert new_cache(routed(family, kind)).is_croppable == croppable
