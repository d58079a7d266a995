"""XAttention heads in a plan: FA-XA and XA-SSA against the oracle, and what they visit."""

import importlib
import itertools

import pytest
import torch

from elastic.attention import reference
from elastic.attention.block_selection import BlockPairs, density
from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import batch_layout, packed_layout
from elastic.attention.modes import BLOCK_SPARSE, FULL, STREAMING
from elastic.attention.routed import fused, routed_attention
from elastic.kernels.block_bits import count_bits, mask_from_bits, query_block
from elastic.kernels.params import Pattern
from elastic.kernels.xattention_oracle import select_oracle
from tests.helpers.xattention import sparse_of

CPU = torch.device("cpu")
SCALE = 0.25
BOUNDS = [0, 1, 130, 300]


def inputs(rows, queries, keys, heads=4, kv_heads=2, seed=0):
    """Queries and keys that prefer some keys to others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, queries, 16), (rows, kv_heads, keys, 16), (rows, kv_heads, keys, 16))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.requires_grad_() for x in (3 * q, 3 * k, v))


def oracle_mask(q, k, sparse):
    """What XAttention heads see of whole rows, [B, H, Lq, Lk]; a single query sees everything."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        return torch.ones(q.shape[0], q.shape[1], 1, keys, dtype=torch.bool)
    mode = torch.full((q.shape[0], k.shape[1]), BLOCK_SPARSE)
    pattern = Pattern.without_streaming(sparse.block, SCALE)
    sizes = {"stride": sparse.stride, "threshold": sparse.threshold}
    bits = select_oracle(q.detach().transpose(1, 2), k.detach().transpose(1, 2), mode, pattern, **sizes)
    blocks = mask_from_bits(bits).repeat_interleave(sparse.block, -1)[..., :keys]
    rows = blocks.repeat_interleave(query_block(sparse.block), -2)[:, :, :queries]
    return rows & (torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None])


def routed_output(*arguments):
    return routed_attention(*arguments).output


def mixed_by_the_oracle(q, k, v, route, sparse):
    return reference.routed_attention(q, k, v, route, sparse, SCALE, oracle_mask(q, k, sparse)).transpose(1, 2)


@pytest.mark.parametrize("name", ["FA-XA", "SSA-XA"])
@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (193, 193), (300, 300), (1, 90), (150, 290)])
def test_mixed_routes_equal_the_oracle(name, block, queries, keys):
    sparse = sparse_of(name, block)
    q, k, v = inputs(2, queries, keys)
    route = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    plan = HeadPlan.build(route, sparse, batch_layout(2, queries, keys - queries, CPU))
    expected = mixed_by_the_oracle(q, k, v, route, sparse)
    torch.testing.assert_close(routed_attention(q, k, v, route, plan, SCALE).output, expected, rtol=0, atol=1e-12)
    if block == 64:  # the operators take no smaller blocks
        chosen = routed_attention(q, k, v, route, plan, SCALE).plan
        torch.testing.assert_close(fused(q, k, v, route, chosen, SCALE), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["FA-XA", "XA-SSA"])
@pytest.mark.parametrize("block", [4, 64])
def test_gradients_equal_those_of_mixing_both_branches_under_fixed_blocks(name, block):
    """Straight-through against autograd through r * O_1 + (1 - r) * O_0: PyTorch path, and the fused operators."""
    sparse = sparse_of(name, block)
    for values in ([[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]):
        grads = []
        for path in ("oracle", "torch", "fused"):
            if path == "fused" and block < 64:
                continue
            q, k, v = inputs(2, 200, 200)
            route = torch.tensor(values, dtype=torch.float64).requires_grad_()
            if path == "oracle":
                out = mixed_by_the_oracle(q, k, v, route, sparse)
            else:
                plan = HeadPlan.build(route, sparse, batch_layout(2, 200, 0, CPU))
                chosen = routed_attention(q, k, v, route, plan, SCALE).plan
                out = (routed_output if path == "torch" else fused)(q, k, v, route, chosen, SCALE)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
            grads.append(torch.autograd.grad((out * weight).sum(), (q, k, v, route)))
        for found in grads[1:]:
            for ours, expected in zip(found, grads[0], strict=True):  # the route's gradient is summed in fp32
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-3 if expected.shape == (2, 2) else 1e-6)
        assert float(grads[0][3].abs().max()) > 1.0


@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("name", ["FA-XA", "XA-SSA"])
def test_packed_samples_and_their_route_gradients_equal_the_samples_alone(name, block):
    sparse = sparse_of(name, block)
    q, k, v = inputs(1, 300, 300)
    route = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    plan = HeadPlan.build(route, sparse, packed_layout(torch.tensor(BOUNDS, dtype=torch.int32), None, 300, CPU))
    parts, shares = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(BOUNDS)):
        own = tuple(t[:, :, begin:end] for t in (q, k, v))
        parts.append(reference.routed_attention(*own, route[n : n + 1], sparse, SCALE, oracle_mask(*own[:2], sparse)))
        alone = HeadPlan.build(route[n : n + 1], sparse, batch_layout(1, end - begin, 0, CPU))
        shares.append(routed_attention(*own, route[n : n + 1], alone, SCALE).density)
    expected = torch.cat(parts, 2).transpose(1, 2)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    want = torch.autograd.grad((expected * weight).sum(), (q, k, v, route), retain_graph=True)
    chosen = routed_attention(q, k, v, route, plan, SCALE).plan
    torch.testing.assert_close(density(chosen), torch.cat(shares))
    for run in (routed_output, fused)[: 2 if block == 64 else 1]:
        out = run(q, k, v, route, chosen, SCALE)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        found = torch.autograd.grad((out * weight).sum(), (q, k, v, route))
        for ours, theirs in zip(found, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3 if theirs.shape == (3, 2) else 1e-6)


def test_a_share_of_the_slots_estimates_the_route_gradient_with_blocks(monkeypatch):
    """The mean over all equally likely draws is the exact gradient: slots find their own rows of the bits."""
    q, k, v = inputs(1, 1500, 1500, seed=2)
    layout = packed_layout(torch.tensor([0, 700, 1500]), None, 1500, CPU)
    monkeypatch.setattr(
        importlib.import_module("elastic.kernels.route_gap"), "_TARGET_SLOTS", 3
    )  # slots of several query blocks
    gradients = []
    for offset in (None, 0, 1, 2, 3):
        route = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
        plan = HeadPlan.build(route, sparse_of("FA-XA", 64), layout, 1.0 if offset is None else 0.25)
        chosen = routed_attention(q, k, v, route, plan, SCALE).plan
        if offset is not None:
            monkeypatch.setattr(torch, "randint", lambda high, size, o=offset, **_: torch.full(size, o))
            layout._memo.clear()
        out = fused(q, k, v, route, chosen, SCALE)
        gradients.append(torch.autograd.grad((out * torch.sin(out.detach())).sum(), route)[0])
    torch.testing.assert_close(torch.stack(gradients[1:]).mean(0), gradients[0], rtol=1e-4, atol=1e-3)
    assert not torch.allclose(gradients[1], gradients[0], rtol=1e-2)


def test_left_padding_equals_the_samples_alone():
    sparse = sparse_of("FA-XA")
    q, k, v = inputs(2, 120, 120)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[1, :41] = 0
    route = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    plan = HeadPlan.build(route, sparse, batch_layout(2, 120, 0, CPU, mask))
    chosen = routed_attention(q, k, v, route, plan, SCALE).plan
    out, share = routed_attention(q, k, v, route, chosen, SCALE).output, density(chosen)
    for row, pad in ((0, 0), (1, 41)):
        own = tuple(x[row : row + 1, :, pad:] for x in (q, k, v))
        expected = mixed_by_the_oracle(*own, route[row : row + 1], sparse)
        torch.testing.assert_close(out[row : row + 1, pad:], expected, rtol=0, atol=1e-12)
        alone = HeadPlan.build(route[row : row + 1], sparse, batch_layout(1, 120 - pad, 0, CPU))
        expected = routed_attention(*own, route[row : row + 1], alone, SCALE).density
        torch.testing.assert_close(share[row : row + 1, 1], expected[:, 1])


@pytest.mark.parametrize("block", [4, 64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (129, 129), (300, 300), (70, 333), (5, 1000)])
def test_density_counts_the_pairs_in_visited_blocks(block, queries, keys):
    sparse = sparse_of("FA-XA", block)
    q, k, _ = inputs(1, queries, keys)
    mode, pattern = torch.full((1, 2), 2), Pattern.without_streaming(block, SCALE)
    bits = select_oracle(q.transpose(1, 2), k.transpose(1, 2), mode, pattern, stride=4, threshold=0.5)
    share = BlockPairs.of(torch.tensor([queries]), torch.tensor([keys]), block, bits.shape[2]).visited_share(bits)
    visible = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    expected = oracle_mask(q, k, sparse).sum((-1, -2)) / visible.sum()
    torch.testing.assert_close(share, expected.double())


def test_bits_are_counted():
    bits = torch.tensor([[0, -1], [1, 1 << 30], [-(1 << 31), 0x55555555]], dtype=torch.int64).to(torch.int32)
    assert count_bits(bits).tolist() == [32, 2, 17]


def test_single_queries_attend_in_full():
    for name, modes in (("FA-XA", [FULL, FULL]), ("XA-SSA", [FULL, STREAMING]), ("SSA-XA", [STREAMING, FULL])):
        plan = HeadPlan.build(torch.tensor([[0.0, 1.0]]), sparse_of(name), batch_layout(1, 1, 80, CPU))
        assert plan.mode_NK.tolist() == [modes]
        assert plan.flipped().mode_NK.tolist() == [modes[::-1]]
        assert not plan.chooses_blocks and density(plan) is None
    plan = HeadPlan.build(torch.tensor([[0.0, 1.0]]), sparse_of("XA-SSA"), batch_layout(1, 5, 80, CPU))
    assert plan.mode_NK.tolist() == [[BLOCK_SPARSE, STREAMING]] and plan.flipped().mode_NK.tolist() == [[1, 2]]
