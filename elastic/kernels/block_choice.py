"""What FlexPrefill and FlashPrefill choose key blocks by, in Triton: scores that PyTorch would write and read again, a
gigabyte and more at 64K, stay on the multiprocessors.

Their readable twins are `elastic.attention.selection.flashprefill`, `flexprefill` and `pooling.covering`, which choose
between the two by the conditions here. Legend: H query heads, K KV heads, L queries, S keys, D head dim, M query and N
key blocks.
"""

import torch
from torch import Tensor

from elastic.kernels.checks import HEAD_DIMS
from elastic.kernels.devices import on_device
from elastic.kernels.params import QUERY_BLOCK, is_half
from elastic.kernels.triton_host import triton_reason

BLOCKS = (64, 128)  # of keys
_TILE = 128  # keys that the lines' programs take at once
_RUNS, _RUN_TILES = 32, 16  # at most so many programs of a head share the keys, and each takes at least so many tiles


def unsupported_choice(q_HLD: Tensor, k_KSD: Tensor, block: int) -> str | None:
    """Why the kernels do not score these queries and keys; None if they do."""
    if q_HLD.device.type != "cuda" or not is_half(q_HLD.dtype) or k_KSD.dtype != q_HLD.dtype:
        return f"the kernels take bf16 and fp16 on NVIDIA GPUs, not {q_HLD.dtype} on {q_HLD.device.type}"
    if q_HLD.shape[2] not in HEAD_DIMS or block not in BLOCKS:
        return f"head dim {q_HLD.shape[2]}, blocks of {block}: the kernels take head dims and blocks of 64 and 128"
    return triton_reason()


def unsupported_covering(mass_hn: Tensor) -> str | None:
    """Why the kernel does not search these rows; None if it does."""
    if mass_hn.device.type != "cuda" or mass_hn.dtype != torch.float32:
        return f"the kernel takes fp32 on NVIDIA GPUs, not {mass_hn.dtype} on {mass_hn.device.type}"
    return triton_reason()


def launch_block_scores(q_HLD: Tensor, k_KND: Tensor, past: int, block: int, scored: int, scale: float) -> Tensor:
    """log of the sum of exp(scale q . k[n]) over the queries of a query block that see the whole of key block n.

    Args:
        q_HLD: queries.
        k_KND: the key blocks' mean keys, of the same dtype.
        past: position of the first query.
        block: tokens of a key block; a query block has 128.
        scored: whole query blocks from the first on, which are scored.
        scale: softmax scale.

    Returns:
        fp32 [H, M, N]; -inf where no query sees the whole of a key block, and for query blocks that are not scored.
    """
    from elastic.kernels import block_choice_triton as kernels

    q_HLD, k_KND = _in_rows(q_HLD), k_KND.contiguous()
    (heads, queries, dim), (kv_heads, columns, _) = q_HLD.shape, k_KND.shape
    log_HMN = torch.empty(heads, -(-queries // QUERY_BLOCK), columns, dtype=torch.float32, device=q_HLD.device)
    with on_device(q_HLD):
        kernels.block_scores[log_HMN.shape[:2]](
            q_HLD, k_KND, log_HMN, past, scored, columns, heads // kv_heads, *q_HLD.stride()[:2], _log2(scale),
            BLOCK=block, ROWS=QUERY_BLOCK, TILE=64, D=dim, num_warps=4, num_stages=2,
        )  # fmt: skip
    return log_HMN


def launch_lines(q_HRD: Tensor, k_KSD: Tensor, scale: float) -> Tensor:
    """Attention of the last queries, at most 128, by key and by distance (0 first), their mean: fp32 [2, H, S]."""
    from elastic.kernels import block_choice_triton as kernels

    q_HRD, k_KSD = _in_rows(q_HRD), _in_rows(k_KSD)
    (heads, rows, dim), (kv_heads, keys, _) = q_HRD.shape, k_KSD.shape
    tiles = -(-keys // _TILE)
    of_run = max(_RUN_TILES, -(-tiles // _RUNS))
    padded = 64 if rows <= 64 else 128
    lse_HPR = torch.empty(heads, -(-tiles // of_run), padded, dtype=torch.float32, device=q_HRD.device)
    lines_3HS = torch.zeros(3, heads, keys, dtype=torch.float32, device=q_HRD.device)
    sizes = (heads // kv_heads, *q_HRD.stride()[:2], *k_KSD.stride()[:2], _log2(scale))
    choices = {"ROWS": padded, "TILE": _TILE, "D": dim, "num_warps": 8, "num_stages": 2}
    two_fit = {"STEP": 64, "maxnreg": 128}  # programs on a multiprocessor
    with on_device(q_HRD):
        kernels.partial_lse[lse_HPR.shape[:2]](q_HRD, k_KSD, lse_HPR, rows, keys, of_run * _TILE, *sizes, **choices)
        lse_HR = torch.logsumexp(lse_HPR, 1)
        kernels.line_shares[heads, tiles](q_HRD, k_KSD, lse_HR, lines_3HS, rows, keys, *sizes, **choices, **two_fit)
    lines_3HS[1] += lines_3HS[2]
    return lines_3HS[:2]


def launch_covering(mass_hn: Tensor, need_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of fp32 masses, the cut, the sum of the entries above it, in fp64, and the number of those that equal
    it, all [h, 1]: those of at least the cut are the fewest that hold `need`.
    """
    from elastic.kernels import covering_triton as kernels

    mass_hn = mass_hn.contiguous()
    cut, held, equal = (
        torch.empty(mass_hn.shape[0], 1, dtype=dtype, device=mass_hn.device)
        for dtype in (torch.float32, torch.float64, torch.int32)
    )
    with on_device(mass_hn):
        kernels.covering[(mass_hn.shape[0],)](
            mass_hn, need_h, cut, held, equal, mass_hn.shape[1], BLOCK=8192, RUN=32, num_warps=32
        )
    return cut, held, equal


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _log2(scale: float) -> float:
    """The scale of scores whose exponentials are powers of two."""
    return scale / 0.6931471805599453
