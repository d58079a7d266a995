"""The attention kernels on a GPU, against the oracle in fp64."""

import dataclasses

import pytest
import torch

from elastic.kernels import attention_forward
from elastic.kernels.block_bits import bits_from_mask
from elastic.kernels.params import Pattern, Ranges
from tests.kernels.generators import Problem, dense_problem, random_problem, tensor
from tests.kernels.gpu import judge, needs_gpu, paths, reference, run

pytestmark = [pytest.mark.gpu, needs_gpu]
CASES, CHUNK = 1600, 100


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_problems(first: int) -> None:
    for seed in range(first, first + CHUNK):
        problem = random_problem(seed)
        expected = reference(problem)
        for path in paths():
            try:
                judge(*run(problem, path), problem, expected)
            except AssertionError as error:
                raise AssertionError(f"seed {seed} on {path}: {error}") from error


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("length", [4097, 8192])
def test_long(path: str, length: int) -> None:
    problem = dense_problem(length, streaming=1, heads=4, kv_heads=2)
    judge(*run(problem, path), problem, reference(problem))


@pytest.mark.parametrize("path", paths())
@pytest.mark.parametrize("dim", [64, 128])
def test_same_blocks_give_the_same_bits(path: str, dim: int) -> None:
    """Streaming that covers everything, and a bitmask of ones, equal full attention bit for bit."""
    full = dense_problem(777, heads=4, kv_heads=2, dim=dim)
    ones = torch.ones_like(full.mode)
    covering = dataclasses.replace(full, mode=ones, pattern=Pattern(128, 1 << 20, "token", 128, dim**-0.5))
    sinks = dataclasses.replace(full, mode=ones, pattern=Pattern(777, 1, "token", 128, dim**-0.5))
    outs = [run(full, path), run(covering, path), run(sinks, path)]
    for block in (64, 128):
        bits = bits_from_mask(torch.ones(1, 4, 7, -(-777 // block), dtype=torch.bool, device="cuda"))
        pattern = Pattern(0, 1, "token", block, dim**-0.5)
        outs.append(run(dataclasses.replace(full, mode=2 * ones, pattern=pattern, bits=bits), path))
    for out, lse in outs[1:]:
        assert torch.equal(out, outs[0][0]) and torch.equal(lse, outs[0][1])


@pytest.mark.parametrize("path", paths())
def test_repeats_are_bit_identical(path: str) -> None:
    for seed in range(5000, 5010):
        problem = random_problem(seed)
        first = run(problem, path)
        for _ in range(20):
            again = run(problem, path)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1]), f"seed {seed}"


@pytest.mark.parametrize("path", paths())
def test_neighbours_do_not_leak(path: str) -> None:
    """A packed sample gives the same bits whatever its neighbours hold, NaN included."""
    gen = torch.Generator("cuda").manual_seed(1)
    q, k, v = (tensor(gen, (1, 500, heads, 128), "plain", torch.bfloat16) for heads in (4, 2, 2))
    cuts = torch.tensor([0, 130, 333, 500], dtype=torch.int32, device="cuda")
    begin, end = cuts[:-1].contiguous(), cuts[1:].contiguous()
    ranges = Ranges(begin, end, begin, end, torch.zeros(3, dtype=torch.int32, device="cuda"))
    mode = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int32, device="cuda")
    problem = Problem(q, k, v, mode, Pattern(64, 64, "token", 64, 0.1), ranges, None)
    clean = run(problem, path)
    for x in (q, k, v):
        x[:, :130] = float("nan")
        x[:, 333:] = float("inf")
    dirty = run(problem, path)
    assert torch.equal(clean[0][:, 130:333], dirty[0][:, 130:333])
    assert torch.equal(clean[1][:, :, 130:333], dirty[1][:, :, 130:333])


@pytest.mark.parametrize("path", paths())
def test_large_values(path: str) -> None:
    """Huge scores, constant rows, one huge key (every block rescales), fp16 close to its largest value."""
    base = dense_problem(600, streaming=1, heads=4, kv_heads=2, dtype=torch.float16)
    spiked = base.k.clone()
    spiked[:, ::97] *= 60.0
    for problem in (
        dataclasses.replace(base, q=base.q * 50, k=base.k * 50),
        dataclasses.replace(base, q=torch.ones_like(base.q), k=torch.ones_like(base.k)),
        dataclasses.replace(base, k=spiked),
        dataclasses.replace(base, v=(base.v.sign() * 60000)),
    ):
        out, lse = run(problem, path)
        exact, exact_lse, _ = reference(problem)
        assert not out.isnan().any()
        scale = exact.abs().amax()
        assert (out.double() - exact).abs().amax() <= 4e-3 * scale
        assert ((lse.double() - exact_lse).abs() <= 2e-4 + 1e-6 * exact_lse.abs()).all()


@pytest.mark.parametrize("path", paths())
def test_unknown_mode_answers_nan(path: str) -> None:
    problem = dense_problem(200, heads=4, kv_heads=2)
    problem.mode[0, 1] = 2
    out, lse = run(problem, path)
    assert not out[:, :, :2].isnan().any() and out[:, :, 2:].isnan().all() and lse[:, 2:].isnan().all()


def test_graph_replay_and_streams() -> None:
    problems = [dense_problem(1500, streaming=s, seed=s, heads=8, kv_heads=4) for s in range(3)]
    pattern = Pattern(128, 2048, "block")
    wanted = [attention_forward(p.q, p.k, p.v, p.mode, pattern)[0] for p in problems]
    static = problems[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = attention_forward(static.q, static.k, static.v, static.mode, pattern)
    for problem, want in zip(problems, wanted, strict=True):
        for name in ("q", "k", "v", "mode"):  # the modes are read at replay, not at capture
            getattr(static, name).copy_(getattr(problem, name).clone())
        for _ in range(3):
            captured.fill_(float("nan"))
            graph.replay()
            assert torch.equal(captured, want)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    outs = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 2]):
            problem = problems[1 + turn % 2]
            outs.append(attention_forward(problem.q, problem.k, problem.v, problem.mode, pattern)[0])
    torch.cuda.synchronize()
    for turn, out in enumerate(outs):
        assert torch.equal(out, wanted[1 + turn % 2])


def test_no_host_synchronisation_and_no_large_memory() -> None:
    problem = dense_problem(4096, streaming=6)
    call = (problem.q, problem.k, problem.v, problem.mode, Pattern(128, 2048, "block"))
    attention_forward(*call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = attention_forward(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    extra = torch.cuda.max_memory_allocated() - before - out.numel() * 2 - lse.numel() * 4
    assert extra <= 1 << 20


def test_operator_contract() -> None:
    problem = dense_problem(256, streaming=1, heads=4, kv_heads=2)
    operator = torch.ops.elastic.attention_forward
    spans = (None,) * 7
    torch.library.opcheck(
        operator, (problem.q, problem.k, problem.v, problem.mode, 128, 2048, "block", 128, 0.1, *spans)
    )


@pytest.mark.parametrize("first", range(9000, 10000, 100))
def test_random_delays_change_nothing(first: int) -> None:
    """Random sleeps before every wait and arrival of the pipeline; a watchdog turns a deadlock into a trap."""
    if "sm90" not in paths():
        pytest.skip("the pipeline exists on compute capability 9.0 only")
    for seed in range(first, first + 100):
        problem = random_problem(seed)
        plain, delayed = run(problem, "sm90"), run(problem, "sm90", ("ELASTIC_STRESS=1", "ELASTIC_WATCHDOG=1"))
        assert torch.equal(plain[0], delayed[0]) and torch.equal(plain[1], delayed[1]), f"seed {seed}"
