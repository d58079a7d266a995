"""`attention_backward`: dq, dk, dv of `attention_forward` under the same modes, samples and bits.

The operator is `torch.ops.elastic.attention_backward`: CUDA kernels on compute capability 9.0, the oracle on the
CPU. dQ is summed in fp32 in global memory, in the order in which key blocks finish, or in a fixed order when
`deterministic`; dK and dV are always summed in a fixed order. Legend as in `attention_forward`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic.kernels import jit, operators
from elastic.kernels.attention_forward import launch_key, tile_counter
from elastic.kernels.checks import check_alignment, check_backward, check_cuda, check_metadata, check_pattern
from elastic.kernels.devices import ROWS_THREADS, LaunchConfig, backward_config, capability_of, processors_of
from elastic.kernels.oracle import gradient_oracle
from elastic.kernels.params import (
    BACKWARD_TILE,
    KEY_BLOCK,
    WHOLE_ROWS,
    Pattern,
    Ranges,
    pack_addresses,
    pack_pointers,
    pack_sizes,
    pack_strides,
    strides_of,
)
from elastic.kernels.tensor_map import tensor_map

Gradients = tuple[Tensor, Tensor, Tensor]
_PLANS: dict[tuple[Any, ...], "PreparedBackward"] = {}
_MAX_PLANS = 4096


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Tensor, pattern: Pattern,
    ranges: Ranges = WHOLE_ROWS, bits: Tensor | None = None, *, deterministic: bool = False,
) -> Gradients:  # fmt: skip
    """Gradients of `attention_forward`'s output with respect to q, k and v.

    Args:
        grad_out: [B, Sq, H, D], in q's dtype, gradient of the output.
        out, lse: what `attention_forward` returned, with the sinks that it was given.
        deterministic: repeats give the same bits; key blocks then wait for each other when they add to dq.
        the others: as given to `attention_forward`.

    Returns:
        dq [B, Sq, H, D], dk and dv [B, Sk, K, D], contiguous, in q's dtype; 0 at tokens of no sample.

    Raises:
        ValueError: arguments that do not fit, with the way out; a GPU of another compute capability than 9.0.
    """
    if operators.is_plain_cuda(q):
        return _backward_cuda(grad_out, q, k, v, out, lse, mode, pattern, ranges, bits, deterministic)
    flat = operators.flatten(pattern, ranges, q.shape[-1])
    dq, dk, dv = torch.ops.elastic.attention_backward(grad_out, q, k, v, out, lse, mode, *flat, bits, deterministic)
    return dq, dk, dv


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


@dataclass(frozen=True)
class PreparedBackward:
    """What all calls with the same shapes, strides and pattern share: checked once, then looked up."""

    config: LaunchConfig
    kernels: tuple[Any, Any, Any]  # before the main one, the main one, after it
    sizes: bytes
    strides: tuple[tuple[int, int, int], ...]  # of q, k, v, grad_out
    tail: bytes
    row_tiles: int


def prepare_backward(
    grads: Gradients, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, mode: Tensor, pattern: Pattern,
    ranges: Ranges, bits: Tensor | None, debug: tuple[str, ...] = (),
) -> PreparedBackward:  # fmt: skip
    """Load the kernels, and pack everything but the addresses. `debug` serves the tests."""
    index, head_dim, samples = q.device.index, q.shape[3], mode.shape[0]
    row_tiles = row_tile_bound(q, samples, ranges)
    config = backward_config(
        processors_of(index), head_dim, samples, samples * -(-k.shape[1] // KEY_BLOCK) * k.shape[2]
    )
    main = jit.Variant(config.name, config.arch, head_dim, q.dtype == torch.bfloat16, debug)
    around = [rows_kernel(f"attention_backward_{entry}", q) for entry in ("prepare", "finish")]
    return PreparedBackward(
        config,
        (around[0], jit.load_kernel(main, index), around[1]),
        pack_sizes(q, k, v, grad_out, mode, bits, pattern),
        tuple(strides_of(x) for x in (q, k, v, grad_out)),
        pack_strides((out, *grads), row_tiles),
        row_tiles,
    )


def backward_into(
    grads: Gradients, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Tensor,
    ranges: Ranges, bits: Tensor | None, deterministic: bool, plan: PreparedBackward,
) -> None:  # fmt: skip
    """Run the three kernels on checked CUDA tensors, into tensors the caller owns."""
    device, index, config, heads = q.device, q.device.index, plan.config, q.shape[2]
    rows, tiles = BACKWARD_TILE // q.shape[3], heads * plan.row_tiles
    sums = torch.empty(tiles * BACKWARD_TILE, dtype=torch.float32, device=device)
    lse2_delta = torch.empty(2 * tiles * rows, dtype=torch.float32, device=device)
    turns = torch.empty(tiles * 2, dtype=torch.int32, device=device) if deterministic else None
    boxes = zip((q, k, v, grad_out), plan.strides, (rows, KEY_BLOCK, KEY_BLOCK, rows), strict=True)
    params = (
        b"".join(tensor_map(*box) for box in boxes)
        + pack_pointers(q, k, v, out, lse, mode, bits, ranges, tile_counter(device))
        + plan.sizes
        + pack_addresses(grad_out.data_ptr(), lse2_delta.data_ptr(), sums.data_ptr(),
                         0 if turns is None else turns.data_ptr(), *(x.data_ptr() for x in grads))
        + plan.tail
    )  # fmt: skip
    prepare, main, finish = plan.kernels
    jit.launch(prepare, (plan.row_tiles, heads), ROWS_THREADS, params, 0, index)
    jit.launch(main, (config.grid,), config.threads, params, config.shared_bytes, index)
    jit.launch(finish, (plan.row_tiles, heads), ROWS_THREADS, params, 0, index)


def readable(grad_out: Tensor) -> Tensor:
    """The gradient itself where the kernels can read it, else a contiguous copy: autograd may hand over any strides."""
    if grad_out.stride(3) == 1 and not any(s % 8 for s in strides_of(grad_out)) and grad_out.data_ptr() % 16 == 0:
        return grad_out
    return grad_out.clone(memory_format=torch.contiguous_format)


def rows_kernel(entry: str, q: Tensor) -> Any:
    """One of the kernels around the main one, for q's device, head dim and dtype."""
    capability = capability_of(q.device.index)
    arch = f"sm_{capability[0]}{capability[1]}"
    variant = jit.Variant("attention_backward_rows", arch, q.shape[3], q.dtype == torch.bfloat16, entry=entry)
    return jit.load_kernel(variant, q.device.index)


def _backward_cuda(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Tensor, pattern: Pattern,
    ranges: Ranges, bits: Tensor | None, deterministic: bool,
) -> Gradients:  # fmt: skip
    grad_out = readable(grad_out)
    key = launch_key(pattern, grad_out, q, k, v, out, lse, mode, *ranges, bits)
    plan = _PLANS.get(key)
    if plan is None:
        _check(grad_out, q, k, v, out, lse, mode, pattern, ranges, bits)
        check_cuda(q, k, v)
        capability = capability_of(q.device.index)
        if capability != (9, 0):
            raise ValueError(
                f"compute capability {capability[0]}.{capability[1]}; the backward kernels need 9.0 (Hopper), train "
                "with PyTorch's attention on this GPU"
            )
    check_alignment(q, k, v)
    make = torch.zeros if ranges.partial or ranges.begin_k is not None or ranges.end_k is not None else torch.empty
    dq, dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    grads = (dq, dk, dv)
    if plan is None:
        if len(_PLANS) >= _MAX_PLANS:
            _PLANS.clear()
        plan = _PLANS[key] = prepare_backward(grads, grad_out, q, k, v, out, mode, pattern, ranges, bits)
    backward_into(grads, grad_out, q, k, v, out, lse, mode, ranges, bits, deterministic, plan)
    return grads


def _backward_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Tensor, pattern: Pattern,
    ranges: Ranges, bits: Tensor | None, _deterministic: bool,
) -> Gradients:  # fmt: skip
    _check(grad_out, q, k, v, out, lse, mode, pattern, ranges, bits)
    return gradient_oracle(grad_out, q, k, v, mode, pattern, ranges, bits, lse=lse)


def _backward_fake(_grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Gradients:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


operators.define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor mode, "
    f"{operators.PATTERN}, {operators.RANGES}, Tensor? bits, bool deterministic) -> (Tensor, Tensor, Tensor)",
    cuda=operators.unflattened(_backward_cuda, 7),
    cpu=operators.unflattened(_backward_cpu, 7),
    fake=_backward_fake,
)
