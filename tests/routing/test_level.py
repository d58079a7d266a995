"""Level routers: the equation, the order, statistics of the features, caution with strange inputs."""

import math

import pytest
import torch

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.routing.kinds import build_router
from elastic.routing.level import CERTAIN, FEATURES, LevelRouter
from elastic.routing.router import MIN_STATISTICS

HEADS = 10
SPARSE = SparseConfig(sink=128, window=512)


def ordered(**settings):
    router = build_router(HEADS, 16, RouterConfig(kind="level", **settings))
    assert isinstance(router, LevelRouter)
    place = torch.arange(HEADS)
    rank = (place + 0.5) / HEADS
    router.begin_from(rank, torch.log(1e-3 * 10 ** (3 * rank)), place.float())
    return router.eval()


def trained(seed=0, samples=400):
    router = ordered()
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, len(FEATURES), generator=generator) * torch.tensor([0.1, 0.2, 0.1, 1.0]) + 0.5
    for part in features.split(37):
        router.update_statistics(part)
    return router, features


def test_a_head_runs_sparse_where_its_expected_divergence_is_within_the_budget():
    router = ordered(budget=0.02)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([1.0, 0.0, -2.0, 0.5]))
        router.bias.fill_(0.3)
    features = torch.randn(6, len(FEATURES), generator=torch.Generator().manual_seed(0))
    logits = router(features)
    strain = features @ router.weight + router.bias  # no statistics yet: features as they are, nothing strange
    expected = torch.exp(strain[:, None] + router.cost)  # KL at every head's place
    assert torch.equal(logits[..., 1] > logits[..., 0], expected < 0.02)
    torch.testing.assert_close(logits[..., 1], math.log(0.02) - strain[:, None] - router.cost)
    assert torch.equal(logits[..., 0], torch.zeros(6, HEADS))


def test_a_larger_budget_never_makes_a_head_full():
    features = torch.randn(50, len(FEATURES), generator=torch.Generator().manual_seed(1))
    routes = [ordered(budget=budget)(features).argmax(-1) for budget in (1e-3, 0.01, 0.1, 1.0)]
    assert all(bool((low <= high).all()) for low, high in zip(routes, routes[1:], strict=False))
    assert [float(route.float().mean()) for route in routes] == sorted({float(r.float().mean()) for r in routes})


def test_a_level_takes_the_first_heads_of_the_order():
    routes = ordered().route_at(torch.tensor([0.0, 0.3, 0.55, 1.0]))
    assert routes.sum(1).tolist() == [0, 3, 5, 10]
    assert torch.equal(routes, routes.cummin(1).values)


def test_features_add_up_over_layers_by_need():
    router, other = ordered(), ordered()
    with torch.no_grad():
        other.need.mul_(3)
    largest, recent = torch.rand(2, 4, HEADS, generator=torch.Generator().manual_seed(2)).unbind(0)
    first = router.summarise(largest, recent, None, None)
    both = other.summarise(recent, largest, first, None)
    features = router.features(both, torch.tensor([100, 640, 1280, 5120]), SPARSE)
    need, threefold = router.need, other.need
    total = need.sum() + threefold.sum()
    torch.testing.assert_close(features[:, 0], (largest @ need + recent @ threefold) / total)
    torch.testing.assert_close(features[:, 1], (largest + recent).mean(1) / 2)
    torch.testing.assert_close(features[:, 2], (recent @ need + largest @ threefold) / total)
    torch.testing.assert_close(features[:, 3], torch.tensor([0.0, 0.0, math.log(2), math.log(8)]))


def test_heads_that_have_dropped_keys_tell_nothing():
    router = ordered()
    largest = torch.rand(1, HEADS, generator=torch.Generator().manual_seed(3))
    dropped = torch.arange(HEADS)[None] < 4
    changed = torch.where(dropped, 0.77, largest)
    summaries = [router.summarise(reach, reach, None, dropped) for reach in (largest, changed)]
    assert torch.equal(*summaries)
    everything = torch.ones(1, HEADS, dtype=torch.bool)
    features = router.features(router.summarise(largest, largest, None, everything), torch.tensor([2000]), SPARSE)
    assert bool(torch.isfinite(features).all())


def test_statistics_equal_those_of_all_batches_at_once():
    router, features = trained()
    assert router.count.item() == 400
    torch.testing.assert_close(router.mean, features.mean(0))
    torch.testing.assert_close(router.covariance, torch.cov(features.T, correction=0), atol=1e-5, rtol=1e-4)
    standardised = router.standardise(features)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(len(FEATURES)), atol=1e-4, rtol=0)
    torch.testing.assert_close(standardised.std(0, correction=0), torch.ones(len(FEATURES)), atol=1e-3, rtol=0)


def test_strange_inputs_keep_more_full_heads():
    router, features = trained()
    like, unlike = features[:100], features[:100] + torch.tensor([1.0, 0.0, 0.0, 0.0])  # ten deviations
    assert float(router.strangeness(like).mean()) < 0.05 < 1.0 < float(router.strangeness(unlike).min())
    assert float(router(unlike).argmax(-1).float().mean()) < float(router(like).argmax(-1).float().mean())
    bold = ordered(caution=0.0)
    bold.load_state_dict(router.state_dict())
    assert torch.equal(bold(unlike).argmax(-1), bold(like).argmax(-1))  # no weights: the level is the same for all
    few = ordered()
    few.update_statistics(features[: MIN_STATISTICS - 1])
    assert float(few.strangeness(unlike).abs().max()) == 0.0 and CERTAIN > 1


@pytest.mark.parametrize(("name", "value"), [("budget", 0), ("budget", "x"), ("budget", math.inf), ("caution", -1)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"router\.{name}="):
        RouterConfig(kind="level", **{name: value})


def test_the_former_name_of_the_papers_router_is_understood():
    assert ElasticConfig.from_dict({"router": {"kind": "input"}}).router == RouterConfig(kind="paper")
