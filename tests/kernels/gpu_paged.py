"""Problems over pages drawn from a seed, and judging the paged kernels on them: pools that hold NaN wherever nothing
must be read, poisoned outputs inside guard bands, the oracle in fp64.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.kernels.devices import (
    DecodeConfig,
    LaunchConfig,
    capability_of,
    decode_config,
    processors_of,
    shared_limit,
)
from elastic.kernels.paged_decode import launch_paged_decode, paged_decode_oracle
from elastic.kernels.paged_forward import launch_paged, paged_config, prepare_paged
from elastic.kernels.paged_oracle import paged_oracle
from elastic.kernels.params import HALF_BLOCK, QUERY_BLOCK, Pattern
from elastic.visibility import lower_bound, visible
from tests.kernels.generators import SENTINEL

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 200, 300, 513, 1000, 2500)
SIZES, LAYOUTS = (16, 16, 32, 64, 128), ("pair_first", "pair_second", "heads_first", "together")
STALE = 2**31 - 1  # in entries of the table that no token needs


@dataclass(frozen=True)
class PagedProblem:
    """Arguments of one call. `pools` hold NaN and infinity wherever the kernel must not read, `clean` are finite."""

    q: Tensor
    pools: tuple[Tensor, Tensor]
    clean: tuple[Tensor, Tensor]
    table: Tensor
    starts: Tensor
    lengths: Tensor
    mode: Tensor
    pattern: Pattern


def new_pools(gen: torch.Generator, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype) -> Tensor:
    """Keys and values as views [2, N, T, K, D] of a cache: as vLLM lays them out, in this version or another."""
    pages, size, heads, dim = shape
    device = gen.device
    if layout == "pair_first":
        return torch.randn(2, *shape, generator=gen, device=device).to(dtype)
    if layout == "pair_second":
        return torch.randn(pages, 2, *shape[1:], generator=gen, device=device).to(dtype).transpose(0, 1)
    if layout == "heads_first":
        return torch.randn(2, pages, heads, size, dim, generator=gen, device=device).to(dtype).transpose(2, 3)
    both = torch.randn(pages, heads, size, 2, dim, generator=gen, device=device).to(dtype)  # [N, K, T, 2 D]
    return both.permute(3, 0, 2, 1, 4)


def random_pattern(rng: random.Random, dim: int) -> Pattern:
    scale = rng.choice((dim**-0.5, 0.3, 1.0))
    if rng.random() < 0.5:
        return Pattern(rng.choice((0, 1, 4, 64, 100, 128)), rng.choice((1, 63, 64, 65, 200, 2048)), "token", 128, scale)
    block = rng.choice((16, 64, 128))
    return Pattern(block * rng.randrange(3), block * rng.randrange(1, 9), "block", block, scale)


def needed_tokens(length: int, queries: int, streaming: bool, pattern: Pattern) -> Tensor:
    """Boolean [length]: tokens that a kernel may read. `queries` 0 means decoding: the visible tokens;
    a tile of queries reads whole half blocks.
    """
    token = torch.arange(length)
    if not streaming or length == 0:
        return torch.ones(length, dtype=torch.bool)
    if queries == 0:
        sizes = {"window": pattern.window, "granule": pattern.granule, "block": pattern.block}
        seen: Tensor = visible(torch.tensor(length - 1), token, sink=pattern.sink, **sizes)
        return seen
    local = max(0, lower_bound(length - queries, pattern.window, pattern.granule, pattern.block)) // HALF_BLOCK
    return (token // HALF_BLOCK >= local) | (token // HALF_BLOCK < -(-pattern.sink // HALF_BLOCK))


def random_paged(seed: int, decode: bool, device: str = "cuda", longest: int = 2500) -> PagedProblem:
    """The problem of a seed: any dtype, head dim, grouping, page size, layout of the cache, lengths, prefix, modes."""
    rng = random.Random(seed)
    gen = torch.Generator(device).manual_seed(seed)
    dim, dtype = rng.choice((64, 128)), rng.choice((torch.bfloat16, torch.float16))
    kv_heads, group = rng.choice((1, 2, 3, 8) if decode else (1, 2, 3)), rng.choice((1, 2, 4, 5, 8))
    requests = rng.choice((1, 2, 3, 9, 33) if decode else (1, 2, 3, 5))
    most = min(longest, 700 if requests > 5 else longest)
    lengths = [min(rng.choice((*LENGTHS, rng.randrange(1, most + 1))), most) for _ in range(requests)]
    if decode and requests > 1:
        lengths[rng.randrange(requests)] = 0  # a graph's padding
    news = [1 if decode else rng.choice((1, n, n, max(1, n - 1), rng.randrange(1, n + 1), 0)) for n in lengths]
    news[0] = max(1, news[0])
    size, pattern = rng.choice(SIZES), random_pattern(rng, dim)
    mode = torch.tensor([[rng.choice((0, 1)) for _ in range(kv_heads)] for _ in lengths], dtype=torch.int32)
    count = [-(-n // size) for n in lengths]
    free = rng.sample(range(sum(count) + 3), sum(count))
    wide = torch.full((requests, max(count) + 4), STALE, dtype=torch.int32)
    clean = new_pools(gen, (sum(count) + 3, size, kv_heads, dim), rng.choice(LAYOUTS), dtype)
    used = torch.zeros(clean.shape[1:4], dtype=torch.bool)
    for n, length in enumerate(lengths):
        wide[n, : count[n]] = torch.tensor([free.pop() for _ in range(count[n])], dtype=torch.int32)
        token = torch.arange(length)
        page, place = wide[n][token // size].long(), token % size
        for k, streaming in enumerate(mode[n].tolist()):
            used[page, place, k] = needed_tokens(length, 0 if decode else news[n], bool(streaming), pattern)
    pools = clean.clone(memory_format=torch.preserve_format)
    unused = ~used.to(device)
    pools[0][unused], pools[1][unused] = float("nan"), float("inf")
    queries = torch.randn(sum(news), kv_heads * group + 2, dim, generator=gen, device=device).to(dtype)
    q = queries[:, 1:-1] if rng.random() < 0.5 else queries[:, 2:].contiguous()
    starts = torch.tensor([0, *torch.tensor(news).cumsum(0).tolist()], dtype=torch.int32, device=device)
    table, length = wide.to(device)[:, : max(count) + 2], torch.tensor(lengths, dtype=torch.int32, device=device)
    return PagedProblem(q, tuple(pools), tuple(clean), table, starts, length, mode.to(device), pattern)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A tensor of NaN between guard bands, and all of its storage."""
    guard = 4096
    store = torch.full((torch.Size(shape).numel() + 2 * guard,), SENTINEL, dtype=dtype, device=device)
    inside = store[guard:-guard].view(shape)
    inside.fill_(float("nan"))
    return inside, store


def check_guards(store: Tensor) -> None:
    assert (store[:4096] == SENTINEL).all() and (store[-4096:] == SENTINEL).all(), "a guard band was overwritten"


def decode_configs(problem: PagedProblem, index: int = 0) -> list[DecodeConfig]:
    """The launch choices of this GPU, and others that share the work differently."""
    kv_heads = problem.mode.shape[1]
    shape = (problem.q.shape[2], problem.q.shape[1] // kv_heads, problem.mode.numel())
    capability, processors, limit = capability_of(index), processors_of(index), shared_limit(index)
    few = decode_config(capability, 5, limit, *shape)
    small = decode_config(capability, processors, limit, *shape, warps=4, most_stages=2)
    return [decode_config(capability, processors, limit, *shape), few, small]


def run_paged_decode(problem: PagedProblem, config: DecodeConfig) -> Tensor:
    """One launch into a poisoned output inside guard bands."""
    p = problem
    out, store = guarded(tuple(p.q.shape), p.q.dtype, p.q.device)
    launch_paged_decode(out, p.q, *p.pools, p.table, p.lengths, p.mode, p.pattern, config)
    check_guards(store)
    return out


def forward_config(path: str, problem: PagedProblem) -> LaunchConfig:
    """Launch choices that force one of the two kernels on this GPU."""
    q, requests, size = problem.q, problem.mode.shape[0], problem.pools[0].shape[1]
    tiles = (-(-q.shape[0] // QUERY_BLOCK) + requests) * q.shape[1]
    capability = capability_of(0)
    if path == "sm80" and capability == (9, 0):
        own = paged_config((8, 0), processors_of(0), q.shape[2], requests, tiles, size)
        return LaunchConfig(own.name, "sm_90", own.threads, own.shared_bytes, own.grid, own.macros)
    return paged_config(capability, processors_of(0), q.shape[2], requests, tiles, size)


def run_paged(problem: PagedProblem, path: str, debug: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    """Outputs of one launch, poisoned before, inside guard bands."""
    p = problem
    out, store = guarded(tuple(p.q.shape), p.q.dtype, p.q.device)
    lse, lse_store = guarded((p.q.shape[1], p.q.shape[0]), torch.float32, p.q.device)
    plan = prepare_paged(p.q, *p.pools, out, p.table, p.mode, p.pattern, forward_config(path, p), debug)
    launch_paged(out, lse, p.q, *p.pools, p.table, p.starts, p.lengths, p.mode, plan)
    check_guards(store)
    check_guards(lse_store)
    return out, lse


def judge_decode(out: Tensor, problem: PagedProblem) -> float:
    """Raise unless the error is at most twice that of PyTorch in the problem's own dtype, plus one rounding."""
    p = problem
    rest = (p.table, p.lengths, p.mode, p.pattern)
    exact = paged_decode_oracle(p.q.double(), *(x.double() for x in p.clean), *rest)
    same = paged_decode_oracle(p.q, *p.clean, *rest, compute=p.q.dtype)
    return _judge(out, exact, same)


def reference(problem: PagedProblem) -> tuple[Tensor, Tensor, Tensor]:
    """Output and LSE of the forward pass in fp64, and the output of plain PyTorch in the problem's own dtype."""
    p = problem
    rest = (p.table, p.starts, p.lengths, p.mode, p.pattern)
    exact, lse = paged_oracle(p.q.double(), *(x.double() for x in p.clean), *rest)
    return exact, lse, paged_oracle(p.q, *p.clean, *rest, compute=p.q.dtype)[0]


def judge_forward(out: Tensor, lse: Tensor, expected: tuple[Tensor, Tensor, Tensor]) -> float:
    """The same for the forward pass, and its LSE to 2e-4."""
    exact, exact_lse, same = expected
    assert not lse.isnan().any(), "NaN in the LSE"
    lse_error = (lse.double() - exact_lse).abs().amax().item()
    assert lse_error <= 2e-4, f"LSE error {lse_error:.3e}"
    return _judge(out, exact, same)


def _judge(out: Tensor, exact: Tensor, same: Tensor) -> float:
    assert not out.isnan().any(), "NaN in the output"
    error, own = ((x.double() - exact).abs().amax().item() for x in (out, same))
    rounding = torch.finfo(out.dtype).eps * max(1.0, exact.abs().amax().item())
    assert error <= 2 * own + rounding, f"output error {error:.3e}, PyTorch's own {own:.3e}"
    return error
