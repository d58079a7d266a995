"""`attention_backward`: dq, dk, dv of `attention_forward` under the same modes, samples and bits.

The operator is `torch.ops.elastic.attention_backward`: CUDA kernels on compute capability 9.0, the oracle on the
CPU. dQ is summed in fp32 in global memory, in the order in which key blocks finish, or in a fixed order when
`deterministic`; dK and dV are always summed in a fixed order. Legend as in `block_sparse`.
"""

from typing import Any

import torch
from torch import Tensor

from elastic.kernels import jit
from elastic.kernels.block_sparse import tile_counter
from elastic.kernels.checks import check_alignment, check_backward, check_cuda, check_metadata, check_pattern
from elastic.kernels.devices import backward_config, device_facts
from elastic.kernels.oracle import gradient_oracle
from elastic.kernels.params import (
    BACKWARD_TILE,
    Pattern,
    Ranges,
    pack_backward,
    pack_pointers,
    pack_sizes,
    strides_of,
)
from elastic.kernels.tensor_map import tensor_map

_Optional = Tensor | None
_KEY_BLOCK = 128


def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mode: Tensor,
    *,
    sink: int,
    window: int,
    granule: str = "token",
    block: int = 128,
    scale: float | None = None,
    begin_q: Tensor | None = None,
    end_q: Tensor | None = None,
    begin_k: Tensor | None = None,
    end_k: Tensor | None = None,
    row: Tensor | None = None,
    bits: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_forward`'s output with respect to q, k and v.

    Samples must share neither query rows nor keys.

    Args:
        grad_out: [B, Sq, H, D], in q's dtype, gradient of the output.
        out, lse: what `attention_forward` returned.
        deterministic: repeats give the same bits; key blocks then wait for each other when they add to dq.
        the others: as given to `attention_forward`.

    Returns:
        dq [B, Sq, H, D], dk and dv [B, Sk, K, D], contiguous, in q's dtype; 0 at tokens of no sample.

    Raises:
        ValueError: arguments that do not fit, with the way out; a GPU of another compute capability than 9.0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    spans = (begin_q, end_q, begin_k, end_k, row)
    return torch.ops.elastic.attention_backward(
        grad_out, q, k, v, out, lse, mode, sink, window, granule, block, scale, *spans, bits, deterministic
    )


def _check(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Tensor, pattern: Pattern,
    ranges: Ranges, bits: Tensor | None,
) -> None:  # fmt: skip
    check_backward(grad_out, q, k, v, out, lse)
    check_pattern(pattern, bits)
    check_metadata(q, k, mode, ranges, bits, pattern.block)


def row_tile_bound(q: Tensor, samples: int, ranges: Ranges) -> int:
    """Upper bound of the launch's row tiles: the samples' own lengths are known on the device only."""
    rows = BACKWARD_TILE // q.shape[3]
    whole = q.shape[0] * -(-q.shape[1] // rows)
    return whole + samples if ranges.partial else whole


def backward_into(
    grads: tuple[Tensor, Tensor, Tensor], grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    mode: Tensor, pattern: Pattern, ranges: Ranges, bits: Tensor | None, deterministic: bool,
    debug: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Run the three kernels on checked CUDA tensors, into tensors the caller owns. `debug` serves the tests."""
    device, (dq, dk, dv) = q.device, grads
    index, head_dim, heads, samples = device.index, q.shape[3], q.shape[2], mode.shape[0]
    _, processors = device_facts(index)
    rows = BACKWARD_TILE // head_dim
    row_tiles = row_tile_bound(q, samples, ranges)
    sums = torch.empty(heads * row_tiles * BACKWARD_TILE, dtype=torch.float32, device=device)
    facts = torch.empty(2 * heads * row_tiles * rows, dtype=torch.float32, device=device)
    turns = torch.empty(heads * row_tiles * 2, dtype=torch.int32, device=device) if deterministic else None
    strides = [strides_of(x) for x in (q, k, v, grad_out)]
    boxes = (rows, _KEY_BLOCK, _KEY_BLOCK, rows)
    maps = b"".join(tensor_map(x, s, n) for x, s, n in zip((q, k, v, grad_out), strides, boxes, strict=True))
    params = (
        maps
        + pack_pointers(q, k, v, out, lse, mode, bits, ranges, tile_counter(device))
        + pack_sizes(q, k, v, grad_out, mode, bits, pattern)
        + pack_backward(
            (grad_out.data_ptr(), facts.data_ptr(), sums.data_ptr(), 0 if turns is None else turns.data_ptr(),
             dq.data_ptr(), dk.data_ptr(), dv.data_ptr()),
            (out, dq, dk, dv), row_tiles,
        )
    )  # fmt: skip
    config = backward_config(processors, head_dim, samples, samples * -(-k.shape[1] // _KEY_BLOCK) * k.shape[2])
    main = jit.Variant(config.name, config.arch, head_dim, q.dtype == torch.bfloat16, debug)
    jit.launch(rows_kernel("attention_backward_prepare", q), (row_tiles, heads), 256, params, 0, index)
    jit.launch(jit.load_kernel(main, index), (config.grid,), config.threads, params, config.shared_bytes, index)
    jit.launch(rows_kernel("attention_backward_finish", q), (row_tiles, heads), 256, params, 0, index)


def readable(grad_out: Tensor) -> Tensor:
    """The gradient itself where the kernels can read it, else a contiguous copy: autograd may hand over any strides."""
    if grad_out.stride(3) == 1 and not any(s % 8 for s in strides_of(grad_out)) and grad_out.data_ptr() % 16 == 0:
        return grad_out
    return grad_out.clone(memory_format=torch.contiguous_format)


def rows_kernel(entry: str, q: Tensor) -> Any:
    """One of the kernels around the main one, for q's device, head dim and dtype."""
    capability, _ = device_facts(q.device.index)
    arch = f"sm_{capability[0]}{capability[1]}"
    variant = jit.Variant("attention_backward_rows", arch, q.shape[3], q.dtype == torch.bfloat16, entry=entry)
    return jit.load_kernel(variant, q.device.index)


def _backward_cuda(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Tensor, sink: int, window: int,
    granule: str, block: int, scale: float, begin_q: _Optional, end_q: _Optional, begin_k: _Optional,
    end_k: _Optional, row: _Optional, bits: _Optional, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pattern, ranges = Pattern(sink, window, granule, block, scale), Ranges(begin_q, end_q, begin_k, end_k, row)
    _check(grad_out, q, k, v, out, lse, mode, pattern, ranges, bits)
    check_cuda(q, k, v)
    capability, _ = device_facts(q.device.index)
    if capability != (9, 0):
        raise ValueError(
            f"compute capability {capability[0]}.{capability[1]}; the backward kernels need 9.0 (Hopper), train with "
            "PyTorch's attention on this GPU"
        )
    grad_out = readable(grad_out)
    check_alignment(q, k, v)
    make = torch.zeros if ranges.partial or ranges.begin_k is not None or ranges.end_k is not None else torch.empty
    dq, dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    backward_into((dq, dk, dv), grad_out, q, k, v, out, lse, mode, pattern, ranges, bits, deterministic)
    return dq, dk, dv


def _backward_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Tensor, sink: int, window: int,
    granule: str, block: int, scale: float, begin_q: _Optional, end_q: _Optional, begin_k: _Optional,
    end_k: _Optional, row: _Optional, bits: _Optional, _deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    pattern, ranges = Pattern(sink, window, granule, block, scale), Ranges(begin_q, end_q, begin_k, end_k, row)
    _check(grad_out, q, k, v, out, lse, mode, pattern, ranges, bits)
    return gradient_oracle(grad_out, q, k, v, mode, pattern, ranges, bits)


def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))  # type: ignore[return-value]


_library = torch.library.Library("elastic", "FRAGMENT")
_library.define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor mode, int sink, "
    "int window, str granule, int block, float scale, Tensor? begin_q, Tensor? end_q, Tensor? begin_k, Tensor? end_k, "
    "Tensor? row, Tensor? bits, bool deterministic) -> (Tensor, Tensor, Tensor)"
)
_library.impl("attention_backward", _backward_cuda, "CUDA")
_library.impl("attention_backward", _backward_cpu, "CPU")
torch.library.register_fake("elastic::attention_backward", _backward_fake, lib=_library)
