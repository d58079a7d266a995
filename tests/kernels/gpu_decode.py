"""Decode problems drawn from a seed, and judging the kernel on them: poisoned caches, guard bands, oracle in fp64."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.kernels.attention_decode import decode_oracle, launch_decode
from elastic.kernels.devices import DecodeConfig, capability_of, decode_config, processors_of, shared_limit
from tests.kernels.generators import SENTINEL

LENGTHS = (0, 0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 513, 1000, 3000)


@dataclass(frozen=True)
class DecodeProblem:
    """Arguments of one call; rows that no head sees hold NaN and infinity."""

    q: Tensor
    keys: Tensor
    values: Tensor
    base: Tensor
    spans: tuple[Tensor, Tensor, Tensor]
    token_stride: int
    scale: float
    sinks: Tensor | None = None

    def args(self) -> tuple:
        """As `decode_oracle` takes them."""
        return self.q, self.keys, self.values, self.base, *self.spans, self.token_stride, self.scale, self.sinks


def random_decode(seed: int, device: str = "cuda") -> DecodeProblem:
    """The problem of a seed: any dtype, head dim, grouping, batch, cache layout, and lengths per head."""
    rng = random.Random(seed)
    gen = torch.Generator(device).manual_seed(seed)
    dim, dtype = rng.choice((64, 128)), rng.choice((torch.bfloat16, torch.float16))
    batch, kv_heads, group = rng.choice((1, 1, 2, 3, 9, 64)), rng.choice((1, 2, 3, 8)), rng.choice((1, 2, 4, 5, 8, 16))
    layout = rng.choice(("heads_first", "tokens_first", "pool"))
    heads = batch * kv_heads
    longest = rng.choice((64, 300, 3000)) if heads < 100 else rng.choice((20, 200))
    ends = [min(rng.choice((*LENGTHS, longest)), longest) for _ in range(heads)]
    sinks = [rng.choice((0, 0, 1, 4, 64, 128)) for _ in range(heads)]
    begins = [rng.choice((0, 0, -7, 1, e - 1, e - 64, e - 200, e // 2, e + 3)) for e in ends]
    if layout == "pool":  # every head has just the rows it needs, in a shuffled order of heads
        order = rng.sample(range(heads), heads)
        starts, rows = [0] * heads, 0
        for h in order:
            rows += rng.randrange(4)
            starts[h], rows = rows, rows + ends[h]
        shape, stride = (rows + 3, dim), 1
    elif layout == "heads_first":
        starts, shape, stride = [h * longest for h in range(heads)], (batch, kv_heads, longest, dim), 1
    else:
        starts = [h // kv_heads * longest * kv_heads + h % kv_heads for h in range(heads)]
        shape, stride = (batch, longest, kv_heads, dim), kv_heads
    keys, values = (torch.randn(shape, generator=gen, device=device).to(dtype) for _ in range(2))
    unseen = torch.ones(keys.numel() // dim, dtype=torch.bool)
    for first, sink, begin, end in zip(starts, sinks, begins, ends, strict=True):
        token = torch.arange(end)
        unseen[first + stride * token[(token < sink) | (token >= begin)]] = False
    unseen = unseen.to(device)
    keys.view(-1, dim)[unseen] = float("nan")
    values.view(-1, dim)[unseen] = float("inf")
    wide = torch.randn(batch, kv_heads * group + 2, dim, generator=gen, device=device).to(dtype)
    q = wide[:, 1:-1] if rng.random() < 0.5 else wide[:, 2:].contiguous()
    base = torch.tensor(starts, device=device).view(batch, kv_heads)
    sink, begin, end = (torch.tensor(x, dtype=torch.int32, device=device).view_as(base) for x in (sinks, begins, ends))
    return DecodeProblem(q, keys, values, base, (sink, begin, end), stride, rng.choice((dim**-0.5, 0.3, 1.0)))


def configs(problem: DecodeProblem, index: int = 0) -> list[DecodeConfig]:
    """The launch choices of this GPU, and others that share the work differently."""
    capability, processors, limit = capability_of(index), processors_of(index), shared_limit(index)
    dim, group, heads = problem.q.shape[2], problem.q.shape[1] // problem.base.shape[1], problem.base.numel()
    chosen = decode_config(capability, processors, limit, dim, group, heads)
    few = decode_config(capability, 5, limit, dim, group, heads)
    small = decode_config(capability, processors, limit, dim, group, heads, warps=4, most_stages=2)
    return [chosen, few, small]


def run_decode(problem: DecodeProblem, config: DecodeConfig) -> Tensor:
    """One launch into a poisoned output inside guard bands."""
    guard, q = 4096, problem.q
    store = torch.full((q.numel() + 2 * guard,), SENTINEL, dtype=q.dtype, device=q.device)
    out = store[guard:-guard].view(q.shape)
    out.fill_(float("nan"))
    q, keys, values, base, *_ = problem.args()
    shared = problem.token_stride, problem.scale, config, problem.sinks
    launch_decode(out, q, keys, values, base, problem.spans, *shared)
    assert (store[:guard] == SENTINEL).all() and (store[-guard:] == SENTINEL).all(), "a guard band was overwritten"
    return out


def judge_decode(out: Tensor, problem: DecodeProblem) -> float:
    """Raise unless the error is at most twice that of PyTorch in the problem's own dtype, plus one rounding."""
    args = problem.args()
    exact = decode_oracle(*(x.double() for x in args[:3]), *args[3:])
    same = decode_oracle(*args, compute=problem.q.dtype)
    assert not out.isnan().any(), "NaN in the output"
    error, own = ((x.double() - exact).abs().amax().item() for x in (out, same))
    rounding = torch.finfo(out.dtype).eps * max(1.0, exact.abs().amax().item())
    assert error <= 2 * own + rounding, f"output error {error:.3e}, PyTorch's own {own:.3e}"
    return error
