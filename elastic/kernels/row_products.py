"""Products of one token with weights, which take as long as reading the weights does.

A decode step of one token spends most of its time here. Libraries read small weights at 60 to 80 % of the memory's
speed, these kernels at 80 to 99 %: a program for each row of a weight, several weights in one launch, and what follows
a product (bias, residual, gated activation) in the same kernel. Everything runs in PyTorch elsewhere.
Legend: F rows and K columns of a weight, which is [F, K] as in `nn.Linear`.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._triton import has_triton

from elastic.kernels.params import is_half

_BLOCK = 2048  # columns that a program of 8 warps takes at once: 16 bytes a thread
_MOST = 3  # weights of a launch


def unsupported_rows(x: Tensor, *weights: Tensor) -> str | None:
    """Why the kernels do not take these operands; None if they do."""
    if x.device.type != "cuda" or not is_half(x.dtype):
        return f"the kernels take bf16 and fp16 on NVIDIA GPUs, not {x.dtype} on {x.device.type}"
    if any(w.dtype != x.dtype or w.device != x.device or not w.is_contiguous() for w in weights):
        return "weights lie elsewhere, in another dtype or not in rows"
    if x.shape[-1] % 8 or any(tensor.data_ptr() % 16 for tensor in (x, *weights)):
        return "rows do not start at multiples of 16 bytes"
    return None if _triton() else "Triton does not run on this GPU"


@cache
def _triton() -> bool:
    return bool(has_triton())


def row_products(x: Tensor, weights: Sequence[Tensor], added: Sequence[Tensor | None]) -> list[Tensor]:
    """The products x W^T of one token with up to three weights.

    Args:
        x: [1, K].
        weights: each [F, K].
        added: for each, what is added to its product before it is rounded: a bias or residual, [F] or [1, F], or None.

    Returns:
        Each [1, F], in x's dtype.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(x, weights)
    if not 0 < len(weights) == len(added) <= _MOST:
        raise ValueError(f"{len(weights)} weights and {len(added)} additions were given; expected 1 to {_MOST} of both")
    if unsupported_rows(x, *weights) is not None:
        return [_plain(x, weight, more) for weight, more in zip(weights, added, strict=True)]
    return launch_products(x, weights, added)


def row_gated(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(x gate^T) (x up^T) of one token: [1, K] with two weights [F, K] -> [1, F].

    Args:
        activation: `silu`, or `gelu` with the tanh approximation.

    Raises:
        ValueError: shapes that do not belong together, or another activation.
    """
    _check(x, (gate, up))
    if activation not in ("silu", "gelu") or gate.shape != up.shape:
        raise ValueError(
            f"activation {activation!r} over weights {list(gate.shape)} and {list(up.shape)}; expected silu or gelu "
            "over two of one shape"
        )
    if unsupported_rows(x, gate, up) is None:
        return launch_gated(x, gate, up, activation)
    one, two = functional.linear(x, gate), functional.linear(x, up)
    return (functional.silu(one) if activation == "silu" else functional.gelu(one, approximate="tanh")) * two


def _plain(x: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
    """The readable twin."""
    found = functional.linear(x, weight)
    return found if added is None else found + added


def _check(x: Tensor, weights: Sequence[Tensor]) -> None:
    if x.dim() != 2 or x.shape[0] != 1 or any(w.dim() != 2 or w.shape[1] != x.shape[1] for w in weights):
        shapes = ", ".join(str(list(w.shape)) for w in weights)
        raise ValueError(f"x {list(x.shape)} and weights {shapes} do not belong together; expected [1, K] and [F, K]")


def launch_products(x: Tensor, weights: Sequence[Tensor], added: Sequence[Tensor | None]) -> list[Tensor]:
    """Run the kernel on checked operands; the products are views of one tensor."""
    from elastic.kernels import row_products_triton

    sizes = [weight.shape[0] for weight in weights]
    y = torch.empty(1, sum(sizes), dtype=x.dtype, device=x.device)
    places = [*weights, *[weights[0]] * (_MOST - len(weights))]
    more = [*added, *[None] * (_MOST - len(added))]
    ends = (sizes[0], sum(sizes[:2]))
    operands = (x, y, *places, *(x if one is None else one.contiguous() for one in more), *ends)
    with _on(x):
        row_products_triton.products[(sum(sizes),)](*operands, *(one is not None for one in more), **_shape(x))
    return list(y.split(sizes, 1))


def launch_gated(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Run the kernel on checked operands."""
    from elastic.kernels import row_products_triton

    y = torch.empty(1, gate.shape[0], dtype=x.dtype, device=x.device)
    with _on(x):
        row_products_triton.gated[(gate.shape[0],)](x, y, gate, up, GELU=activation == "gelu", **_shape(x))
    return y


def _on(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else torch.no_grad()


def _shape(x: Tensor) -> dict[str, int]:
    width = x.shape[1]
    block = min(_BLOCK, 1 << (width - 1).bit_length())
    return {"K": width, "BLOCK": block, "num_warps": max(1, block // 256)}
