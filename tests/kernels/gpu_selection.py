"""Random selection problems, the kernel's answer to them, and its judges."""

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic.kernels import select_blocks
from elastic.kernels.block_bits import mask_from_bits
from elastic.kernels.params import BLOCK_SPARSE, WHOLE_ROWS, Pattern, Ranges
from elastic.kernels.xattention_oracle import block_mass, block_relations, choose
from elastic.kernels.xattention_select import launch_selection, mass_shape
from tests.kernels.generators import placed, random_spans, tensor

LENGTHS = (1, 7, 8, 15, 16, 17, 64, 100, 127, 128, 129, 300, 1000, 2047, 2048, 2049, 3000, 4096, 4111, 6200)


@dataclass(frozen=True)
class Selection:
    """Arguments of one selection launch."""

    q: Tensor
    k: Tensor
    mode: Tensor
    stride: int
    threshold: float
    pattern: Pattern
    ranges: Ranges = WHOLE_ROWS

    def args(self) -> tuple[Tensor, Tensor, Tensor, Pattern, Ranges]:
        """The positional arguments of `select_blocks` and of `launch_selection`."""
        return self.q, self.k, self.mode, self.pattern, self.ranges

    def sizes(self) -> dict[str, Any]:
        """Their other arguments."""
        return {"stride": self.stride, "threshold": self.threshold}

    def public(self) -> Tensor:
        """Bits from the public function."""
        return select_blocks(*self.args(), **self.sizes())


def random_selection(seed: int, device: str = "cuda") -> Selection:
    """The problem of a seed: any dtype, head dim, grouping, layout, packing or padding, stride, block and threshold."""
    rng = random.Random(seed)
    gen = torch.Generator(device).manual_seed(seed)
    dim, dtype = rng.choice((64, 128)), rng.choice((torch.bfloat16, torch.float16))
    batch, kv_heads, group = rng.choice((1, 1, 2)), rng.choice((1, 2, 3)), rng.choice((1, 2, 4, 7))
    kind = rng.choice(("whole", "whole", "packed", "packed", "left", "right"))
    seq_q = rng.choice(LENGTHS)
    seq_k = seq_q if kind == "packed" or rng.random() < 0.5 else seq_q + rng.choice((1, 16, 17, 100, 333, 4096))
    layouts = ("plain", "plain", "heads_first", "fused")
    q = tensor(gen, (batch, seq_q, kv_heads * group, dim), rng.choice(layouts), dtype)
    k = tensor(gen, (batch, seq_k, kv_heads, dim), rng.choice(layouts), dtype)
    spans = random_spans(rng, kind, batch, seq_q, seq_k)
    samples = batch if spans is None else len(spans["row"])
    modes = rng.choice(((2,), (0, 1, 2)))
    mode = torch.tensor([[rng.choice(modes) for _ in range(kv_heads)] for _ in range(samples)], dtype=torch.int32)
    ranges = placed(spans, q, k)
    threshold, scale = rng.choice((0.1, 0.5, 0.8, 0.9, 0.95, 1.0)), rng.choice((dim**-0.5, 0.3, 1.0))
    stride, block = rng.choice((8, 16)), rng.choice((64, 128))
    return Selection(q, k, mode.to(device), stride, threshold, Pattern.without_streaming(block, scale), ranges)


def run_selection(problem: Selection, debug: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    """Bits and masses of one launch; masses and scratch start as NaN."""
    q, k, mode, pattern, _ = problem.args()
    mass = torch.full(mass_shape(q, k, mode, problem.stride, pattern.block), float("nan"), device=q.device)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    try:
        return launch_selection(*problem.args(), **problem.sizes(), mass=mass, debug=debug), mass
    finally:
        torch.use_deterministic_algorithms(False)


def judge_selection(bits: Tensor, mass: Tensor, problem: Selection) -> tuple[int, int]:
    """Raise unless the masses are right, the choice is exactly the rule applied to them, and nothing else is written.

    Returns:
        query blocks whose count differs by more than one from that of the oracle's own masses, and all query blocks.
    """
    (q, k, mode, pattern, ranges), stride, threshold = problem.args(), problem.stride, problem.threshold
    block, scale = pattern.block, pattern.scale_for(q.shape[3])
    group, far, rows = q.shape[2] // k.shape[2], 0, 0
    expected = torch.zeros_like(bits, dtype=torch.bool).unsqueeze(-1).repeat(1, 1, 1, 1, 32).flatten(-2)
    for n, (row, begin_q, end_q, begin_k, end_k) in enumerate(ranges.on_host(mode.shape[0], q.shape[1], k.shape[1])):
        own, seen = block_relations(end_q - begin_q, end_k - begin_k, block, q.device)
        for kv_head in (mode[n] == BLOCK_SPARSE).nonzero()[:, 0].tolist():
            heads = slice(kv_head * group, (kv_head + 1) * group)
            m, b = own.shape
            if not m:
                continue
            q_HLD = q[row, begin_q:end_q, heads].transpose(0, 1).double()
            exact = block_mass(q_HLD, k[row, begin_k:end_k, kv_head][None].double(), stride, block, scale)
            got = mass[n, heads, :m, :b]
            assert not got[:, seen].isnan().any(), "NaN in the masses"
            error = (got - exact)[:, seen].abs().amax().item()
            assert error <= 2e-4, f"mass error {error:.3e}"
            chosen = choose(got.masked_fill(~seen, 0.0), own, seen, threshold)
            expected[n, heads, :m, :b] = chosen
            wanted = choose(exact, own, seen, threshold)
            far += ((chosen.sum(-1) - wanted.sum(-1)).abs() > 1).sum().item()
            rows += chosen.shape[0] * m
    found = mask_from_bits(bits)
    assert torch.equal(found, expected), f"{(found != expected).sum().item()} of {expected.sum().item()} blocks differ"
    return far, rows
