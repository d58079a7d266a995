"""Keys and values of requests in an engine's pages, and attention over them: by the kernels on a GPU, a step's spans at
once; elsewhere span by span in PyTorch.

Legend: N pages, K KV heads, T tokens of a page, D head dim, E = 2 D, H query heads, Q queries, h KV heads of one mode;
of a step B spans, S queries, P entries of a row of the table.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from elastic.attention.torch_path import streaming
from elastic.config import SparseConfig
from elastic.kernels import Pattern, paged_decode, paged_forward
from elastic.kernels.checks import MAX_SAMPLES
from elastic.kernels.devices import MAX_HEADS
from elastic.visibility import lower_bound

_CHUNK = 512  # queries whose mask exists at a time


@dataclass(frozen=True)
class Pages:
    """A request's keys and values up to its last token.

    Attributes:
        cache_NKTE: the layer's pages, E = 2 D: a token's key, then its value.
        page: the request's pages in order.
        length: tokens.
    """

    cache_NKTE: Tensor
    page: Tensor
    length: int

    def read(self, heads: Tensor | None = None, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` tokens (default: all) in these heads (default: all), [h, length, D]
        each.
        """
        length = self.length if length is None else length
        page = self.page[: -(-length // self.cache_NKTE.shape[2])]
        found = self.cache_NKTE[page] if heads is None else self.cache_NKTE[page[:, None], heads]
        return _halves(found.transpose(0, 1).flatten(1, 2)[:, :length])

    def read_at(self, position: Tensor, heads: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of single tokens, [h, positions, D] each."""
        size = self.cache_NKTE.shape[2]
        page, slot = self.page[position // size], position % size
        if heads is None:
            return _halves(self.cache_NKTE[page, :, slot].transpose(0, 1))
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
class Launch:
    """Spans of a step that one call of an operator runs.

    Attributes:
        spans, tokens: which.
        starts: int32 [spans + 1], where each span's queries begin among the launch's tokens; None: each has one query.
    """

    spans: slice
    tokens: slice
    starts: Tensor | None


@dataclass(frozen=True)
class PagedStep:
    """What a step's layers share: spans of tokens, each the last ones that its request has up to there, and all of a
    span's tokens in one mode by head.

    Attributes:
        table: int32 [B, P] on the cache's device, each span's pages in order.
        lengths: int32 [B] there, its request's tokens up to the span's last.
        bounds: for the host, where each span's queries begin, and the number of all.
        ends: for the host, what `lengths` are.
        launches: the calls that run them on a GPU.
    """

    table: Tensor
    lengths: Tensor
    bounds: list[int]
    ends: list[int]
    launches: tuple[Launch, ...]

    @classmethod
    def of(
        cls, table: Tensor, starts: Tensor, lengths: Tensor, bounds: list[int], ends: list[int], kv_heads: int
    ) -> "PagedStep":
        """Single queries at the step's beginning (an engine puts them first) run as decoding, all others as a forward
        pass; a launch takes no more spans than the kernels do.

        Args:
            starts: int32 [B + 1] on the cache's device, what `bounds` are.
        """
        spans, most = len(ends), max(1, MAX_HEADS // kv_heads)
        singles = next((n for n, (a, b) in enumerate(pairwise(bounds)) if b - a != 1), spans)
        edges = [(n, min(n + most, singles)) for n in range(0, singles, most)]
        launches = [Launch(slice(a, b), slice(a, b), None) for a, b in edges]
        for a in range(singles, spans, MAX_SAMPLES):
            b, first = min(a + MAX_SAMPLES, spans), bounds[a]
            here = starts[a : b + 1] - first if first else starts[a : b + 1]
            launches.append(Launch(slice(a, b), slice(first, bounds[b]), here))
        return cls(table[:spans], lengths[:spans], bounds, ends, tuple(launches))


def attend_step(
    q_SHD: Tensor, cache_NKTE: Tensor, step: PagedStep, mode_BK: Tensor, sparse: SparseConfig, scale: float,
    output_SHD: Tensor,
) -> None:  # fmt: skip
    """Attention of all new tokens of a step into `output_SHD`; rows after the step's last token stay as they are.

    On a GPU by the paged kernels, which read table, lengths and modes there, so that a captured graph may be replayed
    after they have changed; elsewhere span by span in PyTorch.

    Args:
        mode_BK: int32, a row for each span: 1 where a KV head runs streaming, else 0.

    Raises:
        ValueError: a GPU's tensors that the kernels do not take, with the way out.
    """
    run = attend_launches if q_SHD.is_cuda else attend_spans
    run(q_SHD, cache_NKTE, step, mode_BK, sparse, scale, output_SHD)


def attend_launches(
    q_SHD: Tensor, cache_NKTE: Tensor, step: PagedStep, mode_BK: Tensor, sparse: SparseConfig, scale: float,
    output_SHD: Tensor,
) -> None:  # fmt: skip
    """`attend_step` by the paged operators, whatever the device."""
    pools = _halves(cache_NKTE.transpose(1, 2))
    pattern = Pattern(sparse.sink, sparse.window, sparse.granule, sparse.block, scale)
    for launch in step.launches:
        spans, q = launch.spans, q_SHD[launch.tokens]
        table, lengths, mode = step.table[spans], step.lengths[spans], mode_BK[spans]
        if launch.starts is None:
            found = paged_decode(q, *pools, table, lengths, mode, pattern)
        else:
            found, _ = paged_forward(q, *pools, table, launch.starts, lengths, mode, pattern)
        output_SHD[launch.tokens] = found


def attend_spans(
    q_SHD: Tensor, cache_NKTE: Tensor, step: PagedStep, mode_BK: Tensor, sparse: SparseConfig, scale: float,
    output_SHD: Tensor,
) -> None:  # fmt: skip
    """`attend_step` in PyTorch, on the CPU."""
    modes = mode_BK.tolist()
    for n, (first, stop) in enumerate(pairwise(step.bounds)):
        if first < stop:
            pages = Pages(cache_NKTE, step.table[n], step.ends[n])
            streaming_K = [bool(mode) for mode in modes[n]]
            output_SHD[first:stop] = attend_pages(q_SHD[first:stop], pages, streaming_K, sparse, scale)


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
    k, v = pages.read_at(seen, heads)
    return _sdpa(q_HQD, k, v, None, scale).transpose(0, 1)


def _sdpa(q_HQD: Tensor, k_hSD: Tensor, v_hSD: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[H, Q, D]."""
    return F.scaled_dot_product_attention(
        q_HQD[None], k_hSD[None], v_hSD[None], attn_mask=mask, scale=scale, enable_gqa=True
    )[0]
