"""What the methods compute with: means of runs of tokens, and the heaviest blocks of a row.

Legend: h heads, M query and N key blocks, D head dim.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from elastic.kernels.block_choice import launch_covering, unsupported_covering


def run_means(x_hLD: Tensor, size: int) -> Tensor:
    """Means over runs of `size` tokens, [h, ceil(L / size), D] in fp32 (fp64 for fp64 input); the last run may be
    shorter. Sums are made in the wide type without a wide copy of the input.
    """
    wide, whole = torch.promote_types(x_hLD.dtype, torch.float32), x_hLD.shape[1] // size * size
    means = torch.unflatten(x_hLD[:, :whole], 1, (whole // size, size)).mean(2, dtype=wide)
    if whole == x_hLD.shape[1]:
        return means
    return torch.cat([means, x_hLD[:, whole:].mean(1, keepdim=True, dtype=wide)], dim=1)


def grouped_scores(q_hRD: Tensor, k_KCD: Tensor) -> Tensor:
    """Products [h, R, C] of every head's rows with its KV head's columns, summed in fp32 or wider. Operands of half
    precision are multiplied as they are on a GPU: their products are exact in fp32.
    """
    group = q_hRD.shape[0] // k_KCD.shape[0]
    rows_KGRD = torch.unflatten(q_hRD, 0, (-1, group)).flatten(1, 2)
    columns = k_KCD.transpose(1, 2)
    if rows_KGRD.dtype == columns.dtype and rows_KGRD.is_cuda and rows_KGRD.dtype.itemsize == 2:
        found = torch.bmm(rows_KGRD, columns, out_dtype=torch.float32)
    else:
        wide = torch.promote_types(torch.promote_types(q_hRD.dtype, k_KCD.dtype), torch.float32)
        found = rows_KGRD.to(wide) @ columns.to(wide)
    return torch.unflatten(found, 1, (group, -1)).flatten(0, 1)


def block_sums(x: Tensor, size: int) -> Tensor:
    """Sums over runs of `size` entries of the last dimension; the last run may be shorter."""
    return torch.unflatten(F.pad(x, (0, -x.shape[-1] % size)), -1, (-1, size)).sum(-1)


def heaviest(score_hMN: Tensor, forced_MN: Tensor, seen_MN: Tensor, total: int | Tensor) -> Tensor:
    """The forced blocks, and of the other seen blocks the heaviest until there are `total` in a row (the forced ones
    alone where they are more); of equal ones the first. A score that is not a number comes last.

    Args:
        score_hMN: of each block.
        forced_MN, seen_MN: [M, N], or [h, M, N].
        total: blocks of a row, a number or a tensor that broadcasts to [h, M].
    """
    left = (total - forced_MN.sum(-1)).clamp(min=0)
    free = seen_MN & ~forced_MN
    order = rank_order(score_hMN, free)
    rank = torch.arange(order.shape[-1], device=order.device)
    taken = rank < torch.minimum(left, free.sum(-1))[..., None]
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, taken.expand_as(order)) | forced_MN


def covering(mass_hn: Tensor, need_h: Tensor) -> tuple[Tensor, Tensor]:
    """The fewest entries of each row that hold `need`: all above the cut [h, 1], and so many that equal it, [h, 1].

    What sorting would tell, without sorting: floats of 0 or more are in the order of their bit patterns, so the cut is
    found by halving these.

    Args:
        mass_hn: fp32 or fp64, 0 or more.
        need_h: of each row; where it is more than the row's sum, everything is needed.
    """
    search = launch_covering if unsupported_covering(mass_hn) is None else _halve
    cut_h1, held_h1, equal_h1 = search(mass_hn, need_h)
    missing_h1 = torch.ceil((need_h[:, None] - held_h1) / cut_h1)
    return cut_h1, torch.minimum(missing_h1.nan_to_num(), equal_h1).long()


def _halve(mass_hn: Tensor, need_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The cut, the sum of what is above it and the number of entries that equal it, all [h, 1]."""
    bits, steps = (torch.int32, 31) if mass_hn.dtype == torch.float32 else (torch.int64, 63)
    need_h1, zero = need_h[:, None], mass_hn.new_zeros(())
    low = torch.zeros(mass_hn.shape[0], 1, dtype=bits, device=mass_hn.device)
    high = mass_hn.amax(-1, keepdim=True).view(bits) + 1
    for _ in range(steps):
        middle = low + (high - low) // 2
        enough = torch.where(mass_hn >= middle.view(mass_hn.dtype), mass_hn, zero).sum(-1, keepdim=True) >= need_h1
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    cut_h1 = low.view(mass_hn.dtype)
    held_h1 = torch.where(mass_hn > cut_h1, mass_hn, zero).sum(-1, keepdim=True)
    return cut_h1, held_h1, (mass_hn == cut_h1).sum(-1, keepdim=True)


def rank_order(score: Tensor, among: Tensor) -> Tensor:
    """Indices of the last dimension, those `among` the candidates first and by falling score."""
    low = torch.finfo(score.dtype).min
    clean = score.nan_to_num(nan=low, neginf=low)
    return clean.masked_fill(~among, float("-inf")).argsort(dim=-1, descending=True, stable=True)
