"""The backward kernels and the route's gap on a GPU, against the oracle in fp64."""

import dataclasses

import pytest
import torch

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import batch_layout
from elastic.attention.routed import fused, routed_attention
from elastic.config import SparseConfig
from elastic.kernels import attention_backward, attention_forward, route_gap
from elastic.kernels.block_bits import bits_from_mask
from elastic.kernels.oracle import attention_oracle
from elastic.kernels.params import Pattern
from tests.kernels.generators import dense_problem, random_problem
from tests.kernels.gpu import needs_gpu, paths
from tests.kernels.gpu_backward import forward_exact, judge_gradients, reference_gradients, run_backward, upstream

pytestmark = [
    pytest.mark.gpu,
    needs_gpu,
    pytest.mark.skipif("sm90" not in paths(), reason="the backward kernels need compute capability 9.0"),
]
CASES, CHUNK = 1600, 100
PATTERN = Pattern(128, 2048, "block", 128)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_problems(first: int) -> None:
    for seed in range(first, first + CHUNK):
        problem = random_problem(seed)
        grad = upstream(problem, seed)
        expected = reference_gradients(problem, grad)
        try:
            found = run_backward(problem, grad, *forward_exact(problem), deterministic=seed % 2 == 1)
            judge_gradients(found, problem, expected)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("length", [4097, 6000])
def test_long(length: int, dim: int) -> None:
    problem = dense_problem(length, streaming=1, heads=4, kv_heads=2, dim=dim)
    grad = upstream(problem, 0)
    out, lse = attention_forward(problem.q, problem.k, problem.v, problem.mode, PATTERN)
    judge_gradients(run_backward(problem, grad, out, lse), problem, reference_gradients(problem, grad))


@pytest.mark.parametrize("dim", [64, 128])
def test_deterministic_repeats_are_bit_identical(dim: int) -> None:
    for streaming in (0, 1, 2):
        problem = dense_problem(3000, streaming=streaming, heads=8, kv_heads=2, dim=dim)
        problem = dataclasses.replace(problem, pattern=Pattern(128, 256, "block", 128, dim**-0.5))
        grad, forward = upstream(problem, 0), forward_exact(problem)
        first = run_backward(problem, grad, *forward, deterministic=True)
        for _ in range(20):
            again = run_backward(problem, grad, *forward, deterministic=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        loose = run_backward(problem, grad, *forward)
        assert torch.equal(loose[1], first[1]) and torch.equal(loose[2], first[2])  # only dq may differ


def test_bits_of_ones_equal_full_attention() -> None:
    full = dense_problem(777, heads=4, kv_heads=2)
    grad, forward = upstream(full, 0), forward_exact(full)
    want = run_backward(full, grad, *forward, deterministic=True)
    for block in (64, 128):
        bits = bits_from_mask(torch.ones(1, 4, 7, -(-777 // block), dtype=torch.bool, device="cuda"))
        pattern = Pattern(0, 1, "token", block, full.pattern.scale)
        problem = dataclasses.replace(full, mode=torch.full_like(full.mode, 2), pattern=pattern, bits=bits)
        got = run_backward(problem, grad, *forward, deterministic=True)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_graph_replay_and_streams() -> None:
    problems = [dense_problem(1500, streaming=s, seed=s, heads=8, kv_heads=4) for s in (1, 2)]
    calls = []
    for problem in problems:
        out, lse = attention_forward(problem.q, problem.k, problem.v, problem.mode, PATTERN)
        calls.append((upstream(problem, 0), problem.q, problem.k, problem.v, out, lse, problem.mode))
    wanted = [attention_backward(*call, PATTERN, deterministic=True) for call in calls]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_backward(*calls[0], PATTERN, deterministic=True)
    for _ in range(3):
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, wanted[0], strict=True))
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    torch.cuda.synchronize()
    for turn in range(10):
        with torch.cuda.stream(streams[turn % 2]):
            found.append(attention_backward(*calls[turn % 2], PATTERN, deterministic=True))
    torch.cuda.synchronize()
    for turn, grads in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(grads, wanted[turn % 2], strict=True))


def test_strided_gradient_and_no_host_synchronisation() -> None:
    problem = dense_problem(1000, streaming=1, heads=4, kv_heads=2)
    out, lse = attention_forward(problem.q, problem.k, problem.v, problem.mode, PATTERN)
    grad = upstream(problem, 0)
    strided = grad.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)  # head dim not contiguous
    call = (problem.q, problem.k, problem.v, out, lse, problem.mode)
    want = attention_backward(grad, *call, PATTERN, deterministic=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attention_backward(strided, *call, PATTERN, deterministic=True)
        route_gap(grad, out, *call[:3], 1 - problem.mode, PATTERN, share=0.25)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("seed", range(0, 60))
def test_route_gap_is_that_of_two_forwards(seed: int) -> None:
    problem = random_problem(seed)
    if problem.bits is not None:
        pytest.skip("the other mode of a block-sparse head has no bits yet")
    q, k, v, mode, pattern, ranges, _ = problem.args()
    grad = upstream(problem, seed)
    out, _ = forward_exact(problem)
    got = route_gap(grad, out, q, k, v, 1 - mode, pattern, ranges)
    outs = [attention_oracle(*(x.double() for x in (q, k, v)), m, pattern, ranges, None)[0] for m in (mode, 1 - mode)]
    dots = torch.nan_to_num(grad.double()) * (outs[0] - outs[1])
    dots_BSK = dots.sum(-1).unflatten(2, (mode.shape[1], -1)).sum(-1)
    rows, spans = range(len(mode)), [(0, q.shape[1])] * len(mode)
    if ranges.row is not None:
        rows, spans = ranges.row.tolist(), list(zip(ranges.begin_q.tolist(), ranges.end_q.tolist(), strict=True))
    want = torch.stack([dots_BSK[r, b:e].sum(0) for r, (b, e) in zip(rows, spans, strict=True)])
    # Each output row carries one rounding of its elements; their dot products with dO add up like noise.
    size = (grad.nan_to_num().float().square().sum() * outs[0].float().square().mean()).sqrt()
    assert (got - want).abs().max() <= 4 * torch.finfo(q.dtype).eps * size + 1e-3


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_the_model_trains_through_the_kernels(share: float) -> None:
    """Gradients of q, k, v and the route against the PyTorch path in fp32."""
    device = torch.device("cuda", 0)
    layout = batch_layout(2, 5000, 0, device)
    gen = torch.Generator(device).manual_seed(0)
    leaves = [torch.randn(2, n, 5000, 64, generator=gen, device=device).bfloat16().requires_grad_() for n in (6, 2, 2)]
    route = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device, requires_grad=True)
    plan = HeadPlan.build(route, SparseConfig(sink=64, window=256, block=64), layout, share)
    grad = torch.randn(2, 5000, 6, 64, generator=gen, device=device).bfloat16()
    out = routed_attention(*leaves, route, plan, 0.125).output
    assert torch.equal(out, fused(*leaves, route, plan, 0.125))
    found = torch.autograd.grad(out, (*leaves, route), grad)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    want = torch.autograd.grad(routed_attention(*wide, route, plan, 0.125).output, (*wide, route), grad.float())
    for got, expected in zip(found[:3], want[:3], strict=True):
        assert (got - expected).norm() <= 1e-2 * expected.norm()
    if share == 1.0:
        torch.testing.assert_close(found[3], want[3], rtol=2e-2, atol=2.0)
    else:
        assert torch.isfinite(found[3]).all() and not torch.equal(found[3], want[3])


@pytest.mark.parametrize("first", range(9000, 9500, 100))
def test_random_delays_change_nothing(first: int) -> None:
    """Random sleeps before every wait and arrival of the pipeline; a watchdog turns a deadlock into a trap."""
    for seed in range(first, first + 100):
        problem = random_problem(seed)
        grad, forward = upstream(problem, seed), forward_exact(problem)
        plain = run_backward(problem, grad, *forward, deterministic=True)
        debug = ("ELASTIC_STRESS=1", "ELASTIC_WATCHDOG=1")
        delayed = run_backward(problem, grad, *forward, deterministic=True, debug=debug)
        for a, b in zip(plain, delayed, strict=True):
            assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)), f"seed {seed}"
