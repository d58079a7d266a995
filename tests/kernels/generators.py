"""Random attention problems, shared by tests and timings; each is drawn from a seed, so a failure is a number."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.kernels.block_bits import bits_from_mask
from elastic.kernels.params import Pattern, Ranges

LENGTHS = (1, 2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300, 513, 700, 1000)
SINKS, WINDOWS = (0, 1, 64, 100, 128), (1, 63, 64, 65, 200, 2048)
SENTINEL = 777.0


@dataclass(frozen=True)
class Problem:
    """Arguments of one launch."""

    q: Tensor
    k: Tensor
    v: Tensor
    mode: Tensor
    pattern: Pattern
    ranges: Ranges
    bits: Tensor | None

    def args(self) -> tuple:
        """The positional arguments of the oracle and of `launch_into`."""
        return self.q, self.k, self.v, self.mode, self.pattern, self.ranges, self.bits


def tensor(gen: torch.Generator, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """N(0, 1) values as [B, S, heads, D]: contiguous, a view of [B, heads, S, D], or a slice of wider rows."""
    batch, tokens, heads, dim = shape
    device = gen.device
    if layout == "heads_first":
        return torch.randn(batch, heads, tokens, dim, generator=gen, device=device).to(dtype).transpose(1, 2)
    if layout == "fused":
        return torch.randn(batch, tokens, heads + 3, dim, generator=gen, device=device).to(dtype)[:, :, 2:-1]
    return torch.randn(batch, tokens, heads, dim, generator=gen, device=device).to(dtype)


def _pattern(rng: random.Random, dim: int) -> tuple[Pattern, bool]:
    """A pattern, and whether its block size allows block-sparse heads."""
    scale = rng.choice((dim**-0.5, 0.3, 1.0))
    if rng.random() < 0.5:
        return Pattern(rng.choice(SINKS), rng.choice(WINDOWS), "token", rng.choice((64, 128)), scale), True
    block = rng.choice((16, 64, 128))
    return Pattern(block * rng.randrange(3), block * rng.randrange(1, 9), "block", block, scale), block >= 64


def random_spans(rng: random.Random, kind: str, batch: int, seq_q: int, seq_k: int) -> dict[str, list[int]] | None:
    """Sample ranges by name; None for whole rows."""
    if kind == "whole":
        return None
    spans: dict[str, list[int]] = {"begin_q": [], "end_q": [], "begin_k": [], "end_k": [], "row": []}
    for row in range(batch):
        if kind == "packed":  # seq_q == seq_k; empty samples allowed
            cuts = sorted(rng.choices(range(seq_q + 1), k=rng.randrange(0, 5)))
            pieces = [(a, b, a, b) for a, b in zip([0, *cuts], [*cuts, seq_q], strict=True)]
        else:
            pad = rng.randrange(0, seq_q)  # the queries are the last ones, the padding lies left or right of all
            pieces = [(pad, seq_q, pad, seq_k)] if kind == "left" else [(0, seq_q - pad, 0, seq_k - pad)]
        for piece in pieces:
            for name, value in zip(("begin_q", "end_q", "begin_k", "end_k"), piece, strict=True):
                spans[name].append(value)
            spans["row"].append(row)
    return spans


def random_problem(seed: int, device: str = "cuda") -> Problem:
    """The problem of a seed: any dtype, head dim, grouping, layout, packing or padding, modes and pattern."""
    rng = random.Random(seed)
    gen = torch.Generator(device).manual_seed(seed)
    dim, dtype = rng.choice((64, 128)), rng.choice((torch.bfloat16, torch.float16))
    batch, kv_heads, group = rng.choice((1, 1, 2, 3)), rng.choice((1, 2, 3)), rng.choice((1, 1, 2, 4, 7, 8))
    kind = rng.choice(("whole", "whole", "packed", "left", "right"))
    seq_q = rng.choice(LENGTHS)
    seq_k = seq_q if kind == "packed" or rng.random() < 0.5 else seq_q + rng.choice((1, 17, 64, 100, 333))
    layouts = ("plain", "plain", "heads_first", "fused")
    q = tensor(gen, (batch, seq_q, kv_heads * group, dim), rng.choice(layouts), dtype)
    k = tensor(gen, (batch, seq_k, kv_heads, dim), rng.choice(layouts), dtype)
    v = tensor(gen, (batch, seq_k, kv_heads, dim), rng.choice(layouts), dtype)
    pattern, blocks_allowed = _pattern(rng, dim)
    spans = random_spans(rng, kind, batch, seq_q, seq_k)
    samples = batch if spans is None else len(spans["row"])
    modes = rng.choice(((0,), (1,), (0, 1), (2,), (0, 1, 2))) if blocks_allowed else rng.choice(((0,), (1,), (0, 1)))
    mode = torch.tensor([[rng.choice(modes) for _ in range(kv_heads)] for _ in range(samples)], dtype=torch.int32)
    ranges = placed(spans, q, k, v)
    bits = None
    if 2 in modes:
        shape = (samples, kv_heads * group, -(-seq_q // 128), -(-seq_k // pattern.block))
        density = rng.choice((0.0, 0.1, 0.5, 1.0))
        bits = bits_from_mask(torch.rand(shape, generator=gen, device=device) < density)
    return Problem(q, k, v, mode.to(device), pattern, ranges, bits)


def placed(spans: dict[str, list[int]] | None, q: Tensor, *of_keys: Tensor) -> Ranges:
    """The spans on the device; tokens of no sample are poisoned in q and in k (and v)."""
    if spans is None:
        return Ranges()
    ranges = Ranges(**{n: torch.tensor(x, dtype=torch.int32, device=q.device) for n, x in spans.items()})
    poison_outside(q, ranges.begin_q, ranges.end_q, ranges.row)
    for x in of_keys:
        poison_outside(x, ranges.begin_k, ranges.end_k, ranges.row)
    return ranges


def poison_outside(x: Tensor, begin: Tensor, end: Tensor, row: Tensor) -> None:
    """Fill the tokens of no sample with NaN and infinity, in place."""
    token, used = torch.arange(x.shape[1], device=x.device), _inside(x, begin, end, row)
    x[~used] = float("nan")
    x[~used & (token % 2 == 0)] = float("inf")


def _inside(x: Tensor, begin: Tensor | None, end: Tensor | None, row: Tensor | None) -> Tensor:
    if row is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    token = torch.arange(x.shape[1], device=x.device)
    used = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    for b, e, r in zip(begin.tolist(), end.tolist(), row.tolist(), strict=True):
        used[r] |= (token >= b) & (token < e)
    return used


def rows_written(problem: Problem) -> Tensor:
    """Boolean [B, Sq]: query rows that belong to a sample."""
    return _inside(problem.q, problem.ranges.begin_q, problem.ranges.end_q, problem.ranges.row)


def keys_used(problem: Problem) -> Tensor:
    """Boolean [B, Sk]: keys that belong to a sample."""
    return _inside(problem.k, problem.ranges.begin_k, problem.ranges.end_k, problem.ranges.row)


def dense_problem(
    length: int,
    *,
    streaming: int = 0,
    heads: int = 32,
    kv_heads: int = 8,
    dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    seed: int = 0,
) -> Problem:
    """One whole sequence with the first `streaming` KV heads in streaming mode (128 + 2048, blocks of 128)."""
    gen = torch.Generator(device).manual_seed(seed)
    q = tensor(gen, (1, length, heads, dim), "plain", dtype)
    k = tensor(gen, (1, length, kv_heads, dim), "plain", dtype)
    v = tensor(gen, (1, length, kv_heads, dim), "plain", dtype)
    mode = torch.tensor([[int(h < streaming) for h in range(kv_heads)]], dtype=torch.int32, device=device)
    return Problem(q, k, v, mode, Pattern(128, 2048, "block", 128, dim**-0.5), Ranges(), None)
