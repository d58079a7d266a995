"""What reach adds to routing a layer: the kernel beside its PyTorch twin on random data, in `elastic bench router`.

Device times are those of calls in a CUDA graph. Copies of the keys take turns, so that they come from memory and not
from the L2 cache, as those of a long prompt do.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.bench.cases import DTYPES, SINK, WINDOW
from elastic.bench.race import DISAGREED
from elastic.bench.records import LEFT_OUT, Measurement
from elastic.bench.replay import copies_beyond_cache, in_turn, replayed
from elastic.console import say
from elastic.kernels import Pattern, reach
from elastic.kernels.params import REACH_QUERIES, WHOLE_ROWS
from elastic.kernels.reach_oracle import reach_oracle

LENGTHS = (8192, 32_768, 131_072)
SHAPES = ((32, 8, 128), (9, 3, 64))  # query heads, KV heads, head dim: 8B models, SmolLM2-135M
PATTERN = Pattern(SINK, WINDOW)
TOLERANCE = 1e-3


@dataclass(frozen=True)
class ReachCase:
    """One line of the table: a prompt of `length` tokens."""

    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        """As the table calls it: reach-128k, reach-d64-8k."""
        size = f"{self.length // 1024}k" if self.length % 1024 == 0 else str(self.length)
        return "-".join(filter(None, ["reach", f"d{self.head_dim}" if self.head_dim != 128 else "", size]))

    @property
    def nbytes(self) -> int:
        """Bytes of keys that one call reads."""
        return self.length * self.kv_heads * self.head_dim * DTYPES[self.dtype].itemsize

    def properties(self) -> Measurement:
        """What a record says about its case."""
        shape = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {"length": self.length, **shape, "dtype": self.dtype}

    def operands(self, device: str) -> tuple[Tensor, list[Tensor]]:
        """The last queries [1, 32, H, D], and copies of the keys [1, S, K, D] that lie as a cache has them."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(heads: int, tokens: int) -> Tensor:
            shape = (1, heads, tokens, self.head_dim)
            return torch.randn(shape, generator=generator, device=device, dtype=DTYPES[self.dtype]).transpose(1, 2)

        q, k = normal(self.heads, min(self.length, REACH_QUERIES)), normal(self.kv_heads, self.length)
        copies = 1 if device == "cpu" else copies_beyond_cache(self.nbytes)
        return q, [k, *(k.transpose(1, 2).clone().transpose(1, 2) for _ in range(copies - 1))]


def run_reach(case: ReachCase, budget_ms: float, device: str) -> list[Measurement]:
    """Device time of the kernel and of its twin, with TB/s of keys; the kernel is left out if they disagree."""
    q, keys = case.operands(device)
    with torch.inference_mode():
        found, wanted = reach(q, keys[0], PATTERN), reach_oracle(q, keys[0], PATTERN, WHOLE_ROWS)
        difference = max((one - other).abs().max().item() for one, other in zip(found, wanted, strict=True))
        say(f"{case.name:28s} differs from its twin by {difference:.2g}")
        contestants = {
            "reach": in_turn([lambda k=k: reach(q, k, PATTERN) for k in keys]),  # type: ignore[misc]
            "reach-torch": in_turn([lambda k=k: reach_oracle(q, k, PATTERN, WHOLE_ROWS) for k in keys]),  # type: ignore[misc]
        }
        timed: list[Measurement] = []
        for who, call in contestants.items():
            if who == "reach" and not difference <= TOLERANCE:
                why = f"{DISAGREED} by {difference:.3g}, allowed is {TOLERANCE}"
                shared = {"case": case.name, "who": who, **case.properties()}
                timed.append({**shared, "metric": LEFT_OUT, "value": None, "unit": "", "why": why})
                continue
            timed += replayed(case.name, case.properties(), who, call, budget_ms, case.nbytes)
    return timed
