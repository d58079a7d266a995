"""The decode kernel against the oracle on a GPU: random problems, repeats, graphs whose lengths change, long heads."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from elastic.kernels import attention_decode
from tests.kernels.generators import SENTINEL
from tests.kernels.gpu import needs_gpu
from tests.kernels.gpu_decode import DecodeProblem, configs, judge_decode, random_decode, run_decode
from tests.kernels.gpu_sinks import decode_with_sinks

pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.mark.parametrize("block", range(20))
@pytest.mark.parametrize("draw", [random_decode, decode_with_sinks])
def test_random_problems(draw: Callable[[int], DecodeProblem], block: int) -> None:
    for seed in range(25 * block, 25 * block + 25):
        problem = draw(seed)
        for config in configs(problem):
            try:
                judge_decode(run_decode(problem, config), problem)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {config}: {error}") from error


def long_operands(length: int = 70_001, heads: int = 8, dim: int = 128):
    gen = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(1, 4 * heads, dim, generator=gen, device="cuda").bfloat16()
    k, v = (torch.randn(1, heads, length, dim, generator=gen, device="cuda").bfloat16() for _ in range(2))
    base = torch.arange(heads, device="cuda")[None] * length
    spans = [torch.full((1, heads), n, dtype=torch.int32, device="cuda") for n in (0, 0, length)]
    return q, k, v, base, spans


def test_long_full_heads_equal_sdpa() -> None:
    q, k, v, base, spans = long_operands()
    out = attention_decode(q, k, v, base, *spans)
    want = scaled_dot_product_attention(q[:, :, None].float(), k.float(), v.float(), enable_gqa=True)[:, :, 0]
    assert (out.float() - want).abs().amax() <= 2 * 2**-8 * want.abs().amax()


def test_repeats_are_bit_equal() -> None:
    q, k, v, base, spans = long_operands(20_000)
    spans[1][:, :6], spans[0][:, :6] = 18_000, 128
    first = attention_decode(q, k, v, base, *spans)
    for _ in range(50):
        assert torch.equal(attention_decode(q, k, v, base, *spans), first)


def test_a_graph_follows_lengths_that_change() -> None:
    q, k, v, base, spans = long_operands(5_000)
    attention_decode(q, k, v, base, *spans)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention_decode(q, k, v, base, *spans)
    for end in (1, 777, 5_000, 0, 4_097):
        spans[2].fill_(end)
        out.fill_(SENTINEL)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, attention_decode(q, k, v, base, *spans))
        want = scaled_dot_product_attention(q[:, :, None], k[:, :, :end], v[:, :, :end], enable_gqa=True)[:, :, 0]
        assert (out.float() - (want if end else 0 * want).nan_to_num().float()).abs().amax() <= 2**-6


def test_two_streams_do_not_mix() -> None:
    q, k, v, base, spans = long_operands(30_000)
    want = attention_decode(q, k, v, base, *spans)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(attention_decode(q, k, v, base, *spans))
    torch.cuda.synchronize()
    assert all(torch.equal(out, want) for out in found)


def test_no_host_synchronisation() -> None:
    q, k, v, base, spans = long_operands(1_000)
    attention_decode(q, k, v, base, *spans)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_decode(q, k, v, base, *spans)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q.float(), k.float(), v.float()), "takes torch.bfloat16 or torch.float16"),
        (lambda q, k, v: (q[..., :32], k[..., :32].contiguous(), v[..., :32].contiguous()), "head dim 64 or 128"),
        (lambda q, k, v: (q.repeat(1, 5, 1), k, v), "at most 16 query heads per KV head"),
        (lambda q, k, v: (q.transpose(1, 2).contiguous().transpose(1, 2), k, v), r"use q.contiguous\(\)"),
    ],
)
def test_what_the_kernel_cannot_read_is_named(change, message: str) -> None:
    q, k, v, base, spans = long_operands(100)
    with pytest.raises(ValueError, match=message):
        attention_decode(*change(q, k, v), base, *spans)
