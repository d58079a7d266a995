"""The pool by itself: slots, what a query sees, compaction, growth and selection, against a list of positions."""

import pytest
import torch

from elastic.cache.kv_pool import KVPool, PromptRows, heads_of, is_kept, position_in, slot_of, visible_slots
from elastic.config import SparseConfig
from elastic.visibility import visible
from tests.helpers.operations import Operations

SIZES = [
    SparseConfig(sink=s, window=w, block=4, granule=g) for s in (0, 4, 8) for w in (4, 16) for g in ("token", "block")
]


def stored_positions(count, ring, sparse):
    """Slot -> position after `count` appends, one by one: the slow twin of `slot_of` and `position_in`."""
    held = {}
    for position in range(count):
        ringed = ring and position >= sparse.sink
        held[sparse.sink + (position - sparse.sink) % sparse.window if ringed else position] = position
    return held


@pytest.mark.parametrize("sparse", SIZES, ids=str)
@pytest.mark.parametrize("ring", [True, False])
def test_slots_hold_what_was_appended(sparse, ring):
    rings = torch.tensor(ring)
    for count in range(1, 60):
        slots = sparse.sink + sparse.window if ring else 70
        held, slot = stored_positions(count, ring, sparse), torch.arange(slots)
        found = position_in(slot, torch.tensor(count), rings, sparse)
        assert found.tolist() == [held.get(s, -1) for s in range(slots)]
        position = torch.arange(-3, 65)
        kept = is_kept(position, torch.tensor(count), rings, sparse)
        assert position[kept].tolist() == sorted(held.values())
        assert [held[s] for s in slot_of(position[kept], rings, sparse).tolist()] == position[kept].tolist()


@pytest.mark.parametrize("sparse", SIZES, ids=str)
@pytest.mark.parametrize(("streaming", "ring"), [(True, True), (True, False), (False, False)])
def test_visible_slots_are_those_of_the_one_visibility_rule(sparse, streaming, ring):
    for count in range(1, 60):
        held = stored_positions(count, ring, sparse)
        sink, begin, end = (
            int(x) for x in visible_slots(torch.tensor(count), torch.tensor(streaming), torch.tensor(ring), sparse)
        )
        seen = sorted(held[s] for s in held if s < end and (s < sink or s >= begin))
        rule = {"sink": sparse.sink, "window": sparse.window, "granule": sparse.granule, "block": sparse.block}
        assert seen == [p for p in range(count) if not streaming or visible(count - 1, p, **rule)]


def filled(sparse, ring, begin, count, capacity, length=40, dim=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(len(begin), len(ring[0]), length, dim, generator=generator) for _ in range(2))
    pool = KVPool.build(k, v, PromptRows(torch.tensor(begin), torch.tensor(count), capacity, sparse), ring)
    return k, v, pool


def filled_from(k, v, ring, sparse):
    return KVPool.build(k, v, PromptRows(torch.tensor(BEGIN), torch.tensor(COUNT), [48, 40, 9], sparse), ring)


def expected_dense(x, ring, begin, count, sparse, length):
    out = torch.zeros(*x.shape[:2], length, x.shape[3])
    for b, of_sample in enumerate(ring):
        for k, r in enumerate(of_sample):
            for p in stored_positions(count[b], r, sparse).values():
                out[b, k, begin[b] + p] = x[b, k, begin[b] + p]
    return out


RING, BEGIN, COUNT = [[True, False], [True, True], [False, False]], [0, 7, 33], [40, 33, 7]


def test_build_keeps_what_heads_need_and_dense_puts_it_back():
    sparse = SparseConfig(sink=4, window=16, block=4)
    k, v, pool = filled(sparse, RING, BEGIN, COUNT, [48, 40, 9])
    assert pool.keys.shape == (20 + 48 + 20 + 20 + 9 + 9, 2)
    assert pool.nbytes == 2 * 126 * 2 * 4 == sum(pool.sample_bytes(b) for b in range(3))
    keys, values = pool.dense(torch.tensor(BEGIN), torch.tensor(COUNT), 40)
    assert torch.equal(keys, expected_dense(k, RING, BEGIN, COUNT, sparse, 40))
    assert torch.equal(values, expected_dense(v, RING, BEGIN, COUNT, sparse, 40))


@pytest.mark.parametrize("order", ["heads first", "tokens first", "of one projection", "odd rows"])
def test_tokens_are_taken_wherever_they_lie_in_memory(order):
    sparse = SparseConfig(sink=4, window=16, block=4)
    k, v, expected = filled(sparse, RING, BEGIN, COUNT, [48, 40, 9])
    if order == "tokens first":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    elif order == "of one projection":
        k, v = torch.stack([k, v], 2).transpose(1, 3).contiguous().transpose(1, 3).unbind(2)
    elif order == "odd rows":
        k, v = torch.cat([k, v, v[..., :1]], 3).split([2, 2, 1], 3)[:2]
    pool = KVPool.build(k, v, PromptRows(torch.tensor(BEGIN), torch.tensor(COUNT), [48, 40, 9], sparse), RING)
    assert torch.equal(pool.keys, expected.keys) and torch.equal(pool.values, expected.values)
    assert pool.base == expected.base and pool.used == expected.used


def test_layers_share_what_their_rings_have_nothing_to_do_with():
    sparse = SparseConfig(sink=4, window=16, block=4)
    tokens = PromptRows(torch.tensor(BEGIN), torch.tensor(COUNT), [48, 40, 9], sparse)
    k, v = torch.randn(2, 3, 40, 2, 5).transpose(2, 3).unbind(0)
    KVPool.build(k, v, tokens, RING)
    flipped = [[not r for r in of_sample] for of_sample in RING]
    with Operations() as counted:
        pool = KVPool.build(k, v, tokens, flipped)
    assert torch.equal(pool.keys, filled_from(k, v, flipped, sparse).keys)
    assert counted.launched == 3  # keys, values, and the index of both
    with Operations() as counted:
        pool.view([2, 0]), pool.joined(pool)
    assert counted.launched <= 24  # to make room; rows that leave cost none
    with Operations() as counted:
        heads_of([pool] * 30, [2, 0, 0, 1])
    assert counted.launched <= 3


def test_append_grow_and_select_follow_a_pool_built_at_once():
    sparse = SparseConfig(sink=4, window=16, block=4)
    k, v, whole = filled(sparse, RING, BEGIN, COUNT, [48, 40, 9])
    count, b = torch.tensor(COUNT) - 5, torch.arange(3)
    pool = KVPool.build(k, v, PromptRows(torch.tensor(BEGIN), count, [35, 28, 2], sparse), RING)
    pool = pool.rebuilt([0, 1, 2], [48, 40, 9])
    for _ in range(5):
        position = torch.tensor(BEGIN) + count
        base, ring = pool.heads
        rows = base + slot_of(count[:, None], ring, sparse)
        pool.append(rows, k[b, :, position][:, :, None], v[b, :, position][:, :, None])
        count = count + 1
    begin = torch.tensor(BEGIN)
    for one, two in zip(pool.dense(begin, count, 40), whole.dense(begin, count, 40), strict=True):
        assert torch.equal(one, two)
    chosen = [2, 0, 0]
    twin = pool.rebuilt(chosen, [9, 50, 48])
    for one, two in zip(twin.dense(begin[chosen], count[chosen], 40), whole.dense(begin, count, 40), strict=True):
        assert torch.equal(one, two[chosen])
