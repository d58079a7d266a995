"""The paged kernels against the oracle on a GPU: random problems, kernels of contiguous tensors, repeats, graphs."""

import dataclasses

import pytest
import torch

from elastic.kernels import Pattern, attention_decode, attention_forward, paged_decode, paged_forward
from tests.kernels.generators import SENTINEL
from tests.kernels.gpu import needs_gpu, paths
from tests.kernels.gpu_paged import (
    PagedProblem,
    decode_configs,
    judge_decode,
    judge_forward,
    new_pools,
    random_paged,
    reference,
    run_paged,
    run_paged_decode,
)

pytestmark = [pytest.mark.gpu, needs_gpu]


@pytest.mark.parametrize("block", range(8))
def test_random_decoding(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        problem = random_paged(seed, decode=True)
        for config in decode_configs(problem):
            try:
                judge_decode(run_paged_decode(problem, config), problem)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {config}: {error}") from error


@pytest.mark.parametrize("block", range(16))
def test_random_forward_passes(block: int) -> None:
    for seed in range(20 * block, 20 * block + 20):
        problem = random_paged(seed, decode=False)
        expected = reference(problem)
        for path in paths():
            try:
                judge_forward(*run_paged(problem, path), expected)
            except AssertionError as error:
                raise AssertionError(f"seed {seed} on {path}: {error}") from error


def long_problem(length: int, queries: int, size: int = 16, streaming: int = 2, dim: int = 128) -> PagedProblem:
    """One request whose pages lie in any order, four KV heads with four query heads each."""
    gen = torch.Generator("cuda").manual_seed(length)
    count = -(-length // size)
    pools = new_pools(gen, (count + 7, size, 4, dim), "pair_first", torch.bfloat16)
    table = torch.randperm(count + 7, generator=gen, device="cuda")[None, :count].int()
    q = torch.randn(queries, 16, dim, generator=gen, device="cuda").bfloat16()
    starts, lengths = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, queries], [length]))
    mode = torch.tensor([[int(k < streaming) for k in range(4)]], dtype=torch.int32, device="cuda")
    pattern = Pattern(128, 2048, "block", 128, dim**-0.5)
    return PagedProblem(q, tuple(pools), tuple(pools), table, starts, lengths, mode, pattern)


def contiguous(problem: PagedProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [1, L, K, D] of the one request."""
    k, v = (pool[problem.table[0].long()].flatten(0, 1)[None, : int(problem.lengths[0])] for pool in problem.pools)
    return k.contiguous(), v.contiguous()


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize(("length", "queries"), [(6000, 6000), (6000, 1500), (4097, 1), (777, 77)])
def test_the_same_bits_as_the_kernel_of_contiguous_keys(length: int, queries: int, size: int) -> None:
    """Only the way to the keys differs, so nothing may differ in the answer."""
    problem = long_problem(length, queries, size)
    k, v = contiguous(problem)
    q = problem.q[None]
    want, want_lse = attention_forward(q, k, v, problem.mode, problem.pattern)
    out, lse = paged_forward(
        problem.q, *problem.pools, problem.table, problem.starts, problem.lengths, problem.mode, problem.pattern
    )
    assert torch.equal(out, want[0]) and torch.equal(lse, want_lse[0])


@pytest.mark.parametrize("size", [16, 64])
def test_decoding_has_the_bits_of_the_kernel_of_contiguous_keys(size: int) -> None:
    problem = long_problem(30_011, 1, size)
    k, v = contiguous(problem)
    length, pattern = 30_011, problem.pattern
    begin = ((length - 1) // 128 * 128 - (pattern.window - 128)) * problem.mode
    sink, end = pattern.sink * problem.mode, torch.full_like(problem.mode, length)
    base = torch.arange(4, device="cuda")[None]
    want = attention_decode(problem.q, k, v, base, sink.int(), begin.int(), end, token_stride=4, scale=pattern.scale)
    out = paged_decode(problem.q, *problem.pools, problem.table, problem.lengths, problem.mode, pattern)
    assert torch.equal(out, want)


def test_repeats_are_bit_equal() -> None:
    for seed in range(3000, 3005):
        problem = random_paged(seed, decode=True)
        config = decode_configs(problem)[0]
        first = run_paged_decode(problem, config)
        assert all(torch.equal(run_paged_decode(problem, config), first) for _ in range(20)), f"seed {seed}"
        problem = random_paged(seed, decode=False)
        for path in paths():
            out, lse = run_paged(problem, path)
            for _ in range(10):
                again = run_paged(problem, path)
                assert torch.equal(again[0], out) and torch.equal(again[1], lse), f"seed {seed} on {path}"


def test_a_graph_follows_tables_lengths_and_modes_that_change() -> None:
    """Captured once with static tensors, as an engine does; the batch's last places are padding of length 0."""
    gen = torch.Generator("cuda").manual_seed(0)
    pools = new_pools(gen, (600, 16, 8, 128), "together", torch.bfloat16)
    q = torch.randn(6, 32, 128, generator=gen, device="cuda").bfloat16()
    table = torch.zeros(6, 90, dtype=torch.int32, device="cuda")
    lengths, mode = table.new_zeros(6), table.new_zeros(6, 8)
    pattern = Pattern(64, 256, "token", 128)
    call = (q, *pools, table, lengths, mode, pattern)
    paged_decode(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode(*call)
    for step in range(5):
        order = torch.randperm(600, generator=gen, device="cuda").int()
        table.copy_(order[: 6 * 90].view(6, 90))
        lengths.copy_(torch.tensor([1, 1440 - step, 77 * step, 1000, 0, 0]))
        mode.copy_(torch.randint(0, 2, (6, 8), generator=gen, device="cuda"))
        out.fill_(SENTINEL)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, paged_decode(*call))
        starts = torch.arange(7, dtype=torch.int32, device="cuda")
        judge_decode(out, PagedProblem(q, tuple(pools), tuple(pools), table, starts, lengths, mode, pattern))


def test_a_graph_of_the_forward_pass() -> None:
    problem = long_problem(3000, 500)
    call = (problem.q, *problem.pools, problem.table, problem.starts, problem.lengths, problem.mode, problem.pattern)
    paged_forward(*call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = paged_forward(*call)
    for length in (500, 1777, 3000):
        problem.lengths.fill_(length)
        problem.mode.copy_(1 - problem.mode)
        out.fill_(SENTINEL)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, paged_forward(*call)[0])


def test_page_numbers_of_no_page_read_as_zeros_on_the_newest_gpus() -> None:
    """The tensor map clips them: a wrong table gives a wrong answer, never another process's fault."""
    if "sm90" not in paths():
        pytest.skip("the sm_80 kernel reads by address")
    problem = long_problem(300, 300)
    problem.table[:, 3] = -5
    zeroed = dataclasses.replace(problem, table=problem.table.clone())
    zeroed.table[:, 3] = 0
    for pool in problem.pools:
        pool[0] = 0
    found, want = (
        paged_forward(p.q, *p.pools, p.table, p.starts, p.lengths, p.mode, p.pattern)[0] for p in (problem, zeroed)
    )
    assert torch.equal(found, want)


def test_no_host_synchronisation() -> None:
    decode, forward = random_paged(1, decode=True), random_paged(1, decode=False)
    calls = [
        lambda: paged_decode(decode.q, *decode.pools, decode.table, decode.lengths, decode.mode, decode.pattern),
        lambda: paged_forward(
            *(forward.q, *forward.pools, forward.table, forward.starts, forward.lengths, forward.mode, forward.pattern)
        ),
    ]
    for call in calls:
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_an_unknown_mode_answers_nan() -> None:
    problem = long_problem(500, 3)
    problem.mode[0, 1] = 2
    out, lse = paged_forward(
        problem.q, *problem.pools, problem.table, problem.starts, problem.lengths, problem.mode, problem.pattern
    )
    assert out[:, 4:8].isnan().all() and lse[4:8].isnan().all()
    assert not out[:, :4].isnan().any() and not out[:, 8:].isnan().any()
    q = problem.q[:1]
    out = paged_decode(q, *problem.pools, problem.table, problem.lengths, problem.mode, problem.pattern)
    assert out[:, 4:8].isnan().all() and not out[:, :4].isnan().any() and not out[:, 8:].isnan().any()


@pytest.mark.parametrize("first", range(9000, 9100, 25))
def test_random_delays_change_nothing(first: int) -> None:
    """Random sleeps before every wait and arrival of the pipeline; a watchdog turns a deadlock into a trap."""
    if "sm90" not in paths():
        pytest.skip("the pipeline exists on compute capability 9.0 only")
    for seed in range(first, first + 25):
        problem = random_paged(seed, decode=False, longest=700)
        plain, delayed = (
            run_paged(problem, "sm90", debug) for debug in ((), ("ELASTIC_STRESS=1", "ELASTIC_WATCHDOG=1"))
        )
        assert torch.equal(plain[0], delayed[0]) and torch.equal(plain[1], delayed[1]), f"seed {seed}"
