"""Keys and values of requests in an engine's pages, and attention over them: by the kernels on a GPU, a step's requests
at once; elsewhere request by request in PyTorch.

Legend: N pages, K KV heads, T tokens of a page, D head dim, H query heads, Q queries, h KV heads of one mode; of a step
B requests, S queries, P entries of a row of the table.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from elastic.attention.torch_path import streaming
from elastic.config import SparseConfig
from elastic.kernels import Pattern, paged_decode, paged_forward
from elastic.visibility import lower_bound

_CHUNK = 512  # queries whose mask exists at a time


@dataclass(frozen=True)
class Pages:
    """A request's keys and values up to its last token.

    Attributes:
        cache_NKTE: the layer's pages, E = 2 D: a token's key, then its value.
        page: int64, the request's pages in order.
        length: tokens.
    """

    cache_NKTE: Tensor
    page: Tensor
    length: int

    def read(self, heads: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens (default: all), [h, length, D] each."""
        length = self.length if length is None else length
        page = self.page[: -(-length // self.cache_NKTE.shape[2])]
        found = self.cache_NKTE[page[:, None], heads].transpose(0, 1).flatten(1, 2)[:, :length]
        return _halves(found)

    def read_at(self, heads: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of single tokens, [h, positions, D] each."""
        size = self.cache_NKTE.shape[2]
        page, slot = self.page[position // size], position % size
        return _halves(self.cache_NKTE[page, heads[:, None], slot])


def _halves(found_hSE: Tensor) -> tuple[Tensor, Tensor]:
    k, v = found_hSE.chunk(2, dim=-1)
    return k, v


def write_pages(cache_NKTE: Tensor, k_SKD: Tensor, v_SKD: Tensor, slot_S: Tensor) -> None:
    """Put new tokens into the pages; `slot_S` says where, as page * T + place, below 0 for padding."""
    tokens, size = slot_S.shape[0], cache_NKTE.shape[2]
    held = slot_S >= 0
    slot = slot_S[held].long()
    both = torch.cat([k_SKD[:tokens], v_SKD[:tokens]], dim=-1)[held]
    cache_NKTE[slot // size, :, slot % size] = both.to(cache_NKTE.dtype)


@dataclass(frozen=True)
class PagedStep:
    """What a step's layers share, int32 on the cache's device.

    Attributes:
        table: [B, P], each request's pages in order.
        starts: [B + 1], where each request's queries begin, and their number S.
        lengths: [B], each request's tokens with the new ones.
        singles: of the first requests, how many have one query each (an engine puts them first): they run as decoding.
    """

    table: Tensor
    starts: Tensor
    lengths: Tensor
    singles: int


def attend_step(
    q_SHD: Tensor, cache_NKTE: Tensor, step: PagedStep, mode_BK: Tensor, sparse: SparseConfig, scale: float
) -> Tensor:
    """Attention of all new tokens of a step, each the last of its request.

    On a GPU one launch for single queries and one for all others, which read `step` and `mode_BK` there; elsewhere
    `attend_pages`.

    Args:
        mode_BK: int32, 1 where a KV head runs streaming, else 0.

    Returns:
        [S, H, D].

    Raises:
        ValueError: a GPU's tensors that the kernels do not take, with the way out.
    """
    if q_SHD.is_cuda:
        return attend_launches(q_SHD, cache_NKTE, step, mode_BK, sparse, scale)
    output, bounds = torch.empty_like(q_SHD), step.starts.tolist()
    for n, (length, modes) in enumerate(zip(step.lengths.tolist(), mode_BK.tolist(), strict=True)):
        queries = slice(bounds[n], bounds[n + 1])
        if queries.start < queries.stop:
            pages = Pages(cache_NKTE, step.table[n].long(), length)
            output[queries] = attend_pages(q_SHD[queries], pages, [bool(mode) for mode in modes], sparse, scale)
    return output


def attend_launches(
    q_SHD: Tensor, cache_NKTE: Tensor, step: PagedStep, mode_BK: Tensor, sparse: SparseConfig, scale: float
) -> Tensor:
    """`attend_step` by the paged operators, whatever the device."""
    keys, values = _halves(cache_NKTE.transpose(1, 2))
    pattern = Pattern(sparse.sink, sparse.window, sparse.granule, sparse.block, scale)
    n, parts = step.singles, []
    if n:
        parts.append(paged_decode(q_SHD[:n], keys, values, step.table[:n], step.lengths[:n], mode_BK[:n], pattern))
    if n < mode_BK.shape[0]:
        rest = step.table[n:], step.starts[n:] - n, step.lengths[n:], mode_BK[n:]
        parts.append(paged_forward(q_SHD[n:], keys, values, *rest, pattern)[0])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_pages(q_QHD: Tensor, pages: Pages, sparse_K: list[bool], sparse: SparseConfig, scale: float) -> Tensor:
    """Attention of a request's last Q tokens, the heads of each mode at once.

    Args:
        sparse_K: KV heads that run streaming; the others see every key before them.

    Returns:
        [Q, H, D].
    """
    output = torch.empty_like(q_QHD)
    by_head = output.unflatten(1, (len(sparse_K), -1))
    for mode in sorted(set(sparse_K)):
        heads = torch.tensor([head for head, other in enumerate(sparse_K) if other == mode])
        q_hHD = q_QHD.unflatten(1, (len(sparse_K), -1))[:, heads].flatten(1, 2).transpose(0, 1)
        attended = _streaming(q_hHD, pages, heads, sparse, scale) if mode else _full(q_hHD, pages, heads, scale)
        by_head[:, heads] = attended.unflatten(1, (len(heads), -1))
    return output


def _full(q_HQD: Tensor, pages: Pages, heads: Tensor, scale: float) -> Tensor:
    """[Q, H, D]."""
    k, v = pages.read(heads)
    queries, past = q_HQD.shape[1], pages.length - q_HQD.shape[1]
    outputs = []
    for start in range(0, queries, _CHUNK):
        stop = min(start + _CHUNK, queries)
        seen = past + stop
        mask = None
        if stop - start > 1:
            mask = torch.arange(seen) <= torch.arange(past + start, seen)[:, None]
        outputs.append(_sdpa(q_HQD[:, start:stop], k[:, :seen], v[:, :seen], mask, scale))
    return torch.cat(outputs, dim=1).transpose(0, 1)


def _streaming(q_HQD: Tensor, pages: Pages, heads: Tensor, sparse: SparseConfig, scale: float) -> Tensor:
    """[Q, H, D]. A single query reads the keys that it sees and no others."""
    if q_HQD.shape[1] > 1:
        k, v = pages.read(heads)
        return streaming(q_HQD[None], k[None], v[None], sparse, scale)[0]
    local = max(0, lower_bound(pages.length - 1, sparse.window, sparse.granule, sparse.block))
    seen = torch.cat([torch.arange(min(sparse.sink, local)), torch.arange(local, pages.length)])
    k, v = pages.read_at(heads, seen)
    return _sdpa(q_HQD, k, v, None, scale).transpose(0, 1)


def _sdpa(q_HQD: Tensor, k_hSD: Tensor, v_hSD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[H, Q, D]."""
    return F.scaled_dot_product_attention(
        q_HQD[None], k_hSD[None], v_hSD[None], attn_mask=mask, scale=scale, enable_gqa=True
    )[0]
