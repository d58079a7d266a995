"""The backward operators without a GPU: their oracles against autograd of the PyTorch path, argument checks, slots."""

import pytest
import torch

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import batch_layout, packed_layout
from elastic.attention.routed import fused, routed_attention
from elastic.config import SparseConfig
from elastic.kernels import attention_backward, attention_forward, route_gap
from elastic.kernels.params import Pattern, Ranges
from elastic.kernels.route_gap import draw_slots, period_of, slot_table

CPU = torch.device("cpu")
SPARSE = SparseConfig(sink=16, window=32, block=16)
PATTERN = Pattern(16, 32, "token", 16, 0.3)


def layouts():
    mask = torch.ones(2, 200, dtype=torch.int64)
    mask[0, :37] = 0
    return {
        "whole": batch_layout(2, 200, 0, CPU),
        "padded": batch_layout(2, 200, 0, CPU, mask),
        "packed": packed_layout(torch.tensor([0, 70, 71, 200]), None, 200, CPU),
    }


@pytest.mark.parametrize("kind", ["whole", "padded", "packed"])
def test_fused_gradients_equal_the_torch_path(kind: str) -> None:
    layout = layouts()[kind]
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(layout.rows, n, 200, 16, generator=gen).requires_grad_() for n in (4, 2, 2))
    samples = len(layout.spans)
    route = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])[:samples].requires_grad_()
    plan = HeadPlan.build(route, SPARSE, layout)
    grad = torch.randn(layout.rows, 200, 4, 16, generator=gen)
    want = torch.autograd.grad(routed_attention(q, k, v, route, plan, 0.3).output, (q, k, v, route), grad)
    found = torch.autograd.grad(fused(q, k, v, route, plan, 0.3), (q, k, v, route), grad)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("length", [1, 130, 1000])
def test_slots_cover_every_row_once(length: int) -> None:
    half = length // 2
    values = ([0, 0], [length, half], [0, 3], [length, 3 + half], [1, 0])
    ranges = Ranges(*(torch.tensor(x, dtype=torch.int32) for x in values))
    slots, owner = draw_slots(slot_table(ranges, 2, length, length + 3, 2, 1, CPU))
    seen = torch.zeros(2, length, dtype=torch.int64)
    for begin, end, begin_k, end_k, row, n in zip(*(x.tolist() for x in (*slots.named().values(), owner)), strict=True):
        seen[row, begin:end] += 1
        if end > begin:  # positions stay: the distance from the last query to the end of the sample's keys is the same
            assert ranges.row is not None and row == ranges.row[n] and begin_k == ranges.begin_k[n]
            assert ranges.end_k[n] - end_k == ranges.end_q[n] - end
    assert (seen[1] == 1).all() and (seen[0, :half] == 1).all() and (seen[0, half:] == 0).all()


def test_a_share_is_unbiased(monkeypatch) -> None:
    """The mean over all equally likely draws is the exact gap."""
    gen = torch.Generator().manual_seed(3)
    q, k, v, grad = (torch.randn(1, 1500, n, 16, generator=gen) for n in (4, 2, 2, 4))
    mode = torch.tensor([[1, 0]], dtype=torch.int32)
    out, _ = attention_forward(q, k, v, mode, PATTERN)
    exact = route_gap(grad, out, q, k, v, 1 - mode, PATTERN, share=1.0)
    draws = []
    for offset in range(4):
        monkeypatch.setattr(torch, "randint", lambda high, size, offset=offset, **_: torch.full(size, offset))
        draws.append(route_gap(grad, out, q, k, v, 1 - mode, PATTERN, share=0.25))
    assert not torch.allclose(draws[0], exact)
    torch.testing.assert_close(torch.stack(draws).mean(0), exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("share", [0.0, -1.0, 0.3, 2.0, float("nan")])
def test_bad_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"is not 1, 1/2, 1/3"):
        period_of(share)


def problem():
    gen = torch.Generator().manual_seed(1)
    q, k, v, grad = (torch.randn(1, 100, n, 16, generator=gen) for n in (4, 2, 2, 4))
    mode = torch.tensor([[1, 0]], dtype=torch.int32)
    out, lse = attention_forward(q, k, v, mode, PATTERN)
    return grad, q, k, v, out, lse, mode


def test_operator_contract() -> None:
    spans = (None,) * 6
    torch.library.opcheck(torch.ops.elastic.attention_backward, (*problem(), *PATTERN, *spans, False))


def test_wrong_arguments_are_named() -> None:
    grad, q, k, v, out, lse, mode = problem()
    for change, message in (
        ({"grad_out": grad[:, :50]}, r"grad_out is torch\.float32 \[1, 50, 4, 16\].*expected torch\.float32 \[1, 100"),
        ({"grad_out": grad.half()}, r"grad_out is torch\.float16"),
        ({"out": out[..., :8]}, r"out is torch\.float32 \[1, 100, 4, 8\]"),
        ({"out": out.transpose(1, 2).contiguous().transpose(1, 2)}, r"out has strides .*expected contiguous"),
        ({"lse": lse.double()}, r"lse is torch\.float64 .*pass what attention_forward returned"),
        ({"mode": mode.long()}, r"mode is torch\.int64"),
    ):
        given = {"grad_out": grad, "q": q, "k": k, "v": v, "out": out, "lse": lse, "mode": mode} | change
        with pytest.raises(ValueError, match=message):
            attention_backward(**given, pattern=PATTERN)
