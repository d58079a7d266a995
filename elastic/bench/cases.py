"""What is timed: one sequence whose KV heads are full, streaming or under a random block mask, and its arithmetic.

Legend: S tokens, H query heads, K KV heads, D head dim, M query and N key blocks of 128.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from elastic.kernels.block_bits import bits_from_mask
from elastic.kernels.params import BLOCK_SPARSE, STREAMING, Pattern
from elastic.visibility import visible

BLOCK, SINK, WINDOW = 128, 128, 2048  # tokens; the pattern of every streaming head, by whole blocks
PATTERN = Pattern(SINK, WINDOW, "block", BLOCK)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Inputs(NamedTuple):
    """Tensors of a case: q [1, S, H, D], k and v [1, S, K, D], mode int32 [1, K], bits of a random block mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    mode: Tensor
    bits: Tensor | None


@dataclass(frozen=True)
class Case:
    """One line of a table, batch 1, causal.

    Args:
        length: tokens, a multiple of 128.
        streaming: how many KV heads stream (sink 128 + window 2048); the others are full.
        density: share of the causal blocks that a random block mask keeps on every query head; None: no such mask.
    """

    length: int
    streaming: int = 0
    density: float | None = None
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.length < BLOCK or self.length % BLOCK:
            raise ValueError(
                f"length {self.length} is not a positive multiple of {BLOCK}; use "
                f"{max(1, round(self.length / BLOCK)) * BLOCK}"
            )
        if self.heads < 1 or self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are not a multiple of {self.kv_heads} KV heads")
        if not 0 <= self.streaming <= self.kv_heads:
            raise ValueError(f"{self.streaming} streaming heads; expected 0 to {self.kv_heads}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density {self.density:g} is not in (0, 1]; 0.25 keeps a quarter of the blocks")

    @property
    def msr(self) -> float | None:
        """Share of streaming KV heads (eq. 4); None under a random block mask."""
        return None if self.density is not None else self.streaming / self.kv_heads

    @property
    def name(self) -> str:
        """As the tables call it: dense-64k, streaming-6of8-64k, random-25pct-64k, dense-d64-8k."""
        if self.density is not None:
            kind = f"random-{100 * self.density:g}pct"
        else:
            kind = f"streaming-{self.streaming}of{self.kv_heads}" if self.streaming else "dense"
        size = f"{self.length // 1024}k" if self.length % 1024 == 0 else str(self.length)
        words = [kind, f"d{self.head_dim}" if self.head_dim != 128 else "", size, self.dtype.removeprefix("bf16")]
        return "-".join(filter(None, words))

    def properties(self) -> dict[str, object]:
        """What a record says about its case."""
        shape = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim, "dtype": self.dtype}
        return {"length": self.length, "msr": self.msr, "density": self.density, **shape}

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """N(0, 1) operands on a device."""
        generator = torch.Generator(device).manual_seed(seed)
        q, k, v = (
            torch.randn(1, self.length, heads, self.head_dim, generator=generator, device=device).to(DTYPES[self.dtype])
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        mode = torch.zeros(1, self.kv_heads, dtype=torch.int32)
        if self.density is not None:
            bits = bits_from_mask(self.block_mask()).to(device)
            return Inputs(q, k, v, torch.full_like(mode, BLOCK_SPARSE).to(device), bits)
        mode[:, : self.streaming] = STREAMING
        return Inputs(q, k, v, mode.to(device), None)

    def block_mask(self) -> Tensor:
        """Which key blocks a query block visits, bool [1, H or 1, M, N] on the CPU; 1 where all heads agree.

        The diagonal is always there, the blocks above it never.
        """
        blocks = self.length // BLOCK
        m, n = torch.arange(blocks)[:, None], torch.arange(blocks)[None]
        causal = n <= m
        if self.density is not None:
            generator = torch.Generator().manual_seed(7)
            kept = torch.rand(1, self.heads, blocks, blocks, generator=generator) < self.density
            return (kept & causal) | (n == m)
        # A streaming block is seen by all queries of a query block or by none: sink and window count whole blocks.
        last, first = m * BLOCK + BLOCK - 1, n * BLOCK
        local = visible(last, first, sink=SINK, window=WINDOW, granule="block", block=BLOCK)
        if self.streaming in (0, self.kv_heads):
            return (local if self.streaming else causal)[None, None]
        few = self.streaming * self.heads // self.kv_heads
        return torch.stack([local] * few + [causal] * (self.heads - few))[None]

    def visited_blocks(self) -> float:
        """Blocks of 128 x 128 that all query heads together visit, the diagonal ones counted half."""
        mask = self.block_mask()
        blocks = mask.sum().item() * (self.heads / mask.shape[1])
        return blocks - self.heads * (self.length // BLOCK) / 2

    def flops(self) -> float:
        """Floating-point operations of the two matrix products over the visited blocks, forward."""
        return 4.0 * self.head_dim * BLOCK * BLOCK * self.visited_blocks()
