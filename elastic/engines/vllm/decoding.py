"""Rows of a step that decode, one token each under routes that are known, and attention for all of them in PyTorch: the
twin of a paged decode kernel.

Legend: R rows, P pages of a row, H query heads, K KV heads, D head dim, N pages, T tokens of a page, E = 2 D.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.config import SparseConfig
from elastic.engines.vllm.paged import Pages, attend_pages


@dataclass(frozen=True)
class Decoding:
    """What all layers of a step share of its decoding rows.

    Attributes:
        token_R: places of their tokens in the step; None where they are the whole step, in order.
        page_RP: their pages.
        length_R: tokens of each, the new one included.
        streams: by layer, bool [R, K]: heads that run streaming. The tensors stay the same until the batch changes.
    """

    token_R: Tensor | None
    page_RP: Tensor
    length_R: Tensor
    streams: tuple[Tensor, ...]


def attend_rows(
    q_RHD: Tensor, cache_NKTE: Tensor, rows: Decoding, layer: int, sparse: SparseConfig, scale: float
) -> Tensor:
    """Attention of each row's last token in a layer, [R, H, D]."""
    output = torch.empty_like(q_RHD)
    lengths, streams = rows.length_R.tolist(), rows.streams[layer].tolist()
    for n, length in enumerate(lengths):
        pages = Pages(cache_NKTE, rows.page_RP[n], length)
        output[n] = attend_pages(q_RHD[n : n + 1], pages, streams[n], sparse, scale)[0]
    return output
