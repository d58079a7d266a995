"""Reports after later turns: what was left out of all queries, each under the routes of its own turn."""

import pytest
import torch
from transformers import DynamicCache

from elastic.inference.generate import route_report
from elastic.model.attach import attach, elastic_config, override_routes, route_of
from elastic.routing.sparsity import causal_pairs
from elastic.visibility import lower_bound
from tests.helpers.cached import new_cache, routed
from tests.helpers.models import KV_HEADS, LAYERS, left_padded, random_ids, small_config, tiny_model, varied_routers


def visited(query, sparse):
    """Keys in the blocks that a streaming head visits for one query, row by row."""
    start = query // sparse.block * sparse.block
    local = max(0, lower_bound(start, sparse.window, sparse.granule, sparse.block)) // sparse.block * sparse.block
    sink = min(-(-sparse.sink // sparse.block) * sparse.block, local)
    return sink + query + 1 - local


def left_out(turns, sparse):
    """Share of the pairs of these (begin, end, route [L, K]) that are left out: of the last layer, and of all."""
    pruned, visible = torch.zeros(LAYERS, KV_HEADS, dtype=torch.float64), 0
    for begin, end, route in turns:
        pruned += sum(query + 1 - visited(query, sparse) for query in range(begin, end)) * route
        visible += causal_pairs(end) - causal_pairs(begin)
    return float(pruned[-1].mean() / visible), float(pruned.mean() / visible)


def read(model, cache, tokens, route, mask=None, seed=0):
    with torch.no_grad(), override_routes(model, route):
        model(random_ids(1 if mask is None else len(mask), tokens, seed), past_key_values=cache, attention_mask=mask)


def caches(model):
    return {"stock": DynamicCache(config=model.config), "full": new_cache(model)}


@pytest.mark.parametrize("kind", ["stock", "full"])
def test_each_turn_counts_under_its_own_routes(kind):
    model = routed(kind="full")
    cache, sparse = caches(model)[kind], elastic_config(model).sparse
    routes = [torch.randint(0, 2, (LAYERS, KV_HEADS), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    turns = []
    for tokens, route in zip((90, 21, 34), routes, strict=True):
        past = cache.get_seq_length()
        read(model, cache, tokens, route)
        turns.append((past, past + tokens, route))
        for _ in range(3):  # an answer, whose queries are nobody's prompt
            read(model, cache, 1, None)
        (report,) = route_report(model, cache)
        assert (report.esr_last, report.esr_all) == pytest.approx(left_out(turns, sparse))
        assert report.route == tuple(map(tuple, route.tolist())) and report.prompt_tokens == past + tokens


@pytest.mark.parametrize("kind", ["stock", "full"])
def test_turns_follow_rows_and_padding(kind):
    """A padded batch, turned about after its first turn."""
    model = routed(kind="full")
    cache, sparse = caches(model)[kind], elastic_config(model).sparse
    ids, mask = left_padded(random_ids(2, 70), [0, 25])
    route = torch.randint(0, 2, (LAYERS, 2, KV_HEADS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), override_routes(model, route):
        model(ids, past_key_values=cache, attention_mask=mask)
    cache.reorder_cache(torch.tensor([1, 0]))
    mask = torch.cat([mask.flip(0), torch.ones(2, 30, dtype=torch.int64)], 1)
    read(model, cache, 30, 1, mask)
    for report, length, begun in zip(route_report(model, cache), (45, 70), (1, 0), strict=True):
        turns = [(0, length, route[:, begun]), (length, length + 30, torch.ones(LAYERS, KV_HEADS))]
        assert (report.esr_last, report.esr_all) == pytest.approx(left_out(turns, sparse))


@pytest.mark.parametrize("kind", ["stock", "full"])
def test_what_a_crop_takes_away_does_not_count(kind):
    model = routed(kind="full")
    cache, sparse = caches(model)[kind], elastic_config(model).sparse
    for tokens, route in ((80, 0), (40, 1)):
        read(model, cache, tokens, route)
    cache.crop(-50)  # the second turn and the end of the first
    read(model, cache, 20, 1)
    (report,) = route_report(model, cache)
    turns = [(70, 90, torch.ones(LAYERS, KV_HEADS)), (0, 70, torch.zeros(LAYERS, KV_HEADS))]
    assert (report.esr_last, report.esr_all) == pytest.approx(left_out(turns, sparse))


def test_blocks_of_xattention_are_those_of_all_turns():
    model = attach(tiny_model(initializer_range=0.3), small_config(route1="xattention", stride=4, threshold=0.5))
    varied_routers(model)
    cache = DynamicCache(config=model.config)
    read(model, cache, 90, None)
    first, route = route_of(cache).density, route_of(cache).route
    read(model, cache, 30, None, seed=1)
    second, later = route_of(cache).density, route_of(cache).route
    pairs = torch.tensor([causal_pairs(90), causal_pairs(120) - causal_pairs(90)], dtype=torch.float64)
    kept = torch.stack([torch.where(r == 1, d, 1.0)[:, 0] for r, d in ((route, first), (later, second))])
    (report,) = route_report(model, cache)
    pruned = ((1 - kept).mean(2) * pairs[:, None]).sum(0) / pairs.sum()
    assert (report.esr_last, report.esr_all) == pytest.approx((float(pruned[-1]), float(pruned.mean())))
    runs = torch.stack([route, later])[:, :, 0] * pairs[:, None, None]
    share = (torch.stack([first, second])[:, :, 0] * runs).sum((0, 2)) / runs.sum((0, 2))
    for layer, value in enumerate(report.density):
        assert value == (pytest.approx(float(share[layer])) if runs[:, layer].sum() else None)
