"""The selection kernel on a GPU, against the oracle."""

import dataclasses

import pytest
import torch

from elastic.kernels import select_blocks
from elastic.kernels.block_bits import mask_from_bits
from elastic.kernels.params import Pattern, Ranges
from elastic.kernels.xattention_oracle import UNITS
from tests.kernels.generators import tensor
from tests.kernels.gpu import HAS_GPU
from tests.kernels.gpu_selection import Selection, judge_selection, random_selection, run_selection

HAS_KERNEL = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_KERNEL, reason="the selection kernel needs a GPU of compute capability 9.0"),
]
CASES, CHUNK = 400, 50


def whole(length: int, heads: int, kv_heads: int, threshold: float, seed: int = 0, past: int = 0) -> Selection:
    """One sequence of N(0, 1) values, every head block-sparse."""
    gen = torch.Generator("cuda").manual_seed(seed)
    q = tensor(gen, (1, length, heads, 128), "plain", torch.bfloat16)
    k = tensor(gen, (1, length + past, kv_heads, 128), "plain", torch.bfloat16)
    mode = torch.full((1, kv_heads), 2, dtype=torch.int32, device="cuda")
    return Selection(q, k, mode, 16, threshold, Pattern.without_streaming(128))


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_problems(first: int) -> None:
    far, rows = 0, 0
    for seed in range(first, first + CHUNK):
        problem = random_selection(seed)
        try:
            found = judge_selection(*run_selection(problem), problem)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        far, rows = far + found[0], rows + found[1]
    assert far <= rows / 1000, f"{far} of {rows} counts are off by more than one block"


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 0.95, 1.0])
def test_ten_thousand_rows_hold_the_fewest_blocks(threshold: float) -> None:
    """The chosen mass reaches the threshold, and without its lightest unforced block it does not: any smaller choice
    fails, because nothing left out is heavier. Checked on the masses alone, without the oracle's own choice."""
    problem = whole(16384, 80, 8, threshold)  # scores of a deviation of 2.8: masses from 0 to 8
    problem = dataclasses.replace(problem, q=problem.q * 4)
    bits, mass = run_selection(problem)
    blocks = torch.arange(128, device="cuda")
    seen, forced = blocks <= blocks[:, None], (blocks == blocks[:, None]) | (blocks == 0)
    units = (mass[0].double() * UNITS).floor().masked_fill(~seen, 0.0)
    chosen = mask_from_bits(bits)[0]
    assert not (chosen & ~seen).any() and (chosen | ~forced).all()
    need = torch.ceil(threshold * units.sum(-1))
    held = (units * chosen).sum(-1)
    assert (held >= need).all() and held.numel() == 80 * 128
    free = chosen & ~forced
    lightest = units.masked_fill(~free, float("inf")).amin(-1)
    assert ((held - lightest < need) | ~free.any(-1)).all()
    heaviest_left = units.masked_fill(chosen | ~seen, -1.0).amax(-1)
    assert ((heaviest_left <= lightest) | ~free.any(-1)).all()


def test_equal_blocks_are_taken_in_order() -> None:
    problem = whole(4096, 4, 2, 0.6)
    constant = dataclasses.replace(problem, q=torch.zeros_like(problem.q))
    bits, mass = run_selection(constant)
    assert judge_selection(bits, mass, constant)[0] == 0
    last = mask_from_bits(bits)[0, 0, 31]
    # A whole block holds 0.2535 of 8 rows, the last one 0.1426: (0.6 * 8 - 0.396) / 0.2535 = 17.4 blocks are missing.
    assert last[:19].all() and last[31] and last.sum() == 20


@pytest.mark.parametrize(("length", "past"), [(9000, 0), (2048, 40000), (100, 70000)])
def test_long(length: int, past: int) -> None:
    problem = whole(length, 2, 1, 0.9, past=past)
    assert judge_selection(*run_selection(problem), problem)[0] == 0


def test_masses_beyond_shared_memory() -> None:
    """More key blocks than a warp has room for in shared memory."""
    problem = dataclasses.replace(whole(256, 2, 1, 0.9, past=100_000), pattern=Pattern.without_streaming(64))
    assert judge_selection(*run_selection(problem), problem)[0] == 0


def test_repeats_are_bit_identical() -> None:
    for seed in range(5000, 5010):
        problem = random_selection(seed)
        bits, mass = run_selection(problem)
        for _ in range(20):
            again, again_mass = run_selection(problem)
            assert torch.equal(bits, again) and torch.equal(mass.nan_to_num(-1.0), again_mass.nan_to_num(-1.0))


@pytest.mark.parametrize("stride", [8, 16])
def test_neighbours_do_not_leak(stride: int) -> None:
    """A packed sample gives the same bits whatever its neighbours hold, and those of a tensor of its own."""
    gen = torch.Generator("cuda").manual_seed(1)
    q, k = (tensor(gen, (1, 5000, heads, 128), "plain", torch.bfloat16) for heads in (4, 2))
    cuts = torch.tensor([0, 1301, 4333, 5000], dtype=torch.int32, device="cuda")
    begin, end = cuts[:-1].contiguous(), cuts[1:].contiguous()
    ranges = Ranges(begin, end, begin, end, torch.zeros(3, dtype=torch.int32, device="cuda"))
    mode = torch.full((3, 2), 2, dtype=torch.int32, device="cuda")
    pattern = Pattern.without_streaming(128, 0.1)
    problem = Selection(q, k, mode, stride, 0.9, pattern, ranges)
    clean, _ = run_selection(problem)
    alone = Selection(q[:, 1301:4333], k[:, 1301:4333], mode[:1].clone(), stride, 0.9, pattern)
    for x in (q, k):
        x[:, :1301] = float("nan")
        x[:, 4333:] = float("inf")
    dirty, _ = run_selection(problem)
    assert torch.equal(clean[1], dirty[1])
    assert torch.equal(dirty[1:2, :, :24, :1], run_selection(alone)[0])


def test_nan_queries_keep_the_forced_blocks() -> None:
    problem = whole(4096, 4, 2, 0.9)
    clean, _ = run_selection(problem)
    problem.q[0, 1000, 1] = float("nan")
    bits, _ = run_selection(problem)
    chosen = mask_from_bits(bits)[0]
    assert chosen[1, 7].nonzero().flatten().tolist() == [0, 7]
    same = torch.ones_like(chosen[..., 0])
    same[1, 7] = False
    assert torch.equal(chosen[same], mask_from_bits(clean)[0][same])


def test_graph_replay_and_streams() -> None:
    problems = [whole(3000, 8, 4, 0.9, seed) for seed in range(3)]
    problems[1].mode[0, 1], problems[2].mode[0, 2] = 0, 1
    wanted = [problem.public() for problem in problems]
    static = dataclasses.replace(problems[0], mode=problems[0].mode.clone())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = static.public()
    for problem, want in zip(problems, wanted, strict=True):
        for name in ("q", "k", "mode"):  # the modes are read at replay, not at capture
            getattr(static, name).copy_(getattr(problem, name).clone())
        for _ in range(3):
            captured.fill_(-1)
            graph.replay()
            assert torch.equal(captured, want)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for turn in range(20):
        with torch.cuda.stream(streams[turn % 2]):
            found.append(problems[1 + turn % 2].public())
    torch.cuda.synchronize()
    assert all(torch.equal(bits, wanted[1 + turn % 2]) for turn, bits in enumerate(found))


def test_no_host_synchronisation() -> None:
    problem = whole(4096, 8, 4, 0.9)
    problem.public()
    torch.cuda.set_sync_debug_mode("error")
    try:
        problem.public()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_operator_contract() -> None:
    problem = whole(256, 4, 2, 0.9)
    operator = torch.ops.elastic.xattention_select
    torch.library.opcheck(operator, (problem.q, problem.k, problem.mode, 16, 0.9, 128, 0.1, *[None] * 5))


def test_sizes_without_a_kernel_are_named() -> None:
    problem = whole(256, 4, 2, 0.9)
    with pytest.raises(ValueError, match=r"stride=32, block=128; the CUDA kernel takes strides \(8, 16\)"):
        select_blocks(*problem.args(), stride=32, threshold=0.9)


@pytest.mark.parametrize("first", range(9000, 9200, 50))
def test_random_delays_change_nothing(first: int) -> None:
    """Random sleeps before every wait and arrival of the pipeline; a watchdog turns a deadlock into a trap."""
    for seed in range(first, first + 50):
        problem = random_selection(seed)
        plain, delayed = run_selection(problem), run_selection(problem, ("ELASTIC_STRESS=1", "ELASTIC_WATCHDOG=1"))
        assert torch.equal(plain[0], delayed[0]), f"seed {seed}"
