"""Argument checks of the attention operator. Everything here reads shapes and types only, never device memory."""

import math

import torch
from torch import Tensor

from elastic.kernels.params import QUERY_BLOCK, Pattern, Ranges, is_half, strides_of

HEAD_DIMS = (64, 128)
MAX_SAMPLES, MAX_KV_HEADS, MAX_KEYS = 512, 64, 1 << 22


def check_pattern(pattern: Pattern, bits: Tensor | None) -> None:
    """Sizes of the sparse pattern."""
    if pattern.granule not in ("token", "block"):
        raise ValueError(f"granule={pattern.granule!r} is not a granule; expected 'token' or 'block'")
    if pattern.sink < 0 or pattern.window < 1 or pattern.block < 1:
        raise ValueError(
            f"sink={pattern.sink}, window={pattern.window}, block={pattern.block}: expected sink >= 0, window >= 1 "
            "and block >= 1 tokens"
        )
    if pattern.granule == "block" and (pattern.window % pattern.block or pattern.sink % pattern.block):
        raise ValueError(
            f"sink={pattern.sink} and window={pattern.window} are not multiples of block={pattern.block}, as the "
            f"block granule needs; use sink={pattern.sink // pattern.block * pattern.block} and "
            f"window={max(1, pattern.window // pattern.block) * pattern.block}, or granule='token'"
        )
    check_scale(pattern.scale)
    if pattern.granule == "block" and pattern.block & (pattern.block - 1):
        raise ValueError(
            f"block={pattern.block} is not a power of two, as the block granule needs; use 64 or 128, or "
            "granule='token'"
        )
    if bits is not None and pattern.block not in (64, 128):
        raise ValueError(f"block={pattern.block} with block-sparse bits; their key blocks hold 64 or 128 keys")


def check_scale(scale: float | None) -> None:
    """The softmax scale; None is the usual one."""
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"scale={scale} is not positive and finite; the usual value is head_dim ** -0.5")


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Shapes, types and devices of the operands."""
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not belong together; expected [B, Sq, H, D] "
            "and twice [B, Sk, K, D] (transpose [B, H, S, D] views with .transpose(1, 2), no copy is made)"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} KV heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype for all three")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v lie on {q.device}, {k.device}, {v.device}; expected one device for all three")


def check_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Shapes, types and devices of the operands and of what the forward pass left."""
    check_tensors(q, k, v)
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected {q.dtype} "
                f"{list(q.shape)} on {q.device}, as q"
            )
    wanted, wide = (q.shape[0], q.shape[2], q.shape[1]), torch.promote_types(q.dtype, torch.float32)
    if tuple(lse.shape) != wanted or lse.dtype != wide or not lse.is_contiguous() or lse.device != q.device:
        raise ValueError(
            f"lse is {lse.dtype} {list(lse.shape)} on {lse.device}; expected contiguous {wide} {list(wanted)} on "
            f"{q.device}: pass what attention_forward returned"
        )
    if not out.is_contiguous():
        raise ValueError(f"out has strides {list(out.stride())}; expected contiguous, as attention_forward returns it")


def check_metadata(q: Tensor, k: Tensor, mode: Tensor, ranges: Ranges, bits: Tensor | None, block: int) -> None:
    """Modes, sample ranges and block bits."""
    kv_heads = k.shape[2]
    samples = mode.shape[0] if mode.dim() == 2 else -1
    if mode.dim() != 2 or mode.shape[1] != kv_heads or mode.dtype != torch.int32 or not mode.is_contiguous():
        raise ValueError(
            f"mode is {mode.dtype} {list(mode.shape)}, expected contiguous torch.int32 [N, {kv_heads}]; convert it "
            "with .int().contiguous()"
        )
    if samples > MAX_SAMPLES or kv_heads > MAX_KV_HEADS:
        raise ValueError(
            f"{samples} samples of {kv_heads} KV heads; one launch takes at most {MAX_SAMPLES} samples and "
            f"{MAX_KV_HEADS} KV heads, split the batch"
        )
    if ranges.row is None and samples != q.shape[0]:
        raise ValueError(
            f"mode describes {samples} samples but the batch has {q.shape[0]} rows; give row [N] (the batch row of "
            "every sample) when several samples share a row"
        )
    check_ranges(q, k, samples, ranges)
    if bits is not None:
        rows, words = -(-q.shape[1] // QUERY_BLOCK), -(-k.shape[1] // (32 * block))
        wanted = (samples, q.shape[2], rows, words)
        if bits.dim() == 4 and ranges.begin_q is not None and ranges.end_q is not None:
            rows = min(rows, max(1, bits.shape[2]))  # short samples need no more rows than they have query blocks
        if bits.dtype != torch.int32 or tuple(bits.shape) != (*wanted[:2], rows, words) or not bits.is_contiguous():
            raise ValueError(
                f"bits is {bits.dtype} {list(bits.shape)}, expected contiguous torch.int32 {list(wanted)}: samples, "
                f"query heads, query blocks of {QUERY_BLOCK} (those of the longest sample suffice, with begin_q and "
                f"end_q), words of 32 key blocks of {block}; build it with bits_from_mask or bits_from_indices"
            )
    _check_devices(q, {"mode": mode, "bits": bits})


def check_ranges(q: Tensor, k: Tensor, samples: int, ranges: Ranges) -> None:
    """Ranges of so many samples, in [B, Sq, H, D] and [B, Sk, K, D]."""
    if 0 < k.shape[1] < q.shape[1] and not any(values is not None for values in ranges):
        raise ValueError(
            f"{q.shape[1]} queries and {k.shape[1]} keys; expected at least as many keys, because the queries are the "
            "last positions of their sample: pass the cached keys too, or the samples' ranges"
        )
    for name, values in ranges.named().items():
        if values is None:
            continue
        if values.dtype != torch.int32 or tuple(values.shape) != (samples,) or not values.is_contiguous():
            raise ValueError(
                f"{name} is {values.dtype} {list(values.shape)}, expected contiguous torch.int32 [{samples}]"
            )
    _check_devices(q, ranges.named())


def _check_devices(q: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} lies on {tensor.device} and q on {q.device}; expected one device")


def check_cuda(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What the kernels need beyond the operator's contract."""
    if not is_half(q.dtype) or q.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"q is {q.dtype} with head dim {q.shape[3]}; the CUDA kernels take torch.bfloat16 or torch.float16 and "
            "head dim 64 or 128; run other shapes through PyTorch's attention"
        )
    if k.shape[1] > MAX_KEYS:
        raise ValueError(f"{k.shape[1]} keys; the CUDA kernels take at most {MAX_KEYS}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(3) != 1 or any(s % 8 for s in strides_of(tensor)):
            raise ValueError(
                f"{name} has strides {list(tensor.stride())}; expected a contiguous head dim and other strides that "
                f"are multiples of 8 elements; use {name}.contiguous()"
            )


def check_alignment(q: Tensor, k: Tensor, v: Tensor) -> None:
    """The only check that a new tensor of known shape and strides needs."""
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        starts = [x.data_ptr() % 16 for x in (q, k, v)]
        raise ValueError(
            f"q, k, v start {starts} bytes past a 16-byte boundary; expected 0: slice the tensor at a multiple of 8 "
            "elements, or use .clone()"
        )
