"""What a method chooses from: one sample's queries and keys after RoPE, and where its blocks lie.

A method gives a boolean [h, M, N]: the key blocks that each query block visits, h the query heads H, or the KV heads K
where the heads of a group share their choice. It always visits the blocks that hold the query block's own positions,
and none that begin after its last query. The rows of the kernel's bit set are shared by a query block
(`elastic.kernels.block_bits`), so methods whose papers choose for every token choose for a query block here, each in
the way that its file says. Legend: H query heads, K KV heads, G = H / K, L queries, S keys, D head dim, M query and N
key blocks.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from elastic.config import SparseConfig
from elastic.kernels.block_bits import query_block


@dataclass(frozen=True)
class AttentionSample:
    """One sample; its queries are its last positions.

    Attributes:
        q_HLD, k_KSD: after RoPE, keys of earlier turns included.
        sparse: sizes and settings.
        scale: softmax scale.
    """

    q_HLD: Tensor
    k_KSD: Tensor
    sparse: SparseConfig
    scale: float

    @property
    def past(self) -> int:
        """Position of the first query."""
        return self.k_KSD.shape[1] - self.q_HLD.shape[1]

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q_HLD.shape[0] // self.k_KSD.shape[0]

    @property
    def wide(self) -> torch.dtype:
        """Element type of the scores: fp32, or fp64 for fp64 input."""
        return torch.promote_types(self.q_HLD.dtype, torch.float32)

    @property
    def rows(self) -> int:
        """Queries of a query block."""
        return query_block(self.sparse.block)

    @cached_property
    def firsts(self) -> Tensor:
        """Position of every query block's first query."""
        return torch.arange(0, self.q_HLD.shape[1], self.rows, device=self.q_HLD.device) + self.past

    @cached_property
    def lasts(self) -> Tensor:
        """Position of every query block's last query."""
        return (self.firsts + self.rows - 1).clamp(max=self.k_KSD.shape[1] - 1)

    def begins(self, size: int | None = None) -> Tensor:
        """First position of every block of `size` tokens; default the key blocks."""
        return torch.arange(0, self.k_KSD.shape[1], size or self.sparse.block, device=self.q_HLD.device)

    def seen(self, size: int | None = None) -> Tensor:
        """Blocks that begin at or before a query block's last query."""
        return self.begins(size) <= self.lasts[..., None]

    def own(self, size: int | None = None) -> Tensor:
        """Blocks that hold positions of a query block."""
        return self.seen(size) & (self.begins(size) + (size or self.sparse.block) > self.firsts[..., None])

    def sink(self, tokens: int) -> Tensor:
        """Seen key blocks that begin within the first `tokens`."""
        return self.seen() & (self.begins() < tokens)

    def window(self, tokens: int) -> Tensor:
        """The last tokens / block key blocks up to that of the first query, and all that the query block holds."""
        return self.seen() & (self.begins() > self.firsts[..., None] - tokens) | self.own()


@dataclass(frozen=True)
class DecodeSteps(AttentionSample):
    """A query each of several samples, the heads of one after those of another: H and K count those of all samples, and
    masks are [K, M, N] with one query block.

    Attributes:
        past_K: position of every sample's query, for each of its KV heads, on the device; keys after it are not the
            sample's.
    """

    past_K: Tensor

    @cached_property
    def firsts(self) -> Tensor:
        """Position of the query, [K, 1]."""
        return self.past_K[:, None]

    @cached_property
    def lasts(self) -> Tensor:
        """The same."""
        return self.firsts
