"""A prompt decides once: what verifies several tokens of an answer keeps its decision and equals greedy decoding, and
what would route in the middle of a prompt or an answer is refused wherever it is set.
"""

import copy
import functools

import pytest
import torch
from transformers import GenerationConfig

from elastic.inference.generate import generate, new_cache, route_of
from elastic.model import layer_hooks
from elastic.model.attach import attach, detach
from elastic.model.loading import load_tokenizer
from tests.helpers.models import (
    ASSISTED,
    FAMILIES,
    HYBRIDS,
    LAYERS,
    LINEAR,
    random_ids,
    sliding_caches_record,
    small_config,
    tiny_model,
    varied_routers,
)
from tests.helpers.xattention import sparse_of

STEPS = 24


def routed(family="llama", **sparse):
    model = attach(tiny_model(family, eos_token_id=None, initializer_range=0.3), small_config(**sparse))
    varied_routers(model)
    return model


def repetitive():
    return random_ids(1, 12).repeat(1, 5)


def answer(model, **options):
    return model.generate(
        repetitive(), attention_mask=torch.ones(1, 60, dtype=torch.int64), max_new_tokens=STEPS, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


VERIFIED = {
    "prompt lookup": lambda family: {"prompt_lookup_num_tokens": 4},
    "lookup by configuration": lambda family: {
        "generation_config": GenerationConfig(prompt_lookup_num_tokens=4, pad_token_id=0)
    },
    "a good assistant": lambda family: {
        "assistant_model": tiny_model(family, eos_token_id=None, initializer_range=0.3)
    },
    "a bad assistant": lambda family: {
        "assistant_model": tiny_model(family, 7, eos_token_id=None, initializer_range=0.3)
    },
}


@functools.cache
def greedy_answer(family):
    """Tokens, logits and routes of greedy decoding."""
    found = answer(routed(family))
    return found.sequences, torch.stack(found.logits), route_of(found.past_key_values).route


@pytest.mark.parametrize("name", VERIFIED)
@pytest.mark.parametrize("family", FAMILIES)
def test_verified_decoding_equals_greedy_on_one_decision(family, name, monkeypatch):
    if family in HYBRIDS and "assistant" in name and not sliding_caches_record():
        pytest.skip(ASSISTED)
    model, decided = routed(family), []
    if family in LINEAR:
        with pytest.raises(ValueError, match="takes tokens back, but the backbone's linear attention keeps a state"):
            answer(model, **VERIFIED[name](family))
        return
    tokens, logits, route = greedy_answer(family)
    decide = layer_hooks.route_layer
    monkeypatch.setattr(layer_hooks, "route_layer", lambda *args: decided.append(args[0]) or decide(*args))
    for cache in ({}, {"past_key_values": new_cache(model, STEPS, "full")}):
        decided.clear()
        found = answer(model, **VERIFIED[name](family), **cache)
        assert torch.equal(found.sequences, tokens)
        torch.testing.assert_close(torch.stack(found.logits), logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(route_of(found.past_key_values).route, route)
        assert len(decided) == LAYERS


@pytest.mark.parametrize("modes", ["FA-XA", "XA-SSA"])
def test_candidates_are_read_as_decode_steps_read_them(modes):
    model = attach(tiny_model(eos_token_id=None, initializer_range=0.3), small_config())
    detach(model)
    config = small_config()
    model = attach(model, type(config)(config.router, sparse_of(modes)))
    varied_routers(model)
    assert torch.equal(answer(model, prompt_lookup_num_tokens=4).sequences, answer(model).sequences)


def test_a_block_granule_too():
    model = routed(granule="block")
    assert torch.equal(answer(model, prompt_lookup_num_tokens=4).sequences, answer(model).sequences)


REFUSED = {
    "prefill_chunk_size": (0, "prefill_chunk_size=0 is not a whole number of 1 or more tokens"),
    "assistant_early_exit": (2, "assistant_early_exit=2 is not supported"),
    "penalty_alpha": (0.6, "penalty_alpha=0.6 is not supported"),
    "use_cache": (False, "use_cache=False is not supported"),
}


@pytest.mark.parametrize("where", ["keyword", "configuration", "by place", "the model's own"])
@pytest.mark.parametrize("name", REFUSED)
def test_settings_are_refused_wherever_they_are_set(name, where):
    value, message = REFUSED[name]
    model, ids = routed(), random_ids(1, 20)
    calls = {
        "keyword": lambda: model.generate(ids, **{name: value}),
        "configuration": lambda: model.generate(ids, generation_config=GenerationConfig(**{name: value})),
        "by place": lambda: model.generate(ids, GenerationConfig(**{name: value})),
        "the model's own": lambda: model.generate(ids),
    }
    if where == "the model's own":
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=message):
        calls[where]()
    tokenizer = load_tokenizer("tiny")
    options = {"keyword": {name: value}, "the model's own": {}}.get(
        where, {"generation_config": GenerationConfig(**{name: value})}
    )
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, "f1 f2 f3", 2, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_training_mode_is_refused(family):
    model = routed(family).train()
    for options in ({}, {"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(ValueError, match=r"in training mode, where routers draw at random; call model\.eval"):
            model.generate(random_ids(1, 20), max_new_tokens=2, **options)
    assert model.eval().generate(random_ids(1, 20), max_new_tokens=2).shape == (1, 22)


def test_what_verification_cannot_have_is_refused():
    model = routed()
    filled = answer(model).past_key_values
    for options, message in (
        ({"past_key_values": new_cache(model, 4, "elastic")}, "prompt_lookup_num_tokens takes tokens back, which"),
        ({"past_key_values": filled}, "came with a cache of 83 tokens; start from an empty cache"),
        ({"assistant_model": routed()}, "the assistant model has routers"),
    ):
        with pytest.raises(ValueError, match=message):
            answer(model, **{"prompt_lookup_num_tokens": 4, **options})


def test_generate_is_the_models_own_again_after_detach_and_copies_keep_theirs():
    model = routed()
    twin = copy.deepcopy(model)
    expected = answer(model).sequences
    detach(model)
    assert not {"generate", "_get_candidate_generator", "_prefill"} & set(vars(model))
    assert torch.equal(answer(twin, prompt_lookup_num_tokens=4).sequences, expected)
    with pytest.raises(ValueError, match="in training mode"):
        twin.train().generate(random_ids(1, 20))
