"""Products of a few tokens with weights, which take as long as reading the weights does.

A decode step spends most of its time here. cuBLAS reads a layer's weights one after the other, at 40 to 74 % of the
memory's speed (H200, widths 4096 and 12288); these kernels, in Triton, read several in one launch, at 79 to 97 % for
one token and 60 to 79 % for up to 16, with what follows a product (bias, residual, gated activation) in the same
kernel. Everything runs in PyTorch elsewhere.
Legend: T tokens, F rows and K columns of a weight, which is [F, K] as in `nn.Linear`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from elastic.kernels.devices import on_device, shared_limit
from elastic.kernels.params import is_half
from elastic.kernels.triton_host import triton_reason

MOST_TOKENS = 16  # at 64 cuBLAS is faster
_WEIGHTS = 3  # of a launch
_LINE = 2048  # columns that the program of one token takes at once: 16 bytes for each thread of 8 warps
_TILE_COLUMNS = 128  # that the program of several tokens takes at least


def unsupported_tokens(x: Tensor, *weights: Tensor) -> str | None:
    """Why the kernels do not take these operands; None if they do."""
    tokens, width = x.shape[:-1].numel(), x.shape[-1]
    if x.device.type != "cuda" or not is_half(x.dtype):
        return f"the kernels take bf16 and fp16 on NVIDIA GPUs, not {x.dtype} on {x.device.type}"
    if tokens > MOST_TOKENS:
        return f"{tokens} tokens are more than {MOST_TOKENS}, from where on reading weights is not what takes the time"
    if any(w.dtype != x.dtype or w.device != x.device or not w.is_contiguous() for w in weights):
        return "weights lie elsewhere, in another dtype or not in rows"
    if width % (8 if tokens == 1 else _TILE_COLUMNS) or any(tensor.data_ptr() % 16 for tensor in (x, *weights)):
        return f"rows of {width} numbers do not fit, of which several tokens need a multiple of {_TILE_COLUMNS}"
    return triton_reason()


def token_products(x: Tensor, weights: Sequence[Tensor], added: Sequence[Tensor | None]) -> list[Tensor]:
    """The products x W^T of a few tokens with up to three weights.

    Args:
        x: [T, K].
        weights: each [F, K].
        added: for each, what is added to its product before it is rounded: a bias [F], a residual [T, F], or None.

    Returns:
        Each [T, F], in x's dtype.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(x, weights)
    if not 0 < len(weights) == len(added) <= _WEIGHTS:
        raise ValueError(
            f"{len(weights)} weights and {len(added)} additions were given; expected 1 to {_WEIGHTS} of both"
        )
    if unsupported_tokens(x, *weights) is not None:
        return [_plain(x, weight, more) for weight, more in zip(weights, added, strict=True)]
    return launch_products(x, weights, added)


def token_gated(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(x gate^T) (x up^T) of a few tokens: [T, K] with two weights [F, K] -> [T, F].

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
    if unsupported_tokens(x, gate, up) is None:
        return launch_gated(x, gate, up, activation)
    one, two = functional.linear(x, gate), functional.linear(x, up)
    return (functional.silu(one) if activation == "silu" else functional.gelu(one, approximate="tanh")) * two


def _plain(x: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
    """The readable twin."""
    found = functional.linear(x, weight)
    return found if added is None else found + added


def _check(x: Tensor, weights: Sequence[Tensor]) -> None:
    if x.dim() != 2 or any(w.dim() != 2 or w.shape[1] != x.shape[1] for w in weights):
        shapes = ", ".join(str(list(w.shape)) for w in weights)
        raise ValueError(f"x {list(x.shape)} and weights {shapes} do not belong together; expected [T, K] and [F, K]")


def launch_products(x: Tensor, weights: Sequence[Tensor], added: Sequence[Tensor | None]) -> list[Tensor]:
    """Run the kernel on checked operands."""
    from elastic.kernels import token_products_triton as kernels

    x, more = x.contiguous(), [None if one is None else one.contiguous() for one in added]
    sizes = [weight.shape[0] for weight in weights]
    found = [torch.empty(x.shape[0], size, dtype=x.dtype, device=x.device) for size in sizes]
    kinds = [0 if one is None else one.dim() for one in more]
    operands = (x, *_three(found), *_three(weights), *_three([x if one is None else one for one in more]))
    flags = dict(zip(("ADD0", "ADD1", "ADD2"), _three(kinds), strict=True))
    with on_device(x):
        if x.shape[0] == 1:
            kernels.row_products[(sum(sizes),)](*operands, *_ends(sizes), **flags, **_lines(x))
        else:
            choices = _tiles(x, 64 if sum(sizes) > 4096 else 32)
            tiles = [-(-size // choices["ROWS"]) for size in sizes]
            ends = (*_ends(tiles), x.shape[0], *_three(sizes))
            kernels.tile_products[(sum(tiles),)](*operands, *ends, **flags, **choices)
    return found


def launch_gated(x: Tensor, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Run the kernel on checked operands."""
    from elastic.kernels import token_products_triton as kernels

    x, rows = x.contiguous(), gate.shape[0]
    y, gelu = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device), activation == "gelu"
    with on_device(x):
        if x.shape[0] == 1:
            kernels.row_gated[(rows,)](x, y, gate, up, GELU=gelu, **_lines(x))
        else:
            choices = _tiles(x, 32, 2)
            grid = (-(-rows // choices["ROWS"]),)
            kernels.tile_gated[grid](x, y, gate, up, x.shape[0], rows, GELU=gelu, **choices)
    return y


def _three(found: Sequence[Any]) -> list[Any]:
    """For the launch, which has room for three; the grid ends with those that are there."""
    return [*found, *[found[0]] * (_WEIGHTS - len(found))]


def _ends(sizes: Sequence[int]) -> tuple[int, int]:
    return sizes[0], sum(sizes[:2])


def _lines(x: Tensor) -> dict[str, int]:
    """Launch choices of one token."""
    block = min(_LINE, 1 << (x.shape[1] - 1).bit_length())
    return {"K": x.shape[1], "BLOCK": block, "num_warps": max(1, block // 256)}


def _tiles(x: Tensor, rows: int, weights: int = 1) -> dict[str, int]:
    """Launch choices of several tokens, for programs that read so many rows of so many weights; as many stages as
    shared memory has room for, in which the compiler may hold each one twice.
    """
    tokens, width = max(16, 1 << (x.shape[0] - 1).bit_length()), x.shape[1]
    wide = width > 8192 and width % 256 == 0
    block, most = (256, 4) if wide else (_TILE_COLUMNS, 5)
    room = shared_limit(x.device.index) if x.is_cuda else 0
    stage = (weights * rows + tokens) * block * x.element_size()
    stages = max(2, min(most, room // (2 * stage)))
    return {"K": width, "TOKENS": tokens, "ROWS": rows, "BLOCK": block, "STAGES": stages, "num_warps": 4}
