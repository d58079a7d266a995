"""The reach kernels against the oracle on a GPU: random problems, every grouping, long prompts that many CTAs share,
repeats, graphs, streams.
"""

import pytest
import torch
from torch import Tensor

from elastic.attention.layout import batch_layout
from elastic.attention.prompt_reach import prompt_reach
from elastic.config import SparseConfig
from elastic.kernels import Pattern, Ranges, reach
from elastic.kernels.params import WHOLE_ROWS
from tests.kernels.generators import placed, random_problem, tensor
from tests.kernels.gpu import needs_gpu, paths
from tests.kernels.gpu_reach import judge_reach, run_reach

pytestmark = [pytest.mark.gpu, needs_gpu]
DTYPES = [torch.bfloat16, torch.float16]
STRESS = ("ELASTIC_STRESS=1", "ELASTIC_WATCHDOG=1")


@pytest.mark.parametrize("block", range(4))
@pytest.mark.parametrize("path", paths())
def test_random_problems(path: str, block: int) -> None:
    for seed in range(40 * block, 40 * block + 40):
        q, k, _, _, pattern, ranges, _ = random_problem(seed).args()
        try:
            judge_reach(run_reach(q, k, pattern, ranges, path), q, k, pattern, ranges)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, q {list(q.shape)}, k {list(k.shape)}: {error}") from error


def mixed(group: int, dim: int, dtype: torch.dtype, kv_heads: int = 2) -> tuple[Tensor, Tensor, Ranges]:
    """Four left-padded rows of 1 to 3000 tokens, keys of padding poisoned."""
    gen = torch.Generator("cuda").manual_seed(group)
    q = tensor(gen, (4, 3000, kv_heads * group, dim), "plain", dtype)
    k = tensor(gen, (4, 3000, kv_heads, dim), "heads_first", dtype)
    begin = [0, 2999, 1100, 2963]
    cuts = {"begin_q": begin, "end_q": [3000] * 4, "begin_k": begin, "end_k": [3000] * 4, "row": [0, 1, 2, 3]}
    return q, k, placed(cuts, q, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("path", paths())
def test_mixed_lengths_of_every_grouping(path: str, group: int, dim: int, dtype: torch.dtype) -> None:
    q, k, ranges = mixed(group, dim, dtype)
    for pattern in (Pattern(4, 100, scale=dim**-0.5), Pattern(128, 256, "block", 128, 0.3)):
        for processors in (None, 3):
            found = run_reach(q, k, pattern, ranges, path, processors)
            judge_reach(found, q, k, pattern, ranges)
            assert found[0][0].all() and not found[0][1].any()


def long_operands(length: int = 70_001, heads: int = 8, group: int = 4, dim: int = 128) -> tuple[Tensor, Tensor]:
    gen = torch.Generator("cuda").manual_seed(length)
    q = tensor(gen, (1, 700, heads * group, dim), "heads_first", torch.bfloat16)
    return q, tensor(gen, (1, length, heads, dim), "heads_first", torch.bfloat16)


@pytest.mark.parametrize("shape", [(8, 4, 128), (1, 8, 128), (3, 3, 64), (2, 1, 64)])
@pytest.mark.parametrize("path", paths())
def test_long_prompts_that_many_ctas_share(path: str, shape: tuple[int, int, int]) -> None:
    q, k = long_operands(70_001, *shape)
    pattern = Pattern(128, 2048)
    for processors in (None, 1, 50):
        judge_reach(run_reach(q, k, pattern, WHOLE_ROWS, path, processors), q, k, pattern, WHOLE_ROWS)


def test_repeats_are_bit_equal() -> None:
    q, k = long_operands(20_000)
    first = reach(q, k, Pattern(128, 2048))
    for _ in range(50):
        assert all(map(torch.equal, reach(q, k, Pattern(128, 2048)), first))


@pytest.mark.parametrize("dim", [64, 128])
def test_random_delays_change_nothing(dim: int) -> None:
    q, k = long_operands(9_000, dim=dim)
    pattern = Pattern(64, 512)
    want = run_reach(q, k, pattern, WHOLE_ROWS, paths()[0])
    for _ in range(5):
        found = run_reach(q, k, pattern, WHOLE_ROWS, paths()[0], debug=STRESS)
        assert all(map(torch.equal, found, want))


def test_a_graph_follows_lengths_that_change() -> None:
    q, k = long_operands(5_000)
    pattern = Pattern(16, 100)
    begin_q, end_q, begin_k, end_k, row = torch.tensor([[0], [700], [0], [5000], [0]], dtype=torch.int32, device="cuda")
    ranges = Ranges(begin_q, end_q, begin_k, end_k, row)
    reach(q, k, pattern, ranges)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = reach(q, k, pattern, ranges)
    for first, last, begin, end in (
        (0, 700, 0, 5000),
        (690, 700, 9, 5000),
        (0, 40, 4000, 4200),
        (3, 3, 0, 0),
        (0, 1, 0, 1),
    ):
        for cut, value in zip((begin_q, end_q, begin_k, end_k), (first, last, begin, end), strict=True):
            cut.fill_(value)
        found.largest.fill_(float("nan")), found.recent.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, found, reach(q, k, pattern, ranges)))
        judge_reach(found, q, k, pattern, ranges)


def test_two_streams_do_not_mix() -> None:
    q, k = long_operands(30_000)
    want = reach(q, k, Pattern(128, 2048))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(reach(q, k, Pattern(128, 2048)))
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for one in found for pair in zip(one, want, strict=True))


def test_no_host_synchronisation() -> None:
    q, k, ranges = mixed(4, 128, torch.bfloat16)
    reach(q, k, Pattern(4, 64), ranges)
    torch.cuda.set_sync_debug_mode("error")
    try:
        reach(q, k, Pattern(4, 64), ranges)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_nan_among_a_samples_own_keys_is_not_hidden() -> None:
    q, k = long_operands(3_000)
    k[0, 1500, 2] = float("nan")
    for path in paths():
        largest, recent = run_reach(q, k, Pattern(4, 64), WHOLE_ROWS, path)
        for found in (largest, recent):
            assert found[0, 2].isnan() and found.isnan().sum() == 1


def test_prompts_of_a_layout() -> None:
    """Left-padded rows in a later turn, and shapes that no kernel takes: the same as on the CPU."""
    gen = torch.Generator("cuda").manual_seed(0)
    mask = torch.ones(2, 900, dtype=torch.long, device="cuda")
    mask[1, :650] = 0
    sparse = SparseConfig(sink=64, window=128, block=64)
    for kv_heads, group, dtype in ((2, 4, torch.bfloat16), (2, 4, torch.float32), (1, 12, torch.bfloat16)):
        q = tensor(gen, (2, 300, kv_heads * group, 64), "plain", dtype).transpose(1, 2)
        k = tensor(gen, (2, 900, kv_heads, 64), "plain", dtype).transpose(1, 2)
        layout = batch_layout(2, 300, 600, q.device, mask, torch.tensor([850, 880]))
        on_cpu = batch_layout(2, 300, 600, torch.device("cpu"), mask.cpu(), torch.tensor([850, 880]))
        found = prompt_reach(q, k, layout, sparse, 0.125)
        want = prompt_reach(q.cpu(), k.cpu(), on_cpu, sparse, 0.125)
        for one, other in zip(found, want, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k: (q.float(), k.float()), "take torch.bfloat16 or torch.float16"),
        (lambda q, k: (q[..., :32], k[..., :32]), "head dim 64 or 128"),
        (lambda q, k: (q[:, :, :9], k[:, :, :1]), "9 query heads per KV head; the reach kernels take at most 8"),
        (lambda q, k: (q.transpose(1, 3).contiguous().transpose(1, 3), k), r"use q.contiguous\(\)"),
        (lambda q, k: (q.repeat(1, 1, 150, 1), k.repeat(1, 1, 600, 1)), "at most 4096 KV heads"),
    ],
)
def test_what_the_kernel_cannot_read_is_named(change, message: str) -> None:
    q, k = long_operands(1000)
    with pytest.raises(ValueError, match=message):
        reach(*change(q, k), Pattern(4, 64))
