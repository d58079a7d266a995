"""Samples that were read apart decode together once their caches have joined, and leave it again, each as alone."""

import pytest
import torch

from elastic.inference.decode_graph import DecodeGraph
from elastic.model.attach import attach, route_of
from tests.helpers.cached import KINDS, new_cache, routed
from tests.helpers.models import random_ids, small_config, tiny_model, varied_routers

LENGTHS, STEPS = (50, 9, 33), 24


class Alone:
    """A prompt in a cache of its own, and its greedy answer."""

    def __init__(self, model, ids):
        self.model, self.cache = model, new_cache(model, reserve=2)
        self.logits = [model(ids, past_key_values=self.cache).logits[:, -1]]

    def step(self):
        token = self.logits[-1].argmax(-1, keepdim=True)
        self.logits.append(DecodeGraph(self.model, self.cache).run(token)[:, -1])


def read(model):
    prompts = [random_ids(1, length, seed) for seed, length in enumerate(LENGTHS)]
    return [Alone(model, ids) for ids in prompts], [Alone(model, ids) for ids in prompts]


def step(model, cache, rows):
    token = torch.cat([row.logits[-1].argmax(-1, keepdim=True) for row in rows])
    logits = DecodeGraph(model, cache).run(token)[:, -1]
    for row, its in zip(rows, logits.split(1), strict=True):
        row.logits.append(its)


def compare(rows, expected):
    for row, one in zip(rows, expected, strict=True):
        torch.testing.assert_close(
            torch.cat(row.logits), torch.cat(one.logits[: len(row.logits)]), rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_rows_that_join_and_leave_decode_as_alone(family, kind):
    model = routed(family, kind)
    (first, second, third), expected = read(model)
    for one in expected:
        for _ in range(STEPS):
            one.step()
    cache = second.cache  # the shortest, so that the others move it
    for _ in range(5):
        step(model, cache, [second])
    cache.join(first.cache)
    for _ in range(7):
        step(model, cache, [second, first])
    cache.join(third.cache)
    assert cache.counts == [9 + 12, 50 + 7, 33]
    step(model, cache, [second, first, third])
    cache.batch_select_indices(torch.tensor([0, 2]))  # the longest leaves
    for _ in range(6):
        step(model, cache, [second, third])
    assert cache.counts == [9 + 19, 33 + 7]
    compare([first, second, third], expected)
    routes = route_of(cache).route
    for place, one in enumerate((expected[1], expected[2])):
        assert torch.equal(routes[:, place], route_of(one.cache).route[:, 0])


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_later_turn_on_a_joined_cache_is_routed_as_alone(kind):
    model = routed(kind=kind)
    rows, alone = read(model)
    cache = rows[0].cache
    for other in rows[1:]:
        cache.join(other.cache)
    turn = random_ids(1, 20, seed=9)
    for one in alone:
        one.logits = [model(turn, past_key_values=one.cache).logits[0, -1]]
    mask = torch.tensor([[0] * (50 - length) + [1] * (length + 20) for length in LENGTHS])
    positions = (mask.cumsum(1) - 1)[:, -20:].clamp(min=0)
    found = model(turn.expand(3, -1), attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(found, torch.stack([one.logits[0] for one in alone]), rtol=1e-4, atol=1e-4)
    routes = torch.cat([route_of(one.cache).route for one in alone], 1)
    assert torch.equal(route_of(cache).route, routes)


@torch.no_grad()
def test_heads_of_xattention_join_too():
    model = tiny_model(eos_token_id=None, initializer_range=0.3)
    varied_routers(attach(model, small_config(route1="xattention", stride=2)))
    (first, second, _), expected = read(model)
    density = torch.cat([route_of(one.cache).density for one in expected[:2]], 1)
    first.cache.join(second.cache)
    assert torch.equal(route_of(first.cache).density, density)
    for _ in range(4):
        step(model, first.cache, [first, second])
        expected[0].step()
        expected[1].step()
    compare([first, second], expected[:2])


@torch.no_grad()
def test_caches_that_do_not_belong_together_are_refused():
    model = routed()
    filled = Alone(model, random_ids(1, 20)).cache
    with pytest.raises(ValueError, match="once each has read a prompt"):
        filled.join(new_cache(model))
    with pytest.raises(ValueError, match="once each has read a prompt"):
        new_cache(model).join(filled)
    other = tiny_model(eos_token_id=None)
    varied_routers(attach(other, small_config(window=8)))
    with pytest.raises(ValueError, match="same sparse settings"):
        filled.join(Alone(other, random_ids(1, 20)).cache)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_who_joins_a_cache_that_all_have_left_decodes_as_alone(family):
    model = routed(family)
    (first, second, third), (_, *expected) = read(model)
    cache = first.cache
    step(model, cache, [first])
    cache.keep([])
    for joining in (second, third):
        cache.join(joining.cache)
    for _ in range(9):
        step(model, cache, [second, third])
        for one in expected:
            one.step()
    cache.keep([1])
    step(model, cache, [third])
    expected[1].step()
    compare([second, third], expected)
