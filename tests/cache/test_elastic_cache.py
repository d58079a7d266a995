"""The elastic KV cache against the oracle that keeps every key and masks (tests/helpers/masked.py): decoding, beams,
batches, turns, prefix reuse, cropping.
"""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from elastic.cache import decode_attention
from elastic.model.attach import attach, override_routes, route_of
from elastic.model.compiling import compile_layers
from tests.helpers.cached import KINDS, generate, new_cache, routed, same
from tests.helpers.masked import masked_oracle
from tests.helpers.models import KV_HEADS, LAYERS, left_padded, random_ids, small_config, tiny_model, varied_routers


@pytest.fixture(params=["pytorch", "operator"])
def path(request, monkeypatch):
    """Decode by PyTorch over keys laid out by position, or by the decode operator (its CPU oracle) over the pool."""
    if request.param == "operator":
        monkeypatch.setattr(decode_attention, "unsupported_reason", lambda *_: None)
    return request.param


@functools.cache
def of_every_key(family, granule):
    """The oracle's answer to the padded batch, which neither the kind of cache nor the path of decoding changes."""
    model = routed(family, granule=granule)
    with masked_oracle(model):
        return generate(model, *left_padded(random_ids(4, 50), [0, 3, 17, 40]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granule", ["token", "block"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_greedy_on_a_left_padded_batch(family, granule, kind, path):
    model = routed(family, kind, granule)
    ids, mask = left_padded(random_ids(4, 50), [0, 3, 17, 40])
    expected = of_every_key(family, granule)
    cache = new_cache(model)
    same(generate(model, ids, mask, cache), expected)
    assert set(route_of(cache).route.unique().tolist()) == {0, 1}
    same(generate(model, ids, mask), expected)  # an ordinary cache takes the same paths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{"do_sample": True, "top_k": 9}, {"num_beams": 3}], ids=["sampling", "beams"])
def test_sampling_and_beams(options, kind, path):
    model = routed(kind=kind)
    ids, mask = left_padded(random_ids(3, 45), [0, 9, 30])

    def run(cache=None):
        torch.manual_seed(3)
        return model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=20, **options)

    with masked_oracle(model):
        expected = run()
    cache = new_cache(model)
    assert torch.equal(run(cache), expected)
    assert cache.counts == [n - 1 + 20 for n in (45, 36, 15) for _ in range(options.get("num_beams", 1))]


@pytest.mark.parametrize("kind", KINDS)
def test_all_heads_full_is_the_stock_model_bit_for_bit(kind):
    # Frozen first: PyTorch sums the last token's logits in another order where lm_head wants gradients.
    model = tiny_model(eos_token_id=None, initializer_range=0.3).requires_grad_(False)
    ids, mask = left_padded(random_ids(2, 40), [0, 11])
    expected = generate(model, ids, mask)
    attach(model, replace(small_config(), kv_cache=kind))
    with override_routes(model, 0):
        found = generate(model, ids, mask, new_cache(model))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("routes", [("full", "xattention"), ("xattention", "streaming")], ids=["FA-XA", "XA-SSA"])
def test_xattention_heads_keep_everything(routes, path):
    """Their block masks belong to the prompt; while decoding they are full heads, over either cache."""
    model = tiny_model(eos_token_id=None, initializer_range=0.3)
    config = small_config(route0=routes[0], route1=routes[1], stride=2)
    varied_routers(attach(model, replace(config, kv_cache="elastic")))
    ids, mask = left_padded(random_ids(3, 50), [0, 9, 30])
    expected, cache = generate(model, ids, mask), new_cache(model, step=1)
    same(generate(model, ids, mask, cache), expected)
    streaming = route_of(cache).route.sum((0, 2)) * ("streaming" in routes)
    rows = sum(int(s) * 20 + (LAYERS * KV_HEADS - int(s)) * n for s, n in zip(streaming, cache.counts, strict=True))
    assert cache.nbytes == rows * 2 * 16 * 4
    assert route_of(cache).density.shape == (LAYERS, 3, KV_HEADS)


def test_compiled_layers_compile_once(path):
    """`compile_layers`: the same answers, and a second request compiles nothing again."""
    from torch._dynamo.utils import counters

    model = routed()
    ids, mask = left_padded(random_ids(3, 45), [0, 9, 30])
    expected = generate(model, ids, mask, new_cache(model))
    compile_layers(model, backend="eager")
    same(generate(model, ids, mask, new_cache(model)), expected)
    compiled = counters["frames"]["total"]
    same(generate(model, ids, mask, new_cache(model)), expected)
    assert counters["frames"]["total"] == compiled > 0


def two_turns(model, cache, routes=None, seed=2):
    """Logits of a prompt, three tokens, a second turn, and six more tokens; and the routes of both turns."""
    first, mask = left_padded(random_ids(2, 60, seed=1), [0, 32])
    second, logits, decided = random_ids(2, 21, seed=seed), [], []

    def feed(ids, route):
        nonlocal mask
        mask = torch.cat([mask, torch.ones_like(ids)], 1) if logits else mask
        position = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        with torch.no_grad(), override_routes(model, route):
            out = model(ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits
        logits.append(out[:, -1])

    turns = routes or [None, None]
    for turn, ids, steps in ((0, first, 3), (1, second, 6)):
        feed(ids, turns[turn])
        decided.append(route_of(cache).route.clone())
        for step in range(steps):
            feed(random_ids(2, 1, seed=10 * turn + step), turns[turn])
    return torch.stack(logits), decided


@pytest.mark.parametrize("granule", ["token", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_turn_sees_exactly_what_its_heads_kept(kind, granule, path):
    model = routed(kind=kind, granule=granule)
    found, decided = two_turns(model, new_cache(model))
    with masked_oracle(model):
        expected, _ = two_turns(model, DynamicCache(config=model.config), [d.float() for d in decided])
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_heads_that_dropped_tokens_stay_sparse_and_others_route_again():
    back = over = 0
    for seed in range(6):
        model, model_full = routed(seed=seed), routed(kind="full", seed=seed)
        _, (first, second) = two_turns(model, new_cache(model))
        _, (again, free) = two_turns(model_full, new_cache(model_full))
        assert torch.equal(first, again)
        dropped = first.bool()  # both prompts are longer than sink + window
        assert bool((second >= first).all())
        # The first layer's keys do not depend on routes; deeper layers see what the heads below them answered.
        assert torch.equal(second[0], torch.where(dropped[0], 1, free[0]).to(torch.int8))
        back, over = back + int((free < first).sum()), over + int((second > first).sum())
    assert back and over, "the test needs heads that would go back to full, and heads that turn sparse"


def test_heads_that_dropped_nothing_yet_route_again():
    model, model_full = routed(), routed(kind="full")
    short, more = random_ids(1, 12), random_ids(1, 30, seed=4)
    decided = []
    for m in (model, model_full):
        cache = new_cache(m)
        with torch.no_grad():
            m(short, past_key_values=cache, use_cache=True)
            m(more, past_key_values=cache, use_cache=True)
        decided.append(route_of(cache).route)
    assert torch.equal(*decided)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copied_prefix_serves_several_continuations(kind):
    model = routed(kind=kind)
    prefix = new_cache(model)
    with torch.no_grad():
        model(random_ids(2, 50), past_key_values=prefix, use_cache=True)
    held = prefix.nbytes
    for seed in (5, 6, 5):
        turn = random_ids(2, 20, seed=seed)
        whole = torch.cat([random_ids(2, 50), turn], 1)
        cache = copy.deepcopy(prefix)
        found = generate(model, whole, None, cache, steps=6)
        routes = route_of(cache).route.float()
        with masked_oracle(model), override_routes(model, routes):
            ordinary = DynamicCache(config=model.config)
            with torch.no_grad(), override_routes(model, route_of(prefix).route.float()):
                model(random_ids(2, 50), past_key_values=ordinary, use_cache=True)
            same(found, generate(model, whole, None, ordinary, steps=6))
    assert prefix.nbytes == held and prefix.seen == 50


def test_repeat_and_select_follow_the_samples():
    model = routed()
    ids, mask = left_padded(random_ids(3, 50), [0, 20, 8])
    cache, token = new_cache(model), random_ids(3, 1, seed=9)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        wide, few, masked = copy.deepcopy(cache), copy.deepcopy(cache), copy.deepcopy(cache)
        expected = step_logits(model, cache, token, mask)
        wide.batch_repeat_interleave(2)
        found = step_logits(model, wide, token.repeat_interleave(2, 0), mask.repeat_interleave(2, 0))
        torch.testing.assert_close(found, expected.repeat_interleave(2, 0), rtol=2e-5, atol=2e-5)
        few.batch_select_indices(torch.tensor([2, 0]))
        found = step_logits(model, few, token[[2, 0]], mask[[2, 0]])
        torch.testing.assert_close(found, expected[[2, 0]], rtol=2e-5, atol=2e-5)
        masked.batch_select_indices(torch.tensor([False, True, True]))
        assert masked.counts == [30, 42] and route_of(masked).route.shape == (LAYERS, 2, KV_HEADS)


def step_logits(model, cache, token, mask):
    mask = torch.cat([mask, torch.ones_like(token)], 1)
    position = mask.sum(1, keepdim=True) - 1
    return model(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True).logits[:, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_crop_goes_back_exactly_or_refuses(kind):
    model = routed(kind=kind)
    ids, token = random_ids(1, 30), random_ids(1, 1, seed=3)
    ring = kind == "elastic"
    cache = new_cache(model)
    with torch.no_grad():
        model(ids[:, :14], past_key_values=cache, use_cache=True)
        expected = model(token, past_key_values=copy.deepcopy(cache), use_cache=True).logits
        for t in range(14, 18):
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache.crop(-4)
        assert cache.seen == 14 and cache.counts == [14]
        assert torch.equal(model(token, past_key_values=cache, use_cache=True).logits, expected)
        for t in range(15, 30):
            model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"cropping 28 tokens leaves \[2\].*fewer than the first \[8\]"):
        cache.crop(2)
    if ring:
        with pytest.raises(ValueError, match=r"heads have dropped \(sample 0 holds 30 tokens\); use kv_cache"):
            cache.crop(-3)
    else:
        cache.crop(-3)
        assert cache.counts == [27]
    cache.crop(0)
