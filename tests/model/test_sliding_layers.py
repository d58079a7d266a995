"""Backbones with sliding or linear layers of their own: routers in the others alone, these as in the stock model."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import elastic
from elastic.cache.elastic_cache import ElasticCache
from elastic.model.attach import attach, elastic_config, last_routes, override_routes, route_of, routers
from elastic.model.checkpoint import load_into, save_elastic
from elastic.model.sliding_attention import window_mask
from tests.helpers.cached import generate, new_cache, routed
from tests.helpers.models import (
    HYBRIDS,
    LINEAR,
    SLIDING,
    left_padded,
    random_ids,
    small_config,
    tiny_model,
    varied_routers,
)

PLAIN = {"cohere2": {}, "qwen2": {"use_sliding_window": True}, "qwen3": {"use_sliding_window": True},
         "smollm3": {"use_sliding_window": True, "no_rope_layers": [0, 1, 0, 1, 1]}}  # fmt: skip


def hybrid(family):
    return tiny_model(family) if family in LINEAR else tiny_model(family, **SLIDING, **PLAIN.get(family, {}))


@pytest.mark.parametrize("family", [*HYBRIDS, *LINEAR, "qwen2", "qwen3", "smollm3"])
@torch.no_grad()
def test_layers_without_routers_stay_as_they_were(family):
    """Bit for bit: what they are given, what they make of it, under padding, in a prompt and while decoding."""
    model = hybrid(family)
    ids, mask = left_padded(random_ids(2, 40), [0, 9])
    layers, seen = model.get_decoder().layers, []
    for number in (0, 2):
        part = layers[number].linear_attn if family in LINEAR else layers[number].self_attn
        part.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, **options)
    stock, seen[:] = list(seen), []
    attach(model, small_config())
    assert [hasattr(getattr(layer, "self_attn", None), "router") for layer in layers] == [
        False,
        True,
        False,
        True,
        True,
    ]
    with override_routes(model, 0):
        assert torch.equal(model.generate(ids, **options), expected)
    assert len(seen) == len(stock) == 2 * 20
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(seen, stock, strict=True))
    varied_routers(model)
    model.generate(ids, **options)
    assert last_routes(model).route.shape == (3, 2, 2)


def held_by_stock(cache, family):
    """Bytes of the layers without routers, which are 0 and 2."""
    both = [True, False, True, False, False]
    if family in LINEAR:
        assert cache.is_linear == both
        kinds = [kind for layer in cache.linear for kind in (layer.conv_states, layer.recurrent_states)]
        return sum(state.nbytes for kind in kinds for state in kind.values())
    assert cache.is_sliding == both and [layer.keys.shape[2] for layer in cache.sliding] == [11, 11]
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.sliding)


@pytest.mark.parametrize("kind", ["full", "elastic"])
@pytest.mark.parametrize("family", [*HYBRIDS, *LINEAR])
@torch.no_grad()
def test_the_elastic_cache_holds_both_kinds(family, kind):
    model, ids = routed(family, kind), random_ids(2, 50)
    cache = new_cache(model)
    _, alone = generate(model, ids, steps=30)
    _, found = generate(model, ids, cache=cache, steps=30)
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)
    kept = held_by_stock(cache, family)
    assert cache.nbytes == kept + sum(layer.held().nbytes for layer in cache.routed) == sum(cache.sample_bytes())
    twin = copy.deepcopy(cache)
    twin.batch_select_indices(torch.tensor([1]))
    token = random_ids(2, 1, seed=3)
    one, both = model(token[1:], past_key_values=twin).logits, model(token, past_key_values=cache).logits
    torch.testing.assert_close(one[0], both[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [*HYBRIDS, *LINEAR])
@torch.no_grad()
def test_requests_that_join_decode_as_alone(family):
    model, lengths = routed(family), (50, 8)
    caches, tokens, logits = [], random_ids(2, 12, seed=4), []
    for row, length in enumerate(lengths):
        cache = new_cache(model)
        model(random_ids(1, length, seed=row), past_key_values=cache)
        alone = copy.deepcopy(cache)
        logits.append([model(token.view(1, 1), past_key_values=alone).logits[0] for token in tokens[row]])
        caches.append(cache)
    caches[0].join(caches[1])
    for step, both in enumerate(tokens.T):
        places = torch.tensor(lengths)[:, None] + step
        found = model(both[:, None], position_ids=places, past_key_values=caches[0]).logits
        for row in (0, 1):
            torch.testing.assert_close(found[row], logits[row][step], rtol=1e-4, atol=1e-4)


def test_verified_decoding_keeps_no_more_than_the_window():
    model, ids = routed("olmo3", "full"), random_ids(1, 12).repeat(1, 5)
    cache = new_cache(model)
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, past_key_values=cache, **options), expected)
    assert {layer.keys.shape[2] for layer in cache.sliding} == {11}


@pytest.mark.parametrize("make", ["elastic", "dynamic"])
def test_tokens_are_taken_back_after_candidates_as_far_as_they_are_held(make):
    """The layers have recorded what was read since the last crop, and hold no more than their window before that."""
    model, ids = routed("olmo3", "full"), random_ids(1, 12).repeat(1, 5)
    for turn, removed, refused in ((2, 2, False), (9, 20, True)):
        cache = new_cache(model) if make == "elastic" else DynamicCache(config=model.config)
        options = {"max_new_tokens": 6, "do_sample": False, "past_key_values": cache}
        with torch.no_grad(), override_routes(model, 0):
            found = model.generate(ids, prompt_lookup_num_tokens=4, **options)[:, :65]
            model(random_ids(1, turn, seed=5), past_key_values=cache)
            if refused:
                with pytest.raises(ValueError, match="sliding layers of 12 tokens have dropped"):
                    cache.crop(-removed)
                continue
            cache.crop(-removed)
            token = random_ids(1, 1, seed=6)
            again, fresh = model(token, past_key_values=cache).logits, new_cache(model)
            assert cache.get_seq_length() == 66
            model(ids, past_key_values=fresh)
            for place in range(60, 65):
                model(found[:, place : place + 1], past_key_values=fresh)
            torch.testing.assert_close(again, model(token, past_key_values=fresh).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["olmo3", "gpt_oss", "gemma3_text"])
def test_a_static_cache_with_room_is_continued_without_a_mask(family):
    """Its sliding layers hand out their whole room until it is full."""
    model = routed(family, "full")
    for length in (6, 14):
        ids, mask = left_padded(random_ids(2, length), [0, 2])
        found = []
        for make in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=64)):
            with torch.no_grad(), override_routes(model, 0):
                model(ids, attention_mask=mask, past_key_values=make)
                found.append([model(random_ids(2, 1, seed=n), past_key_values=make).logits for n in range(9)])
        torch.testing.assert_close(torch.cat(found[1]), torch.cat(found[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", ["none", "2d", "padded"])
def test_masks_by_layer_type_never_lift_the_window(given):
    """A mask of full layers alone, or the batch's own for both kinds: sliding layers keep their window."""
    model = attach(hybrid("qwen2"), small_config())
    ids, mask = left_padded(random_ids(1, 30), [0 if given == "none" else 5])
    mine = None if given == "none" else mask
    by_type = {"full_attention": mine, "sliding_attention": mask if given == "2d" else None}
    with torch.no_grad(), override_routes(model, 0):
        found, expected = (model(ids, attention_mask=one).logits[:, 5:] for one in (by_type, mask))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_masks_by_layer_type_without_one_of_sliding_layers_are_refused():
    model = attach(hybrid("qwen2"), small_config())
    with pytest.raises(ValueError, match="attention_mask is a dict of full_attention, but the model has"):
        model(random_ids(1, 30), attention_mask={"full_attention": torch.ones(1, 30, dtype=torch.int64)})


def test_a_padded_prompt_is_continued_without_a_mask():
    model = routed("olmo3", "full")
    ids, mask = left_padded(random_ids(1, 20), [8])
    for make in (lambda: new_cache(model), lambda: DynamicCache(config=model.config)):
        found = []
        for prompt, seen in ((ids, mask), (ids[:, 8:], None)):
            cache = make()
            with torch.no_grad():
                model(prompt, attention_mask=seen, past_key_values=cache)
                found.append(model(random_ids(1, 1, seed=2), past_key_values=cache).logits)
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_cache_of_another_make_is_refused():
    model = routed("olmo3")
    with pytest.raises(ValueError, match=r"made for windows \{\} by layer .* has \{0: 12, 2: 12\}"):
        model(random_ids(1, 20), past_key_values=ElasticCache(5, elastic_config(model)))


def test_a_report_counts_routed_layers_and_all_layers():
    model = routed("ministral")
    cache, ids = new_cache(model), random_ids(1, 50)
    with torch.no_grad(), override_routes(model, 1):
        model(ids, past_key_values=cache)
    (report,) = elastic.route_report(model, cache)
    assert (report.msr, report.msr_model, report.layers, report.routed_layers) == (1.0, 1.0, 5, (1, 3, 4))
    with torch.no_grad(), override_routes(model, 0):
        model(ids, past_key_values=(cache := new_cache(model)))
    (report,) = elastic.route_report(model, cache)
    visible, seen = 50 * 51 // 2, sum(min(i + 1, 12) for i in range(50))
    token = 2 * 2 * 16 * 4  # keys and values of 2 heads
    assert (report.msr, report.msr_model, report.esr_all) == (0.0, 0.4, 0.0)
    assert report.esr_model == pytest.approx(2 / 5 * (1 - seen / visible))
    assert report.kv_bytes_kept == report.kv_bytes_full == 3 * 50 * token
    assert report.kv_bytes_kept_model == report.kv_bytes_full_model == (3 * 50 + 2 * 11) * token
    assert "routers in layers 1, 3, 4 of 5" in str(report) and "MSR 0.400" in str(report)
    assert report.to_dict()["routed_layers"] == [1, 3, 4]


def test_checkpoints_go_by_routed_layers(tmp_path):
    model = routed("olmo3")
    save_elastic(tmp_path / "routers", model, "tiny")
    again = load_into(hybrid("olmo3"), tmp_path / "routers")
    for mine, theirs in zip(routers(again), routers(model), strict=True):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.state_dict().items())
    with pytest.raises(ValueError, match="num_layers=3, but this backbone has num_layers=4"):
        load_into(tiny_model("olmo3", num_hidden_layers=5, layer_types=["sliding_attention"] + ["full_attention"] * 4),
                  tmp_path / "routers")  # fmt: skip


MOVED = {
    "other layers": (("olmo3", {"layer_types": [f"{kind}_attention" for kind in
                                ("full", "sliding", "full", "sliding", "full")]}),
                     r"routed_layers=\[1, 3, 4\], but this backbone has routed_layers=\[0, 2, 4\]"),
    "more sliding layers": (("olmo3", {"num_hidden_layers": 6, "layer_types": [*SLIDING["layer_types"],
                                       "sliding_attention"]}),
                            "decoder_layers=5, but this backbone has decoder_layers=6"),
    "no sliding layers": (("olmo2", {}), r"routed_layers=\[1, 3, 4\], but this backbone has routed_layers=all"),
}  # fmt: skip


@pytest.mark.parametrize("case", MOVED)
def test_checkpoints_whose_routers_sit_in_other_layers_are_refused(tmp_path, case):
    (family, changes), told = MOVED[case]
    save_elastic(tmp_path / "routers", routed("olmo3"), "tiny")
    with pytest.raises(ValueError, match=told):
        load_into(tiny_model(family, **changes), tmp_path / "routers")


REFUSED = {
    "no full layer": ("olmo3", {"layer_types": ["sliding_attention"] * 5}, "every layer has its own sliding window"),
    "Mistral's, which is for all layers": ("mistral", {}, "layer 1 has its own sliding window of 12 tokens"),
    "another kind of layer": ("qwen3", {"layer_types": ["chunked_attention"] * 2 + ["full_attention"] * 3},
                              "layer 0 is of type 'chunked_attention', expected full_attention, sliding_attention or"),
    "both directions": ("gemma3_text", {"use_bidirectional_attention": True}, "layer 1 lets queries see later keys"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_refused_by_name(case):
    family, changes, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        attach(tiny_model(family, **{**SLIDING, **changes}), small_config())


def test_window_mask():
    model, bounds = routed("olmo3"), torch.tensor([0, 20, 50])
    with torch.no_grad(), override_routes(model, 0):
        packed = model(random_ids(1, 50), cu_seq_lens=bounds, use_cache=False)
        alone = [model(random_ids(1, 50)[:, a:b]) for a, b in ((0, 20), (20, 50))]
    torch.testing.assert_close(packed.logits[0], torch.cat([one.logits[0] for one in alone]), rtol=1e-4, atol=1e-4)
    cache = new_cache(model)
    ids, mask = left_padded(random_ids(2, 20), [0, 15])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        model(random_ids(2, 1), past_key_values=cache)
    layout = cache.routed[0].layout
    seen = window_mask(layout, 8, 8)[:, 0, 0]
    assert seen.tolist() == [[True] * 8, [False] * 2 + [True] * 6]
    assert route_of(cache).route.shape == (3, 2, 2)
