"""Reach on the CPU: the chunked twin against a softmax written out query by query, what it must not read, what it
refuses, and the kernels' own arithmetic of which keys count (compiled for the host).
"""

import ctypes
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from elastic.kernels import Pattern, Ranges, reach, reach_oracle, unsupported_reach
from elastic.kernels.devices import reach_config
from elastic.kernels.params import WHOLE_ROWS
from elastic.visibility import visible
from tests.kernels.generators import random_problem
from tests.kernels.host import build

PATTERN = Pattern(4, 16)
SEEN, HIDDEN, MIXED = range(3)  # kinds of a key tile


def written_out(q: Tensor, k: Tensor, pattern: Pattern, ranges: Ranges = WHOLE_ROWS) -> tuple[Tensor, Tensor]:
    """Largest and recent in fp64, one query of one head at a time."""
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    samples = q.shape[0] if ranges.row is None else len(ranges.row)
    largest, recent = torch.zeros(2, samples, kv_heads, dtype=torch.float64)
    for n, (row, begin_q, end_q, begin_k, end_k) in enumerate(ranges.on_host(samples, q.shape[1], k.shape[1])):
        for head in range(kv_heads * group):
            outside = []
            for token in range(max(begin_q, end_q - 32), end_q):
                position = end_k - begin_k - (end_q - token)
                keys = k[row, begin_k : begin_k + position + 1, head // group].double()
                weights = torch.softmax(keys @ q[row, token, head].double() * pattern.scale_for(q.shape[3]), 0)
                sizes = {name: getattr(pattern, name) for name in ("sink", "window", "granule", "block")}
                shown = visible(position, torch.arange(position + 1), **sizes)
                outside.append(weights[~shown].sum())
            if outside:
                largest[n, head // group] += torch.stack(outside).amax() / group
                recent[n, head // group] += torch.stack(outside[-8:]).mean() / group
    return largest, recent


def operands(tokens: int, queries: int | None = None, heads: int = 6, kv_heads: int = 2, rows: int = 1):
    gen = torch.Generator().manual_seed(tokens)
    q = torch.randn(rows, queries or tokens, heads, 16, generator=gen)
    return q, torch.randn(rows, tokens, kv_heads, 16, generator=gen)


def agrees(found, wanted) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [2, 4, 6, 16])
@pytest.mark.parametrize(("tokens", "queries"), [(100, 100), (77, 77), (101, 33), (90, 5), (61, 1), (21, 21), (33, 32)])
def test_whole_rows_and_continued_turns(tokens: int, queries: int, heads: int) -> None:
    q, k = operands(tokens, queries, heads, rows=2)
    found = reach(q, k, PATTERN)
    agrees(found, written_out(q, k, PATTERN))
    assert (found.largest > 0).all() and (found.largest <= 1).all()


@pytest.mark.parametrize("granule", ["token", "block"])
def test_what_sink_and_window_hold_has_no_reach(granule: str) -> None:
    """Exactly 0 up to sink + window tokens, and more than 0 from the next one on that is hidden."""
    pattern = Pattern(16, 32, granule, 16)
    for tokens in (1, 2, 31, 47, 48):
        found = reach(*operands(tokens), pattern)
        assert not found.largest.any() and not found.recent.any()
    assert (reach(*operands(49), pattern).largest > 0).all()
    assert (reach(*operands(49), pattern).recent > 0).all()


def test_random_problems(monkeypatch) -> None:
    """Any packing, padding, granule, scale and layout; tokens of no sample hold NaN and infinity."""
    monkeypatch.setattr("elastic.kernels.reach_oracle._CHUNK", 96)
    for seed in range(60):
        problem = random_problem(seed, "cpu")
        q, k, ranges, pattern = problem.q[..., :16], problem.k[..., :16], problem.ranges, problem.pattern
        agrees(reach(q, k, pattern, ranges), written_out(q, k, pattern, ranges))


def test_the_end_of_a_sample_may_be_left_out() -> None:
    """A prompt within a row: what follows it is not read; queries before `begin_q` do not count."""
    q, k = operands(120)
    q[:, 90:], k[:, 90:], q[:, :70] = torch.nan, torch.nan, torch.nan
    cuts = [torch.tensor([x], dtype=torch.int32) for x in (70, 90, 10, 90, 0)]
    found = reach(q, k, PATTERN, Ranges(*cuts))
    agrees(found, written_out(q, k, PATTERN, Ranges(*cuts)))
    assert (found.largest > 0).all()


def test_a_sample_without_queries_or_keys_has_no_reach() -> None:
    q, k = operands(100)
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([0, 9, 50], [0, 5, 60], [0, 0, 70], [100, 90, 70], [0, 0, 0])]
    found = reach(q, k, PATTERN, Ranges(*ints))
    assert found.largest.tolist() == found.recent.tolist() == [[0.0, 0.0]] * 3


def test_chunks_change_nothing(monkeypatch) -> None:
    q, k = operands(500)
    want = reach(q, k, PATTERN)
    for chunk in (1, 7, 499, 500):
        monkeypatch.setattr("elastic.kernels.reach_oracle._CHUNK", chunk)
        torch.testing.assert_close(tuple(reach(q, k, PATTERN)), tuple(want), rtol=1e-5, atol=1e-6)


def test_a_needle_far_back_is_reached_and_a_near_one_is_not() -> None:
    q, k = torch.zeros(1, 200, 2, 16), torch.zeros(1, 200, 2, 16)
    q[0, 180, :, 0], k[0, 60, 0, 0], k[0, 175, 1, 0] = 8.0, 8.0, 8.0  # KV head 0 looks at 60, head 1 at 175
    found = reach(q, k, PATTERN)
    assert found.largest[0, 0] > 0.99
    # The other queries look at all keys alike: at most 180 of the 200 that the last one has are hidden from it.
    torch.testing.assert_close(found.largest[0, 1], torch.tensor(180 / 200))
    torch.testing.assert_close(
        found.recent[0], torch.tensor([(a - 19) / (a + 1) for a in range(192, 200)]).mean().expand(2)
    )


def test_it_is_a_constant_for_autograd() -> None:
    q, k = operands(60)
    found = reach(q.requires_grad_(), k.requires_grad_(), PATTERN)
    assert not found.largest.requires_grad and not found.recent.requires_grad


def test_wide_types_stay_wide() -> None:
    q, k = operands(200)
    found, _ = reach_oracle.reach_oracle(q.double(), k.double(), PATTERN, WHOLE_ROWS)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, written_out(q, k, PATTERN)[0], rtol=1e-12, atol=1e-12)


def test_operator_contract() -> None:
    q, k = operands(50)
    row = torch.zeros(3, dtype=torch.int32)
    cuts = [torch.tensor(x, dtype=torch.int32) for x in ([0, 10, 20], [10, 20, 50])]
    for ranges in ((None,) * 5, (*cuts, *cuts, row)):
        torch.library.opcheck(torch.ops.elastic.reach, (q, k, 4, 16, "token", 128, 0.25, *ranges))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 50, 6, 8)}, "do not belong together"),
        ({"q": torch.zeros(1, 50, 5, 16)}, "5 query heads are not a multiple of 2 KV heads"),
        ({"q": torch.zeros(1, 50, 6, 16).double()}, "expected one dtype"),
        ({"q": torch.zeros(1, 51, 6, 16)}, "51 queries and 50 keys"),
        ({"pattern": Pattern(4, 0)}, "window=0"),
        ({"pattern": Pattern(3, 64, "block", 64)}, "not multiples of block=64"),
        ({"ranges": Ranges(row=torch.zeros(2))}, r"row is torch.float32 \[2\]"),
        ({"ranges": Ranges(end_k=torch.zeros(2, dtype=torch.int32))}, r"end_k is torch.int32 \[2\].*\[1\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    q, k = operands(50)
    with pytest.raises(ValueError, match=message):
        reach(**{"q": q, "k": k, "pattern": PATTERN, **change})


def test_why_the_kernel_cannot_run_is_told() -> None:
    assert unsupported_reach(torch.device("cpu"), torch.bfloat16, 128, 4) == "no CUDA device"
    with pytest.raises(ValueError, match="9 query heads per KV head; the reach kernels take at most 8, use elastic"):
        reach_config((9, 0), 132, 232_448, 128, 9, 8, 64)
    with pytest.raises(ValueError, match=r"compute capability 7\.5; the kernels need 8\.0"):
        reach_config((7, 5), 40, 65_536, 128, 4, 8, 64)


@pytest.mark.parametrize(("capability", "limit"), [((8, 0), 166_912), ((8, 6), 101_376), ((9, 0), 232_448)])
def test_launches_fit_the_gpu(capability: tuple[int, int], limit: int) -> None:
    for dim in (64, 128):
        for group in range(1, 9):
            config = reach_config(capability, 100, limit, dim, group, 4096, 10**6)
            stages = int(config.macros[1].removeprefix("ELASTIC_STAGES="))
            assert stages >= 2 and config.shared_bytes <= limit and config.grid == 100
            assert config.threads == 384 or (config.threads % (32 * group) == 0 and 128 <= config.threads <= 256)
    assert reach_config((9, 0), 132, 232_448, 128, 4, 8, 5).grid == 5


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return build("reach_host.cpp", tmp_path_factory.mktemp("host"))


def test_the_kernels_count_the_keys_that_the_rule_names(host) -> None:
    rng, kinds = random.Random(0), set()
    for _ in range(600):
        by_block, block = rng.random() < 0.5, rng.choice((16, 64, 128))
        sink = block * rng.randrange(3) if by_block else rng.choice((0, 1, 64, 100, 128))
        window = block * rng.randrange(1, 5) if by_block else rng.choice((1, 63, 64, 65, 200, 2048))
        len_k = rng.choice((1, 5, 31, 32, 33, 64, 200, 700, 3000))
        len_q = rng.choice((0, 1, 7, 31, 32, 33, len_k))
        size = rng.choice((32, 128))
        start = size // 2 * rng.randrange(len_k // (size // 2) + 1)
        stop, end = start + size, rng.choice((len_k, min(len_k, start + 64)))
        asked, marks = np.zeros(3, np.int32), np.zeros((32, size), np.int32)
        kind = host.kind(sink, window, int(by_block), block, min(len_q, len_k), len_k, start, stop, end,
                         asked.ctypes.data_as(ctypes.c_void_p), marks.ctypes.data_as(ctypes.c_void_p))  # fmt: skip
        queries = min(32, len_q, len_k)
        assert asked.tolist() == [queries, len_k - queries, len_k if queries else 0]
        position, key = np.arange(len_k - 32, len_k)[:, None], np.arange(start, stop)[None]
        granule = "block" if by_block else "token"
        shown = visible(position, key, sink=sink, window=window, granule=granule, block=block)
        counted = (key <= position) & (key < end)
        assert (marks == np.where(counted, np.where(shown, 1, 2), 0)).all()
        if queries:
            used = marks[-queries:]
            exact = SEEN if (used == 1).all() else HIDDEN if (used == 2).all() else MIXED
            assert kind in (exact, MIXED)
            kinds.add((kind, exact))
    assert {(SEEN, SEEN), (HIDDEN, HIDDEN), (MIXED, MIXED)} <= kinds
    assert (MIXED, HIDDEN) not in kinds  # the tiles that a long prompt is made of
