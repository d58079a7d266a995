"""XAttention's selection against loops, brute force and its own definition."""

import math

import pytest
import torch

from elastic.kernels import Pattern, select_blocks, xattention_oracle
from elastic.kernels.block_bits import mask_from_bits, query_block
from elastic.kernels.params import Ranges
from elastic.kernels.xattention_oracle import UNITS, block_mass, block_relations, choose, select_oracle


def problem(seed, queries, keys, *, heads=4, kv_heads=2, dim=8, rows=1):
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(rows, queries, heads, dim, generator=gen, dtype=torch.float64) * 2
    return q, torch.randn(rows, keys, kv_heads, dim, generator=gen, dtype=torch.float64) * 2


def mass_by_loops(q, k, stride, block, scale):
    """One head; q [Lq, D], k [Lk, D]."""
    (queries, dim), keys, size = q.shape, k.shape[0], query_block(block)
    past, zero = keys - queries, torch.zeros(dim, dtype=q.dtype)
    mass = torch.zeros(-(-queries // size), -(-keys // block), dtype=q.dtype)
    for i in range(-(-queries // stride)):
        scores = {}
        for j in range(-(-keys // stride)):
            if j * stride <= past + i * stride + stride - 1:
                pairs = [(i * stride + stride - 1 - r, j * stride + r) for r in range(stride)]
                dots = [(q[a] if a < queries else zero) @ (k[b] if b < keys else zero) for a, b in pairs]
                scores[j] = float(sum(dots)) * scale / stride
        total = sum(math.exp(s) for s in scores.values())
        for j, s in scores.items():
            mass[i * stride // size, j * stride // block] += math.exp(s) / total
    return mass


@pytest.mark.parametrize(
    ("queries", "keys", "stride", "block"),
    [
        (64, 64, 4, 8),
        (61, 61, 4, 8),
        (7, 61, 4, 8),
        (1, 30, 8, 8),
        (200, 200, 16, 64),
        (130, 301, 8, 128),
        (3, 3, 4, 4),
    ],
)
def test_mass_is_the_definition(queries, keys, stride, block):
    q, k = problem(0, queries, keys)
    mass = block_mass(q[0].transpose(0, 1), k[0].transpose(0, 1), stride, block, 0.3)
    for head in range(4):
        torch.testing.assert_close(mass[head], mass_by_loops(q[0, :, head], k[0, :, head // 2], stride, block, 0.3))
    rows = torch.tensor([min(query_block(block), queries - m) for m in range(0, queries, query_block(block))])
    torch.testing.assert_close(mass.sum(-1), (-(-rows // stride)).double().expand(4, -1))


def test_mass_does_not_depend_on_the_chunks(monkeypatch):
    q, k = (x[0].transpose(0, 1) for x in problem(1, 500, 700))
    whole = block_mass(q, k, 8, 64, 0.3)
    monkeypatch.setattr(xattention_oracle, "_CHUNK_SCORES", 1)
    torch.testing.assert_close(block_mass(q, k, 8, 64, 0.3), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_ten_thousand_rows_are_minimal_and_hold_the_threshold(ties):
    """No smaller set with the forced blocks reaches the threshold, and of equal blocks the first are taken."""
    gen = torch.Generator().manual_seed(2)
    queries, block = 128 * 40, 128
    own, seen = block_relations(queries, queries, block, torch.device("cpu"))
    mass = torch.rand(250, 40, 40, generator=gen) ** 8
    mass = ((mass * 8).round() / 8 if ties else mass).masked_fill(~seen, 0.0)
    threshold = 0.9
    chosen = choose(mass, own, seen, threshold)
    forced = own.clone()
    forced[:, 0] = True
    assert bool((chosen | ~forced).all()) and not bool((chosen & ~seen).any())
    units = (mass.double() * UNITS).floor()
    wanted, held = torch.ceil(threshold * units.sum(-1)), (units * chosen).sum(-1)
    assert bool((held >= wanted).all())
    others = units.masked_fill(forced | ~seen, -1)
    for row_units, row_others, row_chosen, row_wanted, row_forced in zip(
        *(x.flatten(0, 1).tolist() for x in (units, others, chosen, wanted, forced.expand_as(chosen))), strict=True
    ):
        held, taken = sum(u for u, f in zip(row_units, row_forced, strict=True) if f), set()
        for j in sorted((j for j, u in enumerate(row_others) if u >= 0), key=lambda j: (-row_others[j], j)):
            if held >= row_wanted:
                break
            held, taken = held + row_others[j], taken | {j}
        assert taken == {j for j, c in enumerate(row_chosen) if c and not row_forced[j]}


def test_threshold_one_takes_every_block_with_mass():
    own, seen = block_relations(512, 512, 64, torch.device("cpu"))
    assert torch.equal(choose(torch.rand(3, 4, 8).masked_fill(~seen, 0.0), own, seen, 1.0), seen.expand(3, -1, -1))


def test_published_first_chunk_rule():
    """Emulated block by block: with diagonal mass d and other masses o1 >= o2 >= ..., o1 is always taken and op iff
    d + o1 + ... + o(p-2) is below the threshold; block 0 comes along.
    """
    own, seen = block_relations(128 * 12, 128 * 12, 128, torch.device("cpu"))
    mass = (torch.rand(50, 12, 12, generator=torch.Generator().manual_seed(3)) ** 4).masked_fill(~seen, 0.0)
    chosen = choose(mass, own, seen, 0.8, lagging_rows=9)
    units = (mass.double() * UNITS).floor()
    for h in range(50):
        for m in range(9):
            others = sorted((j for j in range(m)), key=lambda j: -units[h, m, j])
            need, expected = math.ceil(0.8 * float(units[h, m].sum())), {0, m}
            for p, j in enumerate(others):
                if p == 0 or float(units[h, m, m] + units[h, m, others[: p - 1]].sum()) < need:
                    expected.add(j)
            assert expected == set(chosen[h, m].nonzero()[:, 0].tolist())
    assert torch.equal(chosen[:, 9:], choose(mass, own, seen, 0.8)[:, 9:])
    assert int(chosen[:, :9].sum()) > int(choose(mass, own, seen, 0.8)[:, :9].sum())


def test_published_chunk_counts_tokens_of_uncached_samples():
    q, k = problem(11, 128 * 6, 128 * 6)
    sizes = {"pattern": Pattern.without_streaming(128, 0.1), "stride": 16, "threshold": 0.7}
    mode = torch.full((1, 2), 2)
    ours, theirs = (select_oracle(q, k, mode, **sizes, published_chunk=chunk) for chunk in (0, 512))
    assert torch.equal(ours[:, :, 4:], theirs[:, :, 4:]) and not torch.equal(ours, theirs)
    again = select_oracle(q[:, 128:], k, mode, **sizes, published_chunk=512)
    assert torch.equal(again, ours[:, :, 1:])


@pytest.mark.parametrize("block", [8, 64])
def test_samples_of_a_row_are_chosen_as_if_alone(block):
    """Packed and padded samples; other modes and rows of no sample get no bits."""
    bounds = [(0, 3, 130, 130), (0, 140, 141, 1), (1, 20, 300, 280), (0, 150, 150, 0)]  # row, begin, end, queries
    q, k = problem(4, 310, 310, rows=2)
    mode = torch.tensor([[2, 2], [0, 2], [2, 1], [2, 2]], dtype=torch.int32)
    row, begin, end, queries = (torch.tensor(x, dtype=torch.int32) for x in zip(*bounds, strict=True))
    queries = torch.minimum(queries, end - begin)
    ranges, sizes = Ranges(end - queries, end, begin, end, row), {"stride": 4, "threshold": 0.6}
    bits = select_blocks(q, k, mode, Pattern.without_streaming(block), ranges, **sizes)
    assert bits.shape == (4, 4, -(-310 // query_block(block)), -(-310 // (32 * block)))
    for n, (r, b, e, count) in enumerate(
        zip(row.tolist(), begin.tolist(), end.tolist(), queries.tolist(), strict=True)
    ):
        for kv_head, of_head in enumerate(mode[n].tolist()):
            mine = bits[n, 2 * kv_head : 2 * kv_head + 2]
            if of_head != 2 or count == 0:
                assert not bool(mine.any())
                continue
            own, every = (q[r : r + 1, e - count : e], k[r : r + 1, b:e]), torch.full((1, 2), 2, dtype=torch.int32)
            alone = select_blocks(*own, every, Pattern.without_streaming(block), **sizes)
            alone = alone[0, 2 * kv_head : 2 * kv_head + 2]
            assert torch.equal(mine[:, : alone.shape[1], : alone.shape[2]], alone)
            assert not bool(mine[:, alone.shape[1] :].any()) and not bool(mine[..., alone.shape[2] :].any())


def test_last_queries_choose_as_in_the_whole_sample():
    q, k = problem(5, 512, 512)
    arguments = {"pattern": Pattern.without_streaming(64, 0.2), "stride": 8, "threshold": 0.7}
    mode = torch.full((1, 2), 2, dtype=torch.int32)
    whole = select_blocks(q, k, mode, **arguments)
    assert torch.equal(select_blocks(q[:, 256:], k, mode, **arguments), whole[:, :, 2:])
    single = mask_from_bits(select_blocks(q[:, 511:], k, mode, **arguments))[0, :, 0]
    assert bool(single[:, [0, 7]].all())  # first block and the query's own


def test_every_query_sees_itself_whatever_the_offset():
    for queries, keys in [(130, 391), (257, 300), (1, 129)]:
        own, seen = block_relations(queries, keys, 64, torch.device("cpu"))
        for i in range(queries):
            assert bool(own[i // 128, (keys - queries + i) // 64]) and bool(seen[i // 128, 0])


WRONG = {
    "stride=12 does not divide block=64": {"stride": 12},
    "block=96; expected a power of two": {"block": 96, "stride": 8},
    "threshold=0": {"threshold": 0.0},
    "threshold=1.5": {"threshold": 1.5},
    "scale=-1.0 is not positive": {"scale": -1.0},
}


@pytest.mark.parametrize("message", WRONG)
def test_refusals(message):
    q, k = problem(6, 64, 64)
    given = {"stride": 8, "threshold": 0.9, "block": 64, **WRONG[message]}
    pattern = Pattern.without_streaming(given.pop("block"), given.pop("scale", None))
    with pytest.raises(ValueError, match=message):
        select_blocks(q, k, torch.full((1, 2), 2, dtype=torch.int32), pattern, **given)
    with pytest.raises(ValueError, match="mode is"):
        select_blocks(q, k, torch.full((1, 3), 2, dtype=torch.int32), Pattern(0, 1, block=64), stride=8, threshold=0.9)


def test_operator_keeps_its_contract():
    q, k = (x.float() for x in problem(7, 100, 100))
    args = (q, k, torch.full((1, 2), 2, dtype=torch.int32), 8, 0.9, 64, 0.3, *(None,) * 5)
    torch.library.opcheck(torch.ops.elastic.xattention_select, args)
