"""The decode operator's contract on the CPU: the oracle against SDPA and against the prefill operator, the messages."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from elastic.kernels import Pattern, attention_decode, attention_forward
from elastic.kernels.attention_decode import check_decode

B, K, G, D, T = 2, 2, 3, 64, 50


def operands() -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(B, K * G, D, generator=gen)
    k, v = (torch.randn(B, K, T, D, generator=gen) for _ in range(2))
    return q, k, v


def spans(sink: int, begin: int, end: int) -> list[Tensor]:
    """Of a dense cache [B, K, T, D]: base, sink, begin, end, the same for all heads."""
    base = torch.arange(B * K).view(B, K) * T
    return [base, *(torch.full((B, K), n, dtype=torch.int32) for n in (sink, begin, end))]


def test_full_heads_equal_sdpa() -> None:
    q, k, v = operands()
    out = attention_decode(q, k, v, *spans(0, 0, T))
    want = scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)
    torch.testing.assert_close(out, want[:, :, 0])


def test_lengths_per_sample_and_head() -> None:
    q, k, v = operands()
    base, sink, begin, end = spans(0, 0, T)
    end.copy_(torch.tensor([[50, 7], [1, 33]]))
    begin.copy_(torch.tensor([[20, 0], [0, 32]]))  # left padding, or a window of one token
    out = attention_decode(q, k, v, base, sink, begin, end, scale=0.3)
    for b in range(B):
        for head in range(K):
            heads, tokens = slice(G * head, G * head + G), slice(int(begin[b, head]), int(end[b, head]))
            alone = scaled_dot_product_attention(q[b, heads], k[b, head, tokens], v[b, head, tokens], scale=0.3)
            torch.testing.assert_close(out[b, heads], alone)


def test_the_last_query_of_a_prefill_sees_the_same() -> None:
    """Full and streaming heads in one call, against the prefill operator on [B, T, K, D]."""
    q, k, v = operands()
    k, v = (x.transpose(1, 2).contiguous() for x in (k, v))
    mode = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    want, _ = attention_forward(q[:, None], k, v, mode, Pattern(4, 8))
    base = torch.arange(B)[:, None] * T * K + torch.arange(K)
    _, sink, begin, end = spans(0, 0, T)
    sink, begin = torch.where(mode == 1, 4, sink), torch.where(mode == 1, T - 8, begin)
    torch.testing.assert_close(attention_decode(q, k, v, base, sink, begin, end, token_stride=K), want[:, 0])


def test_a_pool_that_holds_only_the_visible_rows() -> None:
    """A streaming head kept as one run of sink and window in any order equals the same head of a dense cache."""
    q, k, v = operands()
    want = attention_decode(q, k, v, *spans(4, T - 8, T))
    kept = torch.cat([torch.arange(T - 8, T), torch.arange(4)])
    pool_k, pool_v = (torch.cat([x[:, :, kept].reshape(-1, D), torch.full((5, D), torch.nan)]) for x in (k, v))
    base = torch.arange(B * K).view(B, K) * 12
    out = attention_decode(q, pool_k, pool_v, base, *spans(0, 0, 12)[1:])
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize(
    ("sink", "begin", "end", "count"),
    [(4, 10, 20, 14), (4, 2, 20, 20), (4, -5, 3, 3), (30, 40, 20, 20), (0, 20, 20, 0), (0, 25, 20, 0), (0, 0, 0, 0)],
)
def test_what_is_visible(sink: int, begin: int, end: int, count: int) -> None:
    """Overlaps count once, `end` bounds the sink, an empty range answers 0. Values are 1, so a sum of weights shows."""
    q, k, _ = operands()
    v = torch.zeros(B, K, T, D)
    tokens = [t for t in range(T) if t < end and (t < sink or t >= begin)]
    assert len(tokens) == count
    v[:, :, tokens] = 1.0
    out = attention_decode(q, k, v, *spans(sink, begin, end))
    torch.testing.assert_close(out, torch.full_like(out, float(count > 0)))


def test_operator_contract() -> None:
    q, k, v = operands()
    torch.library.opcheck(torch.ops.elastic.attention_decode, (q, k, v, *spans(4, 40, T), 1, 0.1, torch.zeros(K * G)))


def replaced(**change) -> dict:
    q, k, v = operands()
    base, sink, begin, end = spans(0, 0, T)
    named = {"q": q, "keys": k, "values": v, "base": base, "sink": sink, "begin": begin, "end": end}
    return {**named, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(B, K * G, 1, D)}, r"expected q \[B, H, D\] of one token"),
        ({"values": torch.zeros(B, K, T + 1, D)}, "two caches .* of one shape"),
        ({"q": torch.zeros(B, K * G, D).double()}, "expected one dtype for all three"),
        ({"keys": torch.zeros(B, T, K, D).transpose(1, 2)}, "pass the whole buffer"),
        ({"q": torch.zeros(B, 5, D)}, "H a multiple of K"),
        ({"base": torch.zeros(B, K, dtype=torch.int32)}, r"base is torch.int32 .* expected contiguous torch.int64"),
        ({"end": torch.zeros(B, K)}, r"end is torch.float32 \[2, 2\], expected contiguous torch.int32"),
        ({"sink": torch.zeros(B, 1, dtype=torch.int32)}, r"sink is torch.int32 \[2, 1\]"),
        ({"token_stride": 0}, "token_stride=0 rows; expected at least 1"),
        ({"scale": -1.0}, "not positive and finite"),
        ({"base": torch.full((B, K), 151)}, "sample 0, KV head 0 sees rows 151 to 200; the cache has 200 rows"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_decode(**replaced(**change))


def test_devices_are_compared() -> None:
    q, k, v = operands()
    base, sink, begin, end = spans(0, 0, T)
    with pytest.raises(ValueError, match=r"q on cpu.*begin on meta.*expected one device for all"):
        check_decode(q, k, v, base, (sink, begin.to("meta"), end), 1, 0.1, None)
