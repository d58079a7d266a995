"""The readable twin of the paged kernels: each request's keys and values are gathered from its pages, and the oracle of
contiguous ones runs on them. Runs on any device, in fp32 or wider; copies lengths and page numbers to the host.

Legend: N pages of T tokens, K KV heads, D head dim, B requests, P entries of a request's row, S queries, H query heads.
"""

from itertools import pairwise

import torch
from torch import Tensor

from elastic.kernels.oracle import attention_oracle
from elastic.kernels.params import WHOLE_ROWS, Pattern


def gather_pages(pool: Tensor, row: Tensor, length: int) -> Tensor:
    """The first `length` tokens [length, K, D] of a request whose row of the table is [P].

    Raises:
        ValueError: a row too short, or a number outside of the pool.
    """
    pages, size = pool.shape[:2]
    needed = row[: -(-length // size)]
    if needed.shape[0] * size < length:
        raise ValueError(f"a request of {length} tokens has {row.shape[0]} pages of {size} in its row of the table")
    if length and (needed.min() < 0 or needed.max() >= pages):
        raise ValueError(
            f"a request's row names pages {int(needed.min())} to {int(needed.max())}; the pools hold 0 to {pages - 1}"
        )
    return pool[needed.long()].flatten(0, 1)[:length]


def paged_oracle(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, starts: Tensor, lengths: Tensor, mode: Tensor,
    pattern: Pattern, compute: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [S, H, D] in q's dtype and LSE [H, S]; the arguments are those of `paged_forward`.

    Args:
        compute: element type of every intermediate; default fp32, or fp64 for fp64 input.

    Raises:
        ValueError: starts that do not divide the queries, or a request's pages as `gather_pages` refuses them.
    """
    bounds, sizes = starts.tolist(), lengths.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[0] or bounds != sorted(bounds):
        raise ValueError(
            f"starts are {bounds}; expected rising numbers from 0 to the {q.shape[0]} queries: where those "
            "of each request begin"
        )
    wide = compute or torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=wide, device=q.device)
    for n, ((begin, end), length) in enumerate(zip(pairwise(bounds), sizes, strict=True)):
        if begin == end:
            continue
        k, v = (gather_pages(pool, table[n], max(0, length))[None] for pool in (keys, values))
        found = attention_oracle(q[None, begin:end], k, v, mode[n : n + 1], pattern, WHOLE_ROWS, None, compute)
        out[begin:end], lse[:, begin:end] = found[0][0], found[1][0]
    return out, lse
