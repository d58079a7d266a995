"""Attention sinks around the kernels, with PyTorch in the kernels' place: equations, errors in half precision, and what
is refused. tests/attention/test_sinks.py has the same through a layer and a model.
"""

import pytest
import torch
from torch import Tensor

from elastic.attention.torch_path import attend_with_sinks
from elastic.kernels import Pattern, Ranges, attention_backward, attention_decode, attention_forward, sinks_gradient
from elastic.kernels.attention_sinks import check_sinks, share_with_sinks
from elastic.kernels.block_bits import bits_from_mask

INFINITE = float("inf")


def written_out(q, k, v, mask, scale, sinks):
    """exp(scores) / (sum of exp(scores) + exp(sink)), the sink a key without a value."""
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, -INFINITE)
    logits = torch.cat([scores, sinks.expand(scores.shape[:-1])[..., None]], -1)
    return logits.softmax(-1)[..., :-1] @ v


def outcome(function, tensors, grad, mask, scale, dtype):
    """Output and gradients of q, k, v and sinks by autograd in an element type."""
    inputs = [x.to(dtype).requires_grad_() for x in tensors]
    out = function(*inputs[:3], mask, scale, inputs[3])
    return [out.detach(), *torch.autograd.grad(out, inputs, grad.to(dtype))]


def as_kernels(tensors, grad, mask, scale, dtype):
    """The same in the steps of the CUDA kernels: fp32 sums, P and dS rounded before they are multiplied, O rounded and
    then scaled.
    """
    q, k, v, sinks = tensors
    scores = (q.float() @ k.float().transpose(2, 3) * scale).masked_fill(~mask, -INFINITE)
    peak = scores.amax(-1, keepdim=True)
    weights = (scores - peak).exp()
    total = weights.sum(-1, keepdim=True)
    plain = (weights.to(dtype).float() @ v.float() / total).to(dtype)
    out, lse = share_with_sinks(plain.transpose(1, 2), (peak + total.log())[..., 0], sinks[:, 0])
    rows = grad.transpose(1, 2)
    dsinks = sinks_gradient(rows, out, lse, sinks[:, 0])
    delta = (rows.float() * out.float()).sum(-1).transpose(1, 2)
    prob = (scores - lse[..., None]).exp()
    ds = (prob * (grad.float() @ v.float().transpose(2, 3) - delta[..., None])).to(dtype).float()
    dq, dk = ds @ k.float() * scale, ds.transpose(2, 3) @ q.float() * scale
    dv = prob.to(dtype).float().transpose(2, 3) @ grad.float()
    return [out.transpose(1, 2), *(x.to(dtype) for x in (dq, dk, dv)), dsinks[:, None]]


def random_problems(dtype, number=500, dim=16):
    """Tensors q, k, v, sinks and a gradient, flat and peaked, the sinks as large as the scores."""
    generator = torch.Generator().manual_seed(0)
    for index in range(number):
        shape, spread = (1, 2, 3 + 7 * index % 61, dim), 0.2 + index % 20 / 6
        q, k, v, grad = (torch.randn(shape, generator=generator) for _ in range(4))
        sinks = 2 * spread * torch.randn(2, 1, generator=generator)
        yield [x.to(dtype) for x in (spread * q, spread * k, v, sinks)], grad.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_with_sinks_are_as_exact_as_eager_attention(dtype):
    """Over 500 problems, in the mean and at worst, although the output is rounded twice."""
    ours, eager = [], []
    for tensors, grad in random_problems(dtype):
        tokens, dim = grad.shape[2:]
        given = tensors, grad, torch.ones(tokens, tokens).tril().bool(), dim**-0.5
        exact = outcome(written_out, *given, torch.float64)
        for rows, found in ((ours, as_kernels(*given, dtype)), (eager, outcome(attend_with_sinks, *given, dtype))):
            rows.append([float((x - y).norm() / y.norm()) for x, y in zip(found, exact, strict=True)])
    mine, theirs = torch.tensor(ours), torch.tensor(eager)
    assert float(theirs.mean(0).min()) > 0 and bool((mine.mean(0) <= 2 * theirs.mean(0)).all())
    assert bool((mine.max(0).values <= 2 * theirs.max(0).values).all())


PATTERN = Pattern(4, 8, "token", 64, 0.3)


def operands():
    """Two samples of 40 tokens, four query heads, one KV head full and one streaming, in fp64."""
    generator = torch.Generator().manual_seed(0)
    q, grad = (torch.randn(2, 40, 4, 16, generator=generator).double() for _ in range(2))
    k, v = (torch.randn(2, 40, 2, 16, generator=generator).double() for _ in range(2))
    return q, k, v, torch.tensor([[0, 1], [1, 0]], dtype=torch.int32), grad


def test_rows_that_see_nothing_and_rows_of_no_sample():
    """They stay 0 and -inf, whatever the sink; their gradient, NaN even, reaches nothing."""
    q, k, v, _, grad = operands()
    ends = torch.tensor([30, 40], dtype=torch.int32)
    begins = torch.zeros_like(ends)
    mask = torch.ones(2, 4, 1, 1, dtype=torch.bool)
    mask[1, 2] = False  # this head of the second sample sees nothing
    visible = (
        torch.full((2, 2), 2, dtype=torch.int32),
        PATTERN,
        Ranges(begins, ends, begins, ends, torch.arange(2, dtype=torch.int32)),
        bits_from_mask(mask),
    )
    for sinks in (torch.zeros(4), torch.tensor([-INFINITE, 1e4, -INFINITE, -1e4])):
        out, lse = attention_forward(q, k, v, *visible, sinks)
        assert bool(out.isfinite().all()) and not lse.isnan().any()
        for empty in ((0, slice(30, 40)), (1, slice(0, 40), 2)):
            assert not out[empty].any()
        assert (lse[0, :, 30:] == -INFINITE).all() and (lse[1, 2] == -INFINITE).all()
        grad[0, 30:] = float("nan")
        found = attention_backward(grad, q, k, v, out, lse, *visible)
        assert all(bool(x.isfinite().all()) for x in (*found, sinks_gradient(grad, out, lse, sinks)))


def test_a_sink_far_below_changes_nothing_and_one_far_above_takes_all():
    q, k, v, mode, _ = operands()
    plain = attention_forward(q, k, v, mode, PATTERN)
    below = attention_forward(q, k, v, mode, PATTERN, sinks=torch.full((4,), -1e4))
    assert all(torch.equal(x, y) for x, y in zip(below, plain, strict=True))
    above, lse = attention_forward(q, k, v, mode, PATTERN, sinks=torch.full((4,), 1e4))
    assert not above.any() and (lse == 1e4).all()


def test_sinks_of_any_floating_type():
    q, k, v, mode, grad = operands()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out, lse = attention_forward(q, k, v, mode, PATTERN, sinks=sinks)
    for dtype in (torch.bfloat16, torch.float64):
        again, _ = attention_forward(q, k, v, mode, PATTERN, sinks=sinks.to(dtype))
        assert torch.equal(again, out) and sinks_gradient(grad, out, lse, sinks.to(dtype)).dtype == dtype


def decode_operands() -> tuple[Tensor, ...]:
    """q, a dense cache [B, K, T, D] and its base, sink, begin, end: full, streaming, empty and one-token heads."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, 16, generator=generator).double() for shape in ((2, 6), (2, 2, 50), (2, 2, 50)))
    numbers = ([[0, 4], [0, 0]], [[0, 42], [0, 49]], [[50, 50], [0, 50]])
    return q, k, v, torch.arange(4).view(2, 2) * 50, *(torch.tensor(x, dtype=torch.int32) for x in numbers)


def test_decode_counts_the_sink_of_each_query_head():
    q, k, v, base, sink, begin, end = decode_operands()
    sinks = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0, -INFINITE])
    out = attention_decode(q, k, v, base, sink, begin, end, scale=0.3, sinks=sinks)
    token = torch.arange(50)
    for b in range(2):
        for head in range(6):
            one = b, head // 3
            mask = (token < end[one]) & ((token < sink[one]) | (token >= begin[one]))
            query, keys, values = q[b, None, head, None, None], k[one][None, None], v[one][None, None]
            alone = attend_with_sinks(query, keys, values, mask, 0.3, sinks[head].double())
            want = alone[0, 0, 0] if mask.any() else torch.zeros(16).double()
            torch.testing.assert_close(out[b, head], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("sinks", "given"),
    [
        (torch.zeros(2), r"torch.float32 \[2\]"),
        (torch.zeros(1, 4), r"torch.float32 \[1, 4\]"),
        (torch.zeros(4, dtype=torch.int32), r"torch.int32 \[4\]"),
    ],
)
def test_sinks_that_do_not_fit_are_named(sinks, given):
    expected = rf"sinks is {given}; expected floating-point \[4\], a logit for each query head"
    q, k, v, mode, _ = operands()
    with pytest.raises(ValueError, match=expected):
        attention_forward(q, k, v, mode, PATTERN, sinks=sinks)
    q, k, v, *spans = decode_operands()
    with pytest.raises(ValueError, match=expected):
        attention_decode(q[:, :4], k, v, *spans, sinks=sinks)


def test_sinks_elsewhere_are_named():
    with pytest.raises(ValueError, match="sinks lies on meta and q on cpu; expected one device"):
        check_sinks(torch.zeros(4, device="meta"), 4, torch.device("cpu"))
