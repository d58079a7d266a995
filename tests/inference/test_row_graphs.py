"""Graphs of decode steps outlive the rows that they were captured with, and every row decodes as alone."""

import random

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.inference.decode_graph import DecodeGraph, RowGraphs
from tests.helpers.cached import KINDS, new_cache, routed
from tests.helpers.models import random_ids
from tests.helpers.replay import replayed

__all__ = ["replayed"]
STEPS = 40


def read(model, seed, **options):
    """Cache and first token of a prompt."""
    draw, cache = random.Random(seed), new_cache(model, **{"reserve": STEPS, **options})
    ids = random_ids(1, draw.randrange(4, 60), seed)
    return cache, model(ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)


def alone(model, seed):
    cache, token = read(model, seed)
    tokens = [token]
    for _ in range(STEPS - 1):
        tokens.append(DecodeGraph(model, cache).run(tokens[-1])[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens, 1)[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_rows_that_come_and_go_at_random_decode_as_alone(replayed, kind, seed):
    model, draw, waiting = routed(kind=kind), random.Random(seed), list(range(9))
    expected = {one: alone(model, one) for one in waiting}
    cache, token = read(model, waiting[0])
    graphs, rows, found = RowGraphs(model, cache), [waiting.pop(0)], {}
    found[rows[0]] = [token.item()]
    steps = 0
    while rows or waiting:
        while waiting and (not rows or (len(rows) < 5 and draw.random() < 0.3)):
            other, first = read(model, waiting[0])
            cache.join(other)
            token, found[waiting[0]] = torch.cat([token, first]), [first.item()]
            rows.append(waiting.pop(0))
        token, steps = graphs.step(token)[:, -1].argmax(-1, keepdim=True), steps + 1
        for row, one in zip(rows, token.flatten().tolist(), strict=True):
            found[row].append(one)
        kept = [at for at, row in enumerate(rows) if len(found[row]) < STEPS and draw.random() < 0.95]
        if len(kept) < len(rows):
            cache.keep(kept)
            rows, token = [rows[at] for at in kept], token[kept]
    assert all(answer == expected[row][: len(answer)] for row, answer in found.items())
    assert sum(map(len, found.values())) > 60 and 0 < replayed.captured < steps / 3


@torch.no_grad()
def test_storage_that_grows_takes_new_graphs(replayed):
    model = routed()
    (cache, token), expected = read(model, 1, reserve=0, step=8), alone(model, 1)
    graphs, found = RowGraphs(model, cache), [token.item()]
    for _ in range(STEPS - 1):
        token = graphs.step(token)[:, -1].argmax(-1, keepdim=True)
        found.append(token.item())
    assert found == expected and replayed.captured > 3


@torch.no_grad()
def test_rows_that_leave_make_room_for_others(replayed):
    model, caches = routed(), []
    for _ in range(4):
        caches.append(read(model, 5)[0])
    cache = caches.pop()
    cache.join(caches.pop())
    held = cache.nbytes
    for other in caches:
        cache.keep([1])
        cache.join(other)
        assert cache.nbytes == held and len(cache.counts) == 2
    cache.keep([])
    cache.join(read(model, 5)[0])
    assert cache.nbytes == held and cache.counts == read(model, 5)[0].counts
