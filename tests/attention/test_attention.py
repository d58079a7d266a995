"""routed_attention against the oracle: values, gradients, padding, packing, cached decoding."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.attention import reference
from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import batch_layout, packed_layout, sent
from elastic.attention.routed import routed_attention
from elastic.attention.spans import check_user
from elastic.config import SparseConfig
from elastic.routing.relaxation import decide, sample_route
from elastic.visibility import lower_bound

CPU = torch.device("cpu")
SCALE = 0.25
SPARSE = SparseConfig(sink=4, window=16, block=4)


def inputs(rows: int, queries: int, keys: int, heads: int = 4, kv_heads: int = 2, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, queries, 16), (rows, kv_heads, keys, 16), (rows, kv_heads, keys, 16))
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("granule", ["token", "block"])
@pytest.mark.parametrize(("sink", "window"), [(0, 4), (4, 16), (8, 8), (64, 64), (12, 200)])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (64, 64), (65, 65), (193, 193), (1, 90), (7, 90)])
def test_mixed_routes_equal_the_oracle(granule, sink, window, queries, keys):
    sparse = SparseConfig(sink=sink, window=window, block=4, granule=granule)
    q, k, v = inputs(2, queries, keys)
    route = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    layout = batch_layout(2, queries, keys - queries, CPU)
    out = routed_attention(q, k, v, route, HeadPlan.build(route, sparse, layout), SCALE).output
    expected = reference.routed_attention(q, k, v, route, sparse, SCALE).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_all_gradients_equal_those_of_mixing_both_branches():
    """The straight-through backward against autograd through r * O_SA + (1 - r) * O_FA, in fp64."""
    for route_values in itertools.product([0.0, 1.0], repeat=4):
        grads = []
        for ours in (True, False):
            q, k, v = inputs(2, 70, 70)
            route = torch.tensor(route_values, dtype=torch.float64).view(2, 2).requires_grad_()
            if ours:
                plan = HeadPlan.build(route, SPARSE, batch_layout(2, 70, 0, CPU))
                out = routed_attention(q, k, v, route, plan, SCALE).output
            else:
                out = reference.routed_attention(q, k, v, route, SPARSE, SCALE).transpose(1, 2)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
            grads.append(torch.autograd.grad((out * weight).sum(), (q, k, v, route)))
        for ours_grad, expected in zip(*grads, strict=True):
            # the route's gradient is summed in fp32
            torch.testing.assert_close(ours_grad, expected, rtol=0, atol=1e-4 if expected.shape == (2, 2) else 1e-11)


def test_left_padding_equals_the_samples_alone():
    q, k, v = inputs(3, 60, 60)
    pads = [0, 13, 41]
    mask = torch.ones(3, 60, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    route = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    plan = HeadPlan.build(route, SPARSE, batch_layout(3, 60, 0, CPU, mask))
    out = routed_attention(q, k, v, route, plan, SCALE).output
    for row, pad in enumerate(pads):
        alone = reference.routed_attention(
            q[row : row + 1, :, pad:],
            k[row : row + 1, :, pad:],
            v[row : row + 1, :, pad:],
            route[row][None],
            SPARSE,
            SCALE,
        )
        torch.testing.assert_close(out[row : row + 1, pad:], alone.transpose(1, 2), rtol=0, atol=1e-12)


def test_packed_samples_never_see_each_other():
    bounds = torch.tensor([0, 1, 34, 90], dtype=torch.int32)
    q, k, v = inputs(1, 90, 90)
    route = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    plan = HeadPlan.build(route, SPARSE, packed_layout(bounds, None, 90, CPU))
    out = routed_attention(q, k, v, route, plan, SCALE).output
    expected = []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds.tolist())):
        part = (t[:, :, begin:end] for t in (q, k, v))
        expected.append(reference.routed_attention(*part, route[n : n + 1], SPARSE, SCALE).transpose(1, 2))
    torch.testing.assert_close(out, torch.cat(expected, 1), rtol=0, atol=1e-12)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    ours = torch.autograd.grad((out * weight).sum(), route, retain_graph=True)[0]
    oracle = torch.autograd.grad((torch.cat(expected, 1) * weight).sum(), route)[0]
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-4)


def test_window_longer_than_the_sample_is_full_attention():
    q, k, v = inputs(1, 50, 50, dtype=torch.float32)
    sparse = SparseConfig(sink=0, window=64, block=4)
    layout = batch_layout(1, 50, 0, CPU)
    outputs = [
        routed_attention(q, k, v, route, HeadPlan.build(route, sparse, layout), SCALE).output
        for route in (torch.zeros(1, 2), torch.ones(1, 2))
    ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-6)


def test_streaming_heads_visit_only_their_blocks(monkeypatch):
    """The cost of streaming heads grows with S * (sink + window): no attention call sees more keys than that."""
    from elastic.attention import torch_path

    seen = []
    stock = torch_path.F.scaled_dot_product_attention

    def spy(q, k, v, **kwargs):
        seen.append(k.shape[-2])
        return stock(q, k, v, **kwargs)

    monkeypatch.setattr(torch_path.F, "scaled_dot_product_attention", spy)
    q, k, v = inputs(1, 2000, 2000, dtype=torch.float32)
    torch_path.streaming(q, k, v, SPARSE, SCALE)
    assert max(seen) <= 4 + 16 + 64
    assert len(seen) == -(-2000 // 64)


@pytest.mark.parametrize(("granule", "position", "expected"), [("token", 20, 5), ("block", 20, 8), ("block", 23, 8)])
def test_lower_bound(granule, position, expected):
    assert lower_bound(position, 16, granule, 4) == expected


def test_oracle_rows_that_see_nothing_are_zero():
    q, k, v = inputs(1, 3, 3)
    out = reference.attention(q, k, v, torch.zeros(3, 3, dtype=torch.bool), SCALE)
    assert torch.equal(out, torch.zeros_like(out))


def test_gumbel_routes_are_hard_and_follow_the_logits():
    torch.manual_seed(0)
    logits = torch.tensor([0.0, 2.0]).expand(20000, 2)
    route = sample_route(logits, temperature=0.5)
    assert set(route.unique().tolist()) == {0.0, 1.0}
    # P(argmax of logits + Gumbel) is the softmax, whatever the temperature.
    assert route.mean().item() == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=0.01)


def test_gumbel_gradient_is_that_of_the_soft_route():
    logits = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.manual_seed(3)
    hard_grad = torch.autograd.grad(sample_route(logits, 0.7).sum(), logits)[0]
    torch.manual_seed(3)
    noise = -torch.empty_like(logits).exponential_().log()
    soft = torch.softmax((logits + noise) / 0.7, -1)[..., 1]
    torch.testing.assert_close(hard_grad, torch.autograd.grad(soft.sum(), logits)[0])


def test_decide_breaks_ties_towards_full_attention_and_obeys_the_bias():
    logits = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert decide(logits).tolist() == [0.0, 1.0, 0.0]
    assert decide(logits, sparsity_bias=1.5).tolist() == [1.0, 1.0, 1.0]
    assert decide(logits, sparsity_bias=-1.5).tolist() == [0.0, 0.0, 0.0]


def test_of_a_mask_on_the_host_nothing_is_read_back():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    layout = batch_layout(2, 4, 0, torch.device("meta"), mask)  # whose tensors cannot be read
    assert layout.begin_N.device.type == layout.user_end_N.device.type == "meta"
    assert layout.spans == [(0, 2, 4), (1, 0, 4)] and layout.lengths == [2, 4] and layout.padded
    check_user(layout, torch.tensor([[2, 3], [0, 4]]))
    with pytest.raises(ValueError, match=r"user span \[1, 3\) of sample 0 .* the tokens \[2, 4\)"):
        check_user(layout, torch.tensor([[1, 3], [0, 4]]))


class Copies(TorchDispatchMode):
    """Inside the context, whether each copy to another device is waited for."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.waited.append(not kwargs.get("non_blocking", False))
        return function(*args, **(kwargs or {}))


def test_only_what_goes_from_pinned_memory_to_a_gpu_is_not_waited_for():
    """Of a mask on a GPU for ids on the host, the host would read what is not there yet."""
    with Copies() as copies:
        sent(torch.ones(3), torch.device("meta"))
        sent(torch.ones(3, device="meta"), torch.device("meta"))
    assert copies.waited == [True]
