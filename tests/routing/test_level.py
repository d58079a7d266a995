"""Level routers: the equation, the order, statistics of the features, caution with strange inputs, and decisions in a
model: alone, padded, packed, with caches and in later turns.
"""

import math

import pytest
import torch

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.data.prompts import EncodedPrompt
from elastic.inference.budget import bias_of_budget
from elastic.inference.generate import answer_tokens, generate, load, new_cache
from elastic.model import loading
from elastic.model.attach import (
    at_level,
    attach,
    biased,
    last_routes,
    override_routes,
    routers,
    set_config,
)
from elastic.model.checkpoint import save_elastic
from elastic.routing.kinds import build_router
from elastic.routing.level import USUAL, LevelRouter
from elastic.routing.router import MIN_STATISTICS
from tests.helpers.models import FAMILIES, KV_HEADS, LAYERS, left_padded, random_ids, small_config, tiny_model

HEADS, LAYER = 4, 1
SIZE = 2 * HEADS * (LAYER + 1) + 1
SPARSE = SparseConfig(sink=128, window=512)


def single(**settings):
    router = build_router(HEADS, 16, RouterConfig(kind="level", **settings), LAYER)
    assert isinstance(router, LevelRouter)
    router.begin_in_order(torch.tensor([0.1, 0.35, 0.6, 0.85]), 0.5)
    return router.eval()


def gathered(samples=400):
    router, generator = single(caution=0.05), torch.Generator().manual_seed(0)
    features = torch.randn(samples, SIZE, generator=generator) * 0.1 + 0.5
    for part in features.split(37):
        router.update_statistics(part)
    return router, features


def model_with_levels(family="llama", seed=0, **settings):
    """Levels that spread over the order: what random tokens reach differs little, so the weights are large."""
    config = small_config()
    model = attach(tiny_model(family), ElasticConfig(RouterConfig(kind="level", **settings), config.sparse))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(LAYERS * KV_HEADS, generator=generator).float().view(LAYERS, KV_HEADS)
    for router, place in zip(routers(model), order, strict=True):
        router.begin_in_order((place + 0.5) / (LAYERS * KV_HEADS), 0.5)
        with torch.no_grad():
            router.weight.copy_(4 * torch.randn(router.weight.shape, generator=generator))
            router.bias.fill_(0.5 - float(router.weight[:-1].sum()) * 0.6)
    return model


def decided(model, ids, **inputs):
    with torch.no_grad():
        model(ids, use_cache=False, **inputs)
    return last_routes(model)


def test_a_head_runs_sparse_where_its_place_is_below_the_level():
    router = single()
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(0))
    features = torch.randn(9, SIZE, generator=torch.Generator().manual_seed(1)) / 4
    logits, level = router(features), features @ router.weight + 0.5
    assert torch.equal(logits[..., 1] > logits[..., 0], router.rank < level[:, None])
    torch.testing.assert_close(logits[..., 1], 10 * (level[:, None] - router.rank))
    assert len({tuple(route) for route in logits.argmax(-1).tolist()}) > 2


def test_the_budget_moves_all_levels_alike():
    features = torch.rand(5, SIZE, generator=torch.Generator().manual_seed(1))
    levels = []
    for budget in (0.05, 0.1, 0.2):
        router = single(budget=budget)
        router.slope.fill_(0.08)
        router.fitted_budget.fill_(0.1)
        levels.append(router.level(features))
    torch.testing.assert_close(levels[2] - levels[1], torch.full((5,), 0.08 * math.log(2)))
    torch.testing.assert_close(levels[1] - levels[0], torch.full((5,), 0.08 * math.log(2)))


def test_a_given_level_takes_the_first_heads_of_the_order():
    assert single().route_at(torch.tensor([0.0, 0.3, 0.7, 1.0])).sum(1).tolist() == [0, 1, 3, 4]


def test_features_are_the_reach_so_far_and_the_length():
    router = single()
    largest, recent = torch.rand(2, 3, HEADS, generator=torch.Generator().manual_seed(2)).unbind(0)
    first = router.with_earlier(largest, recent, None, None)
    both = router.with_earlier(recent, largest, first, None)
    features = router.features(both, torch.tensor([100, 640, 5120]), SPARSE)
    assert torch.equal(features[:, :-1], torch.cat([largest, recent, recent, largest], 1))
    torch.testing.assert_close(features[:, -1], torch.tensor([0.0, 0.0, math.log(8)]))
    outline = router.outline(features)
    torch.testing.assert_close(outline[:, 0], (largest + recent).mean(1) / 2)
    torch.testing.assert_close(outline[:, 1], (largest + recent).mean(1) / 2)


def test_heads_that_have_dropped_keys_count_as_usual_ones():
    router, _ = gathered()
    reach = torch.rand(1, HEADS, generator=torch.Generator().manual_seed(3))
    dropped = torch.arange(HEADS)[None] < 2
    here = router.with_earlier(reach, reach, torch.zeros(1, 2 * HEADS), dropped)[:, 2 * HEADS :]
    usual = router.mean[2 * HEADS : -1]
    assert torch.equal(here[0, :2], usual[:2]) and torch.equal(here[0, 4:6], usual[4:6])
    assert torch.equal(here[0, 2:4], reach[0, 2:]) and torch.equal(here[0, 6:], reach[0, 2:])


def test_statistics_equal_those_of_all_batches_at_once():
    router, features = gathered()
    assert router.count.item() == 400
    torch.testing.assert_close(router.mean, features.mean(0))
    torch.testing.assert_close(router.scale, 1 / features.std(0, correction=0), rtol=1e-4, atol=1e-4)
    outline = router.outline(features)
    torch.testing.assert_close(router.outline_mean, outline.mean(0))
    torch.testing.assert_close(router.outline_scale, 1 / outline.std(0, correction=0), rtol=1e-4, atol=1e-3)


def test_strange_inputs_keep_more_full_heads():
    router, features = gathered()
    unlike = features[:100] + 0.5  # a dozen deviations of the means
    assert float(router.strangeness(features).mean()) < 0.05 < 1.0 < float(router.strangeness(unlike).min())
    assert bool((router.level(unlike) < router.level(features).mean()).all())
    bold = single(caution=0.0)
    bold.load_state_dict(router.state_dict())
    torch.testing.assert_close(bold.level(unlike), bold.level(features[:100]))  # no weights: one level for all
    few = single()
    few.update_statistics(features[: MIN_STATISTICS - 1])
    assert float(few.strangeness(unlike).abs().max()) == 0.0 and USUAL > 1


@pytest.mark.parametrize("slope", [-0.2, 0.2])
def test_a_level_does_not_drift_with_lengths_that_it_was_never_fitted_to(slope):
    """Fitted to 1K to 8K: from the edge on a prompt of any length runs at the edge's level, less the caution."""
    router, generator = single(caution=0.05), torch.Generator().manual_seed(0)
    reach = torch.rand(400, SIZE - 1, generator=generator)
    lengths = 1024 * 2 ** (3 * torch.rand(400, generator=generator))
    features = router.features(reach, lengths, SPARSE)
    router.update_statistics(features)
    with torch.no_grad():
        router.weight[-1] = slope
    fitted = router.level(features)
    z = (features[:, -1] - router.mean[-1]) * router.scale[-1]
    plain = 0.5 + slope * z - 0.05 * router.strangeness(features)
    torch.testing.assert_close(fitted, plain)  # within what was seen nothing changes
    usual = router.outline_mean[:2].mean().item()
    beyond = torch.tensor([16, 32, 64, 128, 1024]) * 1024
    far = router.features(torch.full((5, SIZE - 1), usual), beyond, SPARSE)
    level, strange = router.level(far), router.strangeness(far)
    assert bool((level.diff() <= 1e-6).all()) and float(strange[-1]) > 1
    edge = 0.5 + slope * USUAL
    torch.testing.assert_close(level[-1], edge - 0.05 * strange[-1])
    assert float(level.max()) <= max(edge, float(fitted.max())) + 1e-5


@pytest.mark.parametrize(("name", "value"), [("budget", 0), ("budget", "x"), ("budget", math.inf), ("caution", -1)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"router\.{name}="):
        RouterConfig(kind="level", **{name: value})


def test_the_former_name_of_the_papers_router_is_understood():
    assert ElasticConfig.from_dict({"router": {"kind": "input"}}).router == RouterConfig(kind="paper")


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_and_packed_prompts_decide_as_the_prompt_alone(family):
    model, ids = model_with_levels(family), random_ids(2, 70)
    spans = torch.tensor([[12, 60]])
    alone = [decided(model, row[None], user_spans=spans) for row in ids]
    route, logits = torch.cat([x.route for x in alone], 1), torch.cat([x.logits for x in alone], 1)
    assert 0 < float(route.mean()) < 1

    padded, mask = left_padded(torch.cat([torch.ones(2, 9, dtype=torch.int64), ids], 1), [9, 9])
    found = decided(model, padded, attention_mask=mask, user_spans=spans.repeat(2, 1) + 9)
    torch.testing.assert_close(found.logits, logits, atol=1e-3, rtol=1e-3)
    assert torch.equal(found.route, route)

    packed = decided(
        model,
        ids.reshape(1, -1),
        position_ids=torch.arange(70).repeat(2)[None],
        cu_seq_lens=torch.tensor([0, 70, 140], dtype=torch.int32),
        prompt_spans=torch.tensor([[0, 66], [70, 136]]),
        user_spans=torch.tensor([[12, 60], [82, 130]]),
    )
    torch.testing.assert_close(packed.logits, logits, atol=1e-3, rtol=1e-3)
    assert torch.equal(packed.route, route)


def test_what_stands_after_the_users_words_changes_nothing_in_the_first_layer():
    model, ids = model_with_levels(), random_ids(1, 70)
    spans = torch.tensor([[12, 60]])
    decided(model, ids, user_spans=spans)
    here = model._elastic_handle.state.last.record.decisions[0].features
    changed = ids.clone()
    changed[:, 60:] = random_ids(1, 10, seed=9)
    decided(model, changed, user_spans=spans)
    torch.testing.assert_close(model._elastic_handle.state.last.record.decisions[0].features, here)


@pytest.mark.parametrize("kv_cache", ["full", "elastic"])
def test_generation_keeps_the_decisions_of_the_prompt(kv_cache, tmp_path):
    model, tokenizer = model_with_levels(), loading.load_tokenizer("tiny")
    prompts = [EncodedPrompt(random_ids(1, n, seed=n)[0].tolist(), (5, n - 6)) for n in (70, 50)]
    alone = [answer_tokens(model, tokenizer, [p], max_new_tokens=4, kv_cache=kv_cache)[0] for p in prompts]
    together = answer_tokens(model, tokenizer, prompts, max_new_tokens=4, kv_cache=kv_cache)
    assert [made.token_ids for made in together] == [made.token_ids for made in alone]
    assert [made.report.route for made in together] == [made.report.route for made in alone]
    assert any(0 < made.report.msr < 1 for made in alone)


@pytest.mark.parametrize("kv_cache", ["full", "elastic"])
def test_a_later_turn_decides_again(kv_cache):
    model, ids = model_with_levels(), random_ids(1, 90)
    cache = new_cache(model, 8, kv_cache)
    with torch.no_grad():
        model(ids[:, :70], past_key_values=cache)
        first = cache._elastic_record.route.clone()
        model(ids[:, 70:], past_key_values=cache)
    second = cache._elastic_record.route
    if kv_cache == "full":
        whole = decided(model, ids)
        # the same routes of the first turn lie below, so the reach of layer 0 agrees
        torch.testing.assert_close(last_routes(model).logits[0], whole.logits[0], atol=1e-3, rtol=1e-3)
    else:
        assert bool((second >= first).all())  # what has dropped keys stays sparse


def test_all_heads_full_is_the_dense_model_bit_for_bit():
    ids = random_ids(2, 70)
    expected = tiny_model()(ids, use_cache=False).logits
    model = model_with_levels()
    with at_level(model, 0.0), torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected)
    with biased(model, -1e4), torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_a_given_level_is_run_and_still_judged():
    model, ids = model_with_levels(), random_ids(3, 70)
    free = decided(model, ids)
    with at_level(model, torch.tensor([0.0, 0.5, 1.0])):
        given = decided(model, ids)
    assert given.route.mean((0, 2)).tolist() == [0.0, 0.5, 1.0]
    torch.testing.assert_close(given.logits[0], free.logits[0])  # the first layer reads the same states
    for level in (1.5, -0.1):
        with pytest.raises(ValueError, match="outside"), at_level(model, level):
            pass
    other = attach(tiny_model(), small_config())
    with pytest.raises(ValueError, match="at_level needs routers of kind level, not paper"), at_level(other, 0.5):
        pass


def test_a_budget_for_one_call_is_that_of_the_routers():
    ids, config = random_ids(2, 70), small_config().sparse
    made = {}
    for budget in (0.1, 0.4):
        model = model_with_levels(budget=budget)
        for router in routers(model):
            router.slope.fill_(0.8)
            router.fitted_budget.fill_(0.1)
        made[budget] = model, decided(model, ids).route
    assert not torch.equal(made[0.1][1], made[0.4][1])
    for own, other in ((0.1, 0.4), (0.4, 0.1)):
        model = made[own][0]
        with biased(model, bias_of_budget(model, other)):
            assert torch.equal(decided(model, ids).route, made[other][1])
        assert bias_of_budget(model, own) == 0.0
    tokenizer, prompt = loading.load_tokenizer("tiny"), "f1 f2 f3 " * 20 + "find k1"
    for budget, (model, _) in made.items():
        by_call = generate(made[0.1][0], tokenizer, prompt, 2, budget=budget)
        assert by_call[0].report.route == generate(model, tokenizer, prompt, 2)[0].report.route
    for wrong in (0, -1, math.inf, True):
        with pytest.raises(ValueError, match="is not a number above 0"):
            generate(model, tokenizer, prompt, 2, budget=wrong)
    with pytest.raises(ValueError, match="both say how sparse"):
        generate(model, tokenizer, prompt, 2, budget=0.1, sparsity_bias=1.0)
    with pytest.raises(ValueError, match="routers of kind paper, which know nothing of divergences"):
        generate(attach(tiny_model(), ElasticConfig(sparse=config)), tokenizer, prompt, 2, budget=0.1)


def test_an_override_needs_no_reach():
    model = model_with_levels()
    with override_routes(model, 1):
        assert decided(model, random_ids(1, 70)).logits is None


def test_training_samples_routes_with_a_gradient():
    model, ids = model_with_levels().train(), random_ids(2, 70)
    for router in routers(model):
        with torch.no_grad():
            router.weight.zero_()
            router.bias.fill_(0.5)
    model(ids, use_cache=False)
    last_routes(model).route.sum().backward()
    grads = [router.weight.grad for router in routers(model)]
    assert all(grad is not None and float(grad.abs().sum()) > 0 for grad in grads)


def test_a_checkpoint_keeps_everything(tmp_path):
    model, _ = loading.load_backbone("tiny")
    attach(model, ElasticConfig(RouterConfig(kind="level", budget=0.3), small_config().sparse))
    for router in routers(model):
        router.update_statistics(torch.rand(20, router.mean.shape[0]))
        with torch.no_grad():
            router.weight.normal_()
    loaded, _ = load(save_elastic(tmp_path / "ck", model, "tiny"))
    ids = random_ids(1, 40) % 40 + 1
    one, two = decided(model.eval(), ids), decided(loaded, ids)
    assert torch.equal(one.logits, two.logits) and torch.equal(one.route, two.route)
    config = loaded._elastic_handle.state.config
    with pytest.raises(ValueError, match="fixed at attach"):
        set_config(loaded, ElasticConfig(RouterConfig(kind="level", budget=0.2), config.sparse))
