"""The paged operators' contract on the CPU: the twin against SDPA, against contiguous keys and against the pages of the
vLLM plugin; layouts, messages.
"""

import dataclasses
import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from elastic.config import SparseConfig
from elastic.engines.vllm.paged import Pages, attend_pages
from elastic.kernels import Pattern, Ranges, attention_forward, paged_decode, paged_forward
from elastic.kernels.checks import MAX_KEYS
from elastic.kernels.paged_decode import _check_cuda
from elastic.kernels.paged_forward import paged_config
from elastic.kernels.pages import check_paged, check_paged_cuda
from elastic.visibility import visible
from tests.kernels.gpu_paged import (
    LAYOUTS,
    PagedProblem,
    judge_decode,
    judge_forward,
    new_pools,
    random_paged,
    reference,
)


def fp32(problem: PagedProblem) -> PagedProblem:
    widened = (tuple(x.float() for x in pools) for pools in (problem.pools, problem.clean))
    return dataclasses.replace(problem, q=problem.q.float(), **dict(zip(("pools", "clean"), widened, strict=True)))


@pytest.mark.parametrize("seed", range(40))
def test_the_twin_equals_sdpa_under_the_mask(seed: int) -> None:
    """Request by request, over keys gathered token by token."""
    p = fp32(random_paged(seed, decode=False, device="cpu", longest=300))
    out, lse = paged_forward(p.q, *p.clean, p.table, p.starts, p.lengths, p.mode, p.pattern)
    sizes = {"sink": p.pattern.sink, "window": p.pattern.window, "granule": p.pattern.granule, "block": p.pattern.block}
    size, group = p.clean[0].shape[1], p.q.shape[1] // p.mode.shape[1]
    for n, (begin, end) in enumerate(itertools.pairwise(p.starts.tolist())):
        token = torch.arange(int(p.lengths[n]))
        k, v = (x[p.table[n].long()[token // size], token % size].transpose(0, 1) for x in p.clean)
        position = token[len(token) - (end - begin) :, None]
        masks = torch.stack([token <= position, visible(position, token, **sizes)])
        mask = masks[p.mode[n].long()].repeat_interleave(group, dim=0)
        q = p.q[begin:end].transpose(0, 1)
        want = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=p.pattern.scale, enable_gqa=True)
        torch.testing.assert_close(out[begin:end], want.transpose(0, 1))
    assert lse.shape == (p.q.shape[1], p.q.shape[0]) and lse.isfinite().all()


@pytest.mark.parametrize("seed", range(20))
def test_decoding_is_the_forward_pass_of_single_queries(seed: int) -> None:
    p = fp32(random_paged(seed, decode=True, device="cpu", longest=300))
    out = paged_decode(p.q, *p.clean, p.table, p.lengths, p.mode, p.pattern)
    want, _ = paged_forward(p.q, *p.clean, p.table, p.starts, p.lengths, p.mode, p.pattern)
    torch.testing.assert_close(out, want)
    assert (out[p.lengths == 0] == 0).all()


def test_the_judges_accept_the_twin_and_refuse_another_answer() -> None:
    for seed in range(5):
        p = random_paged(seed, decode=True, device="cpu", longest=300)
        out = paged_decode(p.q, *p.clean, p.table, p.lengths, p.mode, p.pattern)
        judge_decode(out, p)
        with pytest.raises(AssertionError, match="output error"):
            judge_decode(out + 1, p)
        p = random_paged(seed, decode=False, device="cpu", longest=300)
        out, lse = paged_forward(p.q, *p.clean, p.table, p.starts, p.lengths, p.mode, p.pattern)
        judge_forward(out, lse, reference(p))
        with pytest.raises(AssertionError, match="LSE error"):
            judge_forward(out, lse + 1, reference(p))


def test_pages_in_order_equal_contiguous_keys() -> None:
    """Two requests of 40 and 23 tokens, the second with a prefix of 10, against the operator of contiguous tensors."""
    gen = torch.Generator().manual_seed(0)
    lengths, news, mode = [40, 23], [40, 13], torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    k, v = (torch.randn(1, 64, 2, 64, generator=gen) for _ in range(2))  # the second begins at token 40
    q, pattern = torch.randn(1, 53, 4, 64, generator=gen), Pattern(4, 8)
    bounds = [torch.tensor(x, dtype=torch.int32) for x in ([0, 40], [40, 53], [0, 40], [40, 63], [0, 0])]
    want, want_lse = attention_forward(q, k, v, mode, pattern, Ranges(*bounds))
    table = torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 0, 0]], dtype=torch.int32)
    pools = [x[0].view(8, 8, 2, 64) for x in (k, v)]
    starts, length = torch.tensor([0, *torch.tensor(news).cumsum(0)]).int(), torch.tensor(lengths).int()
    out, lse = paged_forward(q[0], *pools, table, starts, length, mode, pattern)
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(lse, want_lse[0])


@pytest.mark.parametrize("queries", [1, 7, 90])
@pytest.mark.parametrize("granule", ["token", "block"])
def test_the_plugins_pages_give_the_same(queries: int, granule: str) -> None:
    """The PyTorch path of the vLLM plugin, over its cache [N, K, T, 2 D]."""
    gen = torch.Generator().manual_seed(1)
    keys, values = new_pools(gen, (9, 16, 2, 64), "together", torch.float32)
    cache = torch.cat([keys, values], dim=-1).transpose(1, 2).contiguous()
    table = torch.tensor([[3, 8, 1, 0, 5, 7]], dtype=torch.int32)
    q, length = torch.randn(queries, 4, 64, generator=gen), torch.tensor([90], dtype=torch.int32)
    sparse = SparseConfig(sink=16, window=32, block=16, granule=granule)
    mode, pattern = torch.tensor([[1, 0]], dtype=torch.int32), Pattern(16, 32, granule, 16, 0.3)
    starts = torch.tensor([0, queries], dtype=torch.int32)
    found, _ = paged_forward(q, keys, values, table, starts, length, mode, pattern)
    want = attend_pages(q, Pages(cache, table[0].long(), 90), [True, False], sparse, 0.3)
    torch.testing.assert_close(found, want)


def test_every_layout_gives_the_same() -> None:
    p = fp32(random_paged(3, decode=False, device="cpu", longest=200))
    want, _ = paged_forward(p.q, *p.clean, p.table, p.starts, p.lengths, p.mode, p.pattern)
    shape = p.clean[0].shape
    for layout in LAYOUTS:
        pools = new_pools(torch.Generator(), tuple(shape), layout, torch.float32)
        pools.copy_(torch.stack(p.clean))
        found, _ = paged_forward(p.q, *pools, p.table, p.starts, p.lengths, p.mode, p.pattern)
        assert torch.equal(found, want)
        check_paged_cuda(p.q.half(), *pools.half(), p.table)


def test_an_unknown_mode_answers_nan() -> None:
    p = fp32(random_paged(2, decode=True, device="cpu", longest=100))
    mode = p.mode.clone()
    mode[0, 0] = 2
    out = paged_decode(p.q, *p.clean, p.table, p.lengths, mode, p.pattern)
    group = p.q.shape[1] // mode.shape[1]
    assert out[0, :group].isnan().all() and not out[1:].isnan().any() and not out[:, group:].isnan().any()


def test_operator_contracts() -> None:
    p = fp32(random_paged(4, decode=False, device="cpu", longest=100))
    flat = (4, 8, "token", 64, 0.1)
    arguments = (p.q, *p.clean, p.table, p.starts, p.lengths, p.mode, *flat)
    torch.library.opcheck(torch.ops.elastic.paged_forward, arguments)
    p = fp32(random_paged(4, decode=True, device="cpu", longest=100))
    torch.library.opcheck(torch.ops.elastic.paged_decode, (p.q, *p.clean, p.table, p.lengths, p.mode, *flat))


def test_boxes_lie_in_pages() -> None:
    for size, box in ((16, 16), (32, 32), (64, 64), (128, 64)):
        assert paged_config((9, 0), 132, 128, 1, 9, size).macros == (f"ELASTIC_PAGED={box}",)
        assert paged_config((8, 0), 108, 128, 1, 9, size).macros == ("ELASTIC_PAGED=1",)


def arguments(**change) -> dict:
    """Of two requests of 20 and 5 tokens with 3 and 1 new ones, over 6 pages of 16."""
    pools = torch.randn(2, 6, 16, 2, 64)
    table = torch.tensor([[1, 4], [2, 0]], dtype=torch.int32)
    starts, lengths = (torch.tensor(x, dtype=torch.int32) for x in ([0, 3, 4], [20, 5]))
    named = {"q": torch.randn(4, 4, 64), "keys": pools[0], "values": pools[1], "table": table, "starts": starts,
             "lengths": lengths, "mode": torch.zeros(2, 2, dtype=torch.int32), "pattern": Pattern(4, 8)}  # fmt: skip
    return {**named, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 4, 64)}, r"expected q \[S, H, D\] and two pools"),
        ({"values": torch.zeros(6, 16, 3, 64)}, "two pools .* of one shape"),
        ({"q": torch.zeros(4, 4, 64).double()}, "expected one dtype for all three"),
        ({"q": torch.zeros(4, 5, 64)}, "5 query heads are not a multiple of the pools' 2 KV heads"),
        ({"table": torch.zeros(2, 2)}, r"table is torch.float32 .* a row of page numbers for every request"),
        ({"table": torch.zeros(2, 2, dtype=torch.int32).T}, "whose rows are contiguous"),
        ({"lengths": torch.zeros(3, dtype=torch.int32)}, r"lengths is torch.int32 \[3\], expected .* \[2\]"),
        ({"mode": torch.zeros(2, 2)}, r"mode is torch.float32 \[2, 2\], expected contiguous torch.int32"),
        ({"starts": torch.zeros(2, dtype=torch.int32)}, r"starts is torch.int32 \[2\], expected .* \[3\]"),
        ({"starts": torch.tensor([0, 3, 5], dtype=torch.int32)}, "expected rising numbers from 0 to the 4 queries"),
        ({"pattern": Pattern(4, 0)}, "expected sink >= 0, window >= 1"),
        ({"pattern": Pattern(4, 8, scale=-1.0)}, "not positive and finite"),
        ({"table": torch.full((2, 2), 6, dtype=torch.int32)}, "names pages 6 to 6; the pools hold 0 to 5"),
        ({"lengths": torch.tensor([33, 5], dtype=torch.int32)}, "request of 33 tokens has 2 pages of 16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_forward(**arguments(**change))


def test_decoding_wants_one_query_a_request() -> None:
    named = arguments()
    del named["starts"]
    with pytest.raises(ValueError, match="one query for each: use paged_forward"):
        paged_decode(**named)


def test_devices_are_compared() -> None:
    named = arguments(lengths=torch.zeros(2, dtype=torch.int32, device="meta"))
    del named["starts"]
    with pytest.raises(ValueError, match=r"q on cpu.*lengths on meta.*expected one device for all"):
        check_paged(**named)


def halves(**change) -> tuple:
    named = arguments()
    named = {name: named[name].half() if name in ("q", "keys", "values") else named[name] for name in named} | change
    return tuple(named[name] for name in ("q", "keys", "values", "table"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(4, 4, 64)}, "take torch.bfloat16 or torch.float16"),
        ({"keys": torch.zeros(6, 8, 2, 64).half()}, "pages of 8 tokens; the paged kernels take powers of two from 16"),
        ({"keys": torch.zeros(6, 48, 2, 64).half()}, "pages of 48 tokens"),
        ({"table": torch.zeros(1, MAX_KEYS // 16, dtype=torch.int32)}, "cut the table to the longest request"),
        ({"q": torch.zeros(4, 64, 4).half().transpose(1, 2)}, r"use q.contiguous\(\)"),
        ({"values": torch.zeros(6, 2, 16, 64).half().transpose(1, 2)}, "the same for keys .* and values"),
        ({"keys": torch.zeros(6, 16, 64, 2).half().transpose(2, 3)}, "keys have strides .* a contiguous head dim"),
    ],
)  # fmt: skip
def test_what_the_kernels_cannot_read_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_paged_cuda(*halves(**change))


def test_a_cache_beyond_the_decode_kernels_reach_is_named() -> None:
    pools = torch.empty(2, 1 << 18, 128, 16, 128, dtype=torch.float16, device="meta")
    q, table = torch.zeros(4, 16, 128).half(), torch.zeros(4, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match="the layer's own cache"):
        check_paged_cuda(q, *pools, table)


def test_a_group_that_the_decode_kernel_does_not_take_is_named() -> None:
    q, keys, values, table = halves(q=torch.zeros(2, 34, 64).half())
    with pytest.raises(ValueError, match="at most 16 query heads per KV head"):
        _check_cuda(q, keys, values, table, torch.zeros(2, 2, dtype=torch.int32))
