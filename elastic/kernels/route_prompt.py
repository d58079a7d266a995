"""`route_prompt`: the route of one layer in one launch, from the gathered pre-RoPE keys to the modes of the head plan.

For inference on a GPU; its slow twin is `elastic.routing.router.AttentionRouter` with the pooling of
`elastic.model.layer_hooks`, which training and the CPU keep. Legend: N samples, P pooled tokens at either end of the
prompt, K KV heads, D head dim.
"""

import struct
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elastic.kernels import jit
from elastic.kernels.devices import capability_of, unsupported_reason

_ROWS, _CLUSTER, _THREADS = 8, 8, 256
_PARAMS = struct.Struct("<23Q5if")


class RoutedPrompt(NamedTuple):
    """What one launch leaves.

    Attributes:
        pooled: fp32 [N, K, D].
        first: fp32 [N, K, D]; sums of the prompt's first P keys, earlier turns included.
        logits: fp32 [N, K, 2].
        route: fp32 [N, K] in {0, 1}.
        mode: int32 [N, K], for the head plan.
    """

    pooled: Tensor
    first: Tensor
    logits: Tensor
    route: Tensor
    mode: Tensor


def route_prompt(
    keys: Tensor,
    weight: Tensor,
    count: Tensor,
    parameters: Sequence[Tensor],
    statistics: tuple[Tensor, Tensor, Tensor] | None,
    *,
    earlier: Tensor | None = None,
    offset: Tensor | None = None,
    bias: float = 0.0,
    modes: tuple[int, int] = (0, 1),
) -> RoutedPrompt:
    """Boundary pooling, standardised features, task MLP, router MLP, argmax and mode (docs/design.md section 3). No
    gradient.

    Args:
        keys: contiguous [N, 2P, K, D], bf16 or fp16, on a GPU: keys before RoPE, after the model's own k-norm, of the
            prompt's first P and last P tokens.
        weight: fp32 [N, 2P]; 1 where a key counts, else 0.
        count: fp32 [N]; tokens to divide by, at least 1.
        parameters: weight and bias of the five linear layers in their order, fp32, contiguous.
        statistics: mean and var, fp32 [K, D], and the number of samples they come from, fp64 []; None: raw features.
        earlier: fp32 [N, K, D]; sum of the first P keys pooled in an earlier turn.
        offset: fp32 [K, 2]; added to the logits.
        bias: added to the SA logit.
        modes: of route 0 and of route 1 in the head plan.

    Raises:
        ValueError: tensors of another shape, type or layout.
    """
    _check(keys, weight, count, parameters, statistics, earlier, offset)
    samples, slots, kv_heads, dim = keys.shape
    device, index = keys.device, keys.device.index
    shape = (samples, kv_heads)
    out = RoutedPrompt(
        torch.empty(*shape, dim, device=device),
        torch.empty(*shape, dim, device=device),
        torch.empty(*shape, 2, device=device),
        torch.empty(shape, device=device),
        torch.empty(shape, dtype=torch.int32, device=device),
    )
    if samples == 0:
        return out
    read = (keys, weight, count, earlier, *parameters, offset, *(statistics or (None, None, None)))
    addresses = (0 if x is None else x.data_ptr() for x in (*read, *out))
    params = _PARAMS.pack(*addresses, samples, kv_heads, slots, *modes, bias)
    kernel, parts = _kernel(index, dim, keys.dtype == torch.bfloat16)
    grid = parts * -(-samples * kv_heads // _ROWS)
    jit.launch(kernel, (grid,), _THREADS, params, _shared_bytes(dim, parts), index)
    return out


def _shared_bytes(head_dim: int, parts: int) -> int:
    """Activations of a tile of rows and, where a cluster shares the weights, one CTA's slice of them."""
    activations = 4 * (_ROWS + 1) * 11 * head_dim
    return activations + (0 if parts == 1 else 4 * 4 * (head_dim * head_dim // 2 + head_dim // 2))


@cache
def _kernel(index: int, head_dim: int, bf16: bool) -> tuple[Any, int]:
    """The kernel, and how many CTAs share a tile of rows: clusters came with compute capability 9.0."""
    major, minor = capability_of(index)
    parts = _CLUSTER if major >= 9 else 1
    variant = jit.Variant("route_prompt", f"sm_{major}{minor}", head_dim, bf16, (f"ELASTIC_PARTS={parts}",))
    return jit.load_kernel(variant, index), parts


def _check(
    keys: Tensor, weight: Tensor, count: Tensor, parameters: Sequence[Tensor],
    statistics: tuple[Tensor, Tensor, Tensor] | None, earlier: Tensor | None, offset: Tensor | None,
) -> None:  # fmt: skip
    if keys.dim() != 4 or keys.shape[1] % 2 or not keys.is_contiguous() or keys.data_ptr() % 16:
        raise ValueError(
            f"keys {list(keys.shape)} with strides {list(keys.stride())}; expected contiguous [N, 2P, K, D] that "
            "starts on a 16-byte boundary"
        )
    reason = unsupported_reason(keys.device, keys.dtype, keys.shape[3])
    if reason is not None:
        raise ValueError(f"the fused router cannot run here: {reason}; use elastic.routing.router.AttentionRouter")
    samples, slots, kv_heads, dim = keys.shape
    wide = 4 * dim
    shapes = [(wide, dim), (wide,), (dim, wide), (dim,)] * 2 + [(2, dim), (2,)]
    if len(parameters) != len(shapes):
        raise ValueError(f"{len(parameters)} parameters; expected {len(shapes)}: weight and bias of five linear layers")
    wanted = [("weight", weight, (samples, slots)), ("count", count, (samples,))]
    wanted += [(f"parameter {i}", x, shape) for i, (x, shape) in enumerate(zip(parameters, shapes, strict=True))]
    if earlier is not None:
        wanted.append(("earlier", earlier, (samples, kv_heads, dim)))
    if offset is not None:
        wanted.append(("offset", offset, (kv_heads, 2)))
    if statistics is not None:
        wanted += [("mean", statistics[0], (kv_heads, dim)), ("var", statistics[1], (kv_heads, dim))]
        if statistics[2].dtype != torch.float64 or statistics[2].numel() != 1 or statistics[2].device != keys.device:
            raise ValueError(f"the number of samples is {statistics[2]}; expected one fp64 number on {keys.device}")
    for name, tensor, shape in wanted:
        fits = tuple(tensor.shape) == shape and tensor.dtype == torch.float32 and tensor.is_contiguous()
        if not fits or tensor.device != keys.device or tensor.data_ptr() % 16:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; expected contiguous torch.float32 "
                f"{list(shape)} on {keys.device}, on a 16-byte boundary"
            )
