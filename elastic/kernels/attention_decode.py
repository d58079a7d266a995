"""`attention_decode`: one query token per sample against cached keys, every KV head with its own length and window.

The operator is `torch.ops.elastic.attention_decode`: a CUDA kernel on a GPU, the oracle on the CPU. Where the tokens
of a head lie and which of them are visible is read on the device; the host never waits, and a captured graph may be
replayed after the numbers have changed. Legend: B samples, H query heads, K KV heads, G = H / K, D head dim, R rows of
the cache, T tokens.
"""

import math
import struct
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from elastic.kernels import jit, operators
from elastic.kernels.attention_sinks import check_sinks
from elastic.kernels.checks import HEAD_DIMS, check_scale
from elastic.kernels.devices import (
    MAX_GROUP,
    MAX_HEADS,
    DecodeConfig,
    capability_of,
    decode_config,
    processors_of,
    shared_limit,
)
from elastic.kernels.params import is_half

PARAMS = struct.Struct("<11Q3q3if")  # elastic::DecodeParams


def attention_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    base: Tensor,
    sink: Tensor,
    begin: Tensor,
    end: Tensor,
    *,
    token_stride: int = 1,
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the newest token of each sample to the cached tokens that its KV head keeps. Not differentiable.

    The caches are seen as rows of D elements. Token t of KV head k of sample b is row base[b, k] + t * token_stride,
    in keys and values alike, and it is visible if
        0 <= t < end[b, k] and (t < sink[b, k] or t >= begin[b, k]).
    So a full head has begin <= sink (or sink 0 and begin at its first token), a streaming head of a dense cache
    begin = end - window, and a streaming head whose cache holds nothing but its sink and window begin 0; the order of
    the tokens does not matter, because keys carry their positions. A head that sees nothing answers 0.

    Args:
        q: [B, H, D]; on a GPU bf16 or fp16, D 64 or 128, H / K at most 16. Query head h reads KV head h // (H / K).
        keys, values: contiguous [..., D], any leading shape, the same for both: a cache [B, K, T, D] with token_stride
            1, [B, T, K, D] with token_stride K, or a pool of rows [R, D].
        base: int64 [B, K], row of token 0.
        sink, begin, end: int32 [B, K], tokens.
        token_stride: rows from one token to the next.
        scale: softmax scale, default D ** -0.5.
        sinks: [H], a logit of each query head that joins its softmax's denominator, see `attention_sinks`.

    Returns:
        [B, H, D] contiguous, in q's dtype.

    Raises:
        ValueError: arguments that do not fit, with the way out. Rows outside the cache are looked for on the CPU only;
            on a GPU they are the caller's to avoid.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plain = operators.is_plain_cuda(q)
    run: Callable[..., Tensor] = _decode_cuda if plain else torch.ops.elastic.attention_decode
    return run(q, keys, values, base, sink, begin, end, token_stride, scale, sinks)


def check_decode(
    q: Tensor, keys: Tensor, values: Tensor, base: Tensor, spans: tuple[Tensor, Tensor, Tensor], token_stride: int,
    scale: float, sinks: Tensor | None,
) -> None:  # fmt: skip
    """Shapes, types and devices; reads no device memory. `spans` are sink, begin, end."""
    if q.dim() != 3 or keys.dim() < 2 or keys.shape != values.shape or keys.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"q {list(q.shape)}, keys {list(keys.shape)}, values {list(values.shape)} do not belong together; expected "
            "q [B, H, D] of one token (take q[:, :, 0] of [B, H, 1, D]) and two caches [..., D] of one shape"
        )
    if not q.dtype == keys.dtype == values.dtype:
        raise ValueError(
            f"q, keys, values have dtypes {q.dtype}, {keys.dtype}, {values.dtype}; expected one dtype for all three"
        )
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError(
            f"keys and values have strides {list(keys.stride())} and {list(values.stride())}; expected contiguous "
            "caches: pass the whole buffer and say by `end` how much of it is filled"
        )
    heads = base.shape[1] if base.dim() == 2 else 0
    if base.dim() != 2 or base.shape[0] != q.shape[0] or heads == 0 or q.shape[1] % heads:
        raise ValueError(
            f"base has shape {list(base.shape)} and q {list(q.shape)}; expected base [B, K] with H a multiple of K"
        )
    for name, tensor, dtype in zip(
        ("base", "sink", "begin", "end"), (base, *spans), (torch.int64, *[torch.int32] * 3), strict=True
    ):
        if tensor.dtype != dtype or tensor.shape != base.shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, expected contiguous {dtype} {list(base.shape)}"
            )
    devices = {name: x.device for name, x in (("q", q), ("keys", keys), ("values", values), ("base", base))}
    devices |= {name: x.device for name, x in zip(("sink", "begin", "end"), spans, strict=True)}
    if len(set(devices.values())) > 1:
        listed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"the arguments lie apart ({listed}); expected one device for all")
    if token_stride < 1:
        raise ValueError(f"token_stride={token_stride} rows; expected at least 1")
    check_scale(scale)
    if sinks is not None:
        check_sinks(sinks, q.shape[1], q.device)


def visible_tokens(sink: int, begin: int, end: int, device: torch.device) -> Tensor:
    """Numbers of the tokens that a head sees, int64, rising."""
    token = torch.arange(max(end, 0), device=device)
    return token[(token < sink) | (token >= begin)]


def decode_oracle(
    q: Tensor, keys: Tensor, values: Tensor, base: Tensor, sink: Tensor, begin: Tensor, end: Tensor, token_stride: int,
    scale: float, sinks: Tensor | None = None, compute: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The readable twin of the kernel: softmax(scale q K^T) V over the visible tokens and the sink, whose value is 0,
    one KV head after the other.

    Args:
        compute: element type of every intermediate; default fp32, or fp64 for fp64 input.

    Raises:
        ValueError: a visible token outside the cache.
    """
    wide = compute or torch.promote_types(q.dtype, torch.float32)
    rows_k, rows_v = keys.view(-1, q.shape[2]), values.view(-1, q.shape[2])
    kv_heads = base.shape[1]
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    group = q.shape[1] // kv_heads
    numbers = zip(*(x.flatten().tolist() for x in (base, sink, begin, end)), strict=True)
    for index, (first, *span) in enumerate(numbers):
        b, k = divmod(index, kv_heads)
        rows = first + token_stride * visible_tokens(span[0], span[1], span[2], q.device)
        if rows.numel() == 0:
            continue
        if rows[0] < 0 or rows[-1] >= rows_k.shape[0]:
            raise ValueError(
                f"sample {b}, KV head {k} sees rows {int(rows[0])} to {int(rows[-1])}; the cache has "
                f"{rows_k.shape[0]} rows: base, end or token_stride do not fit it"
            )
        heads = slice(k * group, (k + 1) * group)
        scores = q[b, heads].to(wide) @ rows_k[rows].to(wide).T * scale
        if sinks is not None:
            scores = torch.cat([scores, sinks[heads, None].to(wide)], dim=-1)
        out[b, heads] = torch.softmax(scores, dim=-1)[:, : rows.numel()] @ rows_v[rows].to(wide)
    return out.to(q.dtype)


def check_decode_cuda(q: Tensor, keys: Tensor, values: Tensor, heads: int) -> None:
    """What the kernel needs beyond the operator's contract; `heads` is B times K."""
    group = q.shape[0] * q.shape[1] // max(heads, 1)
    if not is_half(q.dtype) or q.shape[2] not in HEAD_DIMS or group > MAX_GROUP or heads > MAX_HEADS:
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)} for {heads} KV heads of all samples; the decode kernel takes "
            f"torch.bfloat16 or torch.float16, head dim 64 or 128, at most {MAX_GROUP} query heads per KV head and "
            f"{MAX_HEADS} KV heads; split the batch, or run other shapes through PyTorch's attention"
        )
    if q.stride(2) != 1 or q.stride(1) % 8 or q.stride(0) % 8:
        raise ValueError(
            f"q has strides {list(q.stride())}; expected a contiguous head dim and other strides that are multiples of "
            "8 elements; use q.contiguous()"
        )
    if (q.data_ptr() | keys.data_ptr() | values.data_ptr()) % 16:
        starts = [x.data_ptr() % 16 for x in (q, keys, values)]
        raise ValueError(
            f"q, keys, values start {starts} bytes past a 16-byte boundary; expected 0: slice the tensor at a multiple "
            "of 8 elements, or use .clone()"
        )


@lru_cache(maxsize=256)
def arrivals(device: torch.device, _stream: int, _capture: int) -> Tensor:
    """int32 zeros that no other launch in flight uses, of any number of heads; every launch leaves them zero again.

    One tensor per stream; a captured graph gets its own, because graphs captured on one stream may replay on several.
    """
    return torch.zeros(MAX_HEADS, dtype=torch.int32, device=device)


@cache
def _kernel(config: DecodeConfig, head_dim: int, bf16: bool, index: int) -> Any:
    macros = (f"ELASTIC_WARPS={config.warps}", f"ELASTIC_STAGES={config.stages}")
    return jit.load_kernel(jit.Variant("attention_decode", config.arch, head_dim, bf16, macros), index)


@cache
def decode_launch(index: int, head_dim: int, group: int, heads: int) -> DecodeConfig:
    """Launch choices of a GPU, as `decode_config` makes them."""
    return decode_config(capability_of(index), processors_of(index), shared_limit(index), head_dim, group, heads)


def launch_decode(
    out: Tensor, q: Tensor, keys: Tensor, values: Tensor, base: Tensor, spans: tuple[Tensor, Tensor, Tensor],
    token_stride: int, scale: float, config: DecodeConfig, sinks: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the kernel on checked CUDA tensors, into a tensor the caller owns."""
    samples, query_heads, dim = q.shape
    index, kv_heads = q.device.index, base.shape[1]
    group = query_heads // kv_heads
    partial = torch.empty(2 * config.grid * group * (dim + 2), dtype=torch.float32, device=q.device)
    arrived = arrivals(q.device, jit.current_stream(index), jit.capture_id(index))
    sinks = None if sinks is None else sinks.float().contiguous()
    tensors = (q, keys, values, out, base, *spans, partial, arrived, sinks)
    addresses = (0 if x is None else x.data_ptr() for x in tensors)
    strides = (q.stride(0), q.stride(1), token_stride)
    params = PARAMS.pack(*addresses, *strides, samples, query_heads, kv_heads, scale * math.log2(math.e))
    kernel = _kernel(config, dim, q.dtype == torch.bfloat16, index)
    jit.launch(kernel, (config.grid,), 32 * config.warps, params, config.shared_bytes, index)


def _decode_cuda(
    q: Tensor, keys: Tensor, values: Tensor, base: Tensor, sink: Tensor, begin: Tensor, end: Tensor, token_stride: int,
    scale: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    spans = (sink, begin, end)
    check_decode(q, keys, values, base, spans, token_stride, scale, sinks)
    check_decode_cuda(q, keys, values, base.numel())
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel():
        config = decode_launch(q.device.index, q.shape[2], q.shape[1] // base.shape[1], base.numel())
        launch_decode(out, q, keys, values, base, spans, token_stride, scale, config, sinks)
    return out


def _decode_cpu(
    q: Tensor, keys: Tensor, values: Tensor, base: Tensor, sink: Tensor, begin: Tensor, end: Tensor, token_stride: int,
    scale: float, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    check_decode(q, keys, values, base, (sink, begin, end), token_stride, scale, sinks)
    return decode_oracle(q, keys, values, base, sink, begin, end, token_stride, scale, sinks)


def _decode_fake(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


operators.define(
    "attention_decode(Tensor q, Tensor keys, Tensor values, Tensor base, Tensor sink, Tensor begin, Tensor end, "
    "int token_stride, float scale, Tensor? sinks) -> Tensor",
    cuda=_decode_cuda,
    cpu=_decode_cpu,
    fake=_decode_fake,
)
