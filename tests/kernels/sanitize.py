"""The kernels on small problems, for compute-sanitizer, and who its reports name.

compute-sanitizer --tool racecheck --kernel-name kns=attention_ --print-limit 10000 \
  python -m tests.kernels.sanitize run ELASTIC_EVERY_LANE=1
compute-sanitizer --tool initcheck --print-limit 100000 python -m tests.kernels.sanitize run > log
python -m tests.kernels.sanitize count log
compute-sanitizer --kernel-name kns=attention_decode python -m tests.kernels.sanitize decode
compute-sanitizer --kernel-name kns=route_prompt python -m tests.kernels.sanitize router
compute-sanitizer --tool racecheck --kernel-name kns=xattention python -m tests.kernels.sanitize select
compute-sanitizer --tool racecheck --kernel-name kns=reach python -m tests.kernels.sanitize reach
compute-sanitizer --kernel-name kns=attention_ python -m tests.kernels.sanitize paged

The kernels are compiled with line numbers. initcheck must see all kernels, because PyTorch's write what ours read;
`count` then tells whose reads it reports. `run` is forward, backward and the route's gap, `decode` decode attention,
`router` the router, `select` XAttention's choice of key blocks, `reach` both kernels of reach, `paged` what reads
pages. memcheck sees an overrun of a tensor only where PyTorch does not cut tensors out of larger blocks: set
PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from elastic.kernels import jit, route_gap
from elastic.kernels.params import Pattern, Ranges
from elastic.kernels.route_prompt import route_prompt
from tests.kernels.generators import placed, random_problem, tensor
from tests.kernels.gpu import paths, run
from tests.kernels.gpu_backward import forward_exact, run_backward, upstream
from tests.kernels.gpu_decode import configs, random_decode, run_decode
from tests.kernels.gpu_paged import decode_configs, random_paged, run_paged, run_paged_decode
from tests.kernels.gpu_reach import judge_reach, run_reach
from tests.kernels.gpu_selection import Selection, judge_selection, run_selection
from tests.kernels.gpu_sinks import decode_with_sinks
from tests.kernels.test_reach_gpu import mixed
from tests.kernels.test_router_gpu import linears, operands, trained_router

SEEDS = (2, 232, 157, 182, 221, 0, 1)  # small; tails, packing, every mode, both head dims
OURS = re.compile(r"attention_\w+|route_prompt|xattention_\w+|reach_\w+")
DECODE_SEEDS = (1, 3, 9, 11, 16)


def main() -> None:
    """Run the problems, or count the reports of a log by kernel."""
    part, *rest = sys.argv[1:]
    if part == "count":
        for name, number in count(Path(rest[0]).read_text()).most_common():
            say(f"{number:8d} {name}")
        return
    options = jit.Variant.options
    jit.Variant.options = property(lambda self: (*options.fget(self), "-lineinfo"))  # type: ignore[method-assign,assignment]
    PARTS[part](tuple(rest))
    say(f"{part}: all done")


def say(line: str) -> None:
    """A line at once: a run that is stopped must show how far it came."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def done(what: str, started: float) -> None:
    """Wait for the GPU and tell what ran."""
    torch.cuda.synchronize()
    say(f"{what} done in {time.perf_counter() - started:.1f} s")


def attention(debug: tuple[str, ...]) -> None:
    """Forward, backward in both orders of addition, and the route's gap on the small random problems."""
    for seed in SEEDS:
        started = time.perf_counter()
        problem = random_problem(seed)
        grad, (out, lse) = upstream(problem, seed), forward_exact(problem)
        run(problem, "sm90")
        for deterministic in (False, True):
            run_backward(problem, grad, out, lse, deterministic=deterministic, debug=debug)
        if problem.bits is None:
            q, k, v, mode, pattern, ranges, _ = problem.args()
            route_gap(grad, out, q, k, v, 1 - mode, pattern, ranges, share=0.5)
        done(f"seed {seed} {list(problem.q.shape)} {problem.q.dtype}", started)


def decode(_debug: tuple[str, ...]) -> None:
    """Decode problems in several launch shapes."""
    for seed in DECODE_SEEDS:
        started = time.perf_counter()
        problem = random_decode(seed)
        for config in configs(problem):
            run_decode(problem, config)
            run_decode(decode_with_sinks(seed), config)
        done(f"decode seed {seed} {list(problem.q.shape)}", started)


def route(_debug: tuple[str, ...]) -> None:
    """The router on a few samples."""
    for kv_heads, dim in ((8, 128), (3, 64)):
        started = time.perf_counter()
        router = trained_router(kv_heads, dim)
        keys = operands(2, kv_heads, dim, torch.bfloat16, pool=20)
        route_prompt(*keys, linears(router), (router.mean, router.var, router.count))
        done(f"router {kv_heads} heads, D {dim}", started)


def small_selections() -> list[Selection]:
    """One row tile and several, one key tile and two, tails that are cleared, packed samples, masses in the scratch."""
    gen = torch.Generator("cuda").manual_seed(0)
    found = []
    for tokens, past, heads, dim, stride, block in (
        (100, 0, 1, 64, 8, 64),
        (1300, 0, 1, 64, 8, 128),
        (300, 2100, 2, 64, 8, 64),
        (2100, 0, 1, 128, 16, 128),
    ):
        q = tensor(gen, (1, tokens, heads, dim), "plain", torch.bfloat16)
        k = tensor(gen, (1, tokens + past, 1, dim), "plain", torch.bfloat16)
        mode = torch.full((1, 1), 2, dtype=torch.int32, device="cuda")
        found.append(Selection(q, k, mode, stride, 0.9, Pattern.without_streaming(block)))
    q, k = (tensor(gen, (1, 700, 2, 64), "plain", torch.float16) for _ in range(2))
    cuts = {"begin_q": [0, 301], "end_q": [301, 690], "begin_k": [0, 301], "end_k": [301, 690], "row": [0, 0]}
    mode = torch.tensor([[2, 0], [1, 2]], dtype=torch.int32, device="cuda")
    return [*found, Selection(q, k, mode, 8, 0.9, Pattern.without_streaming(64, 0.125), placed(cuts, q, k))]


def select(debug: tuple[str, ...]) -> None:
    """The choice of key blocks on the smallest problems, judged too: racecheck needs a minute for larger ones."""
    for problem in small_selections():
        started = time.perf_counter()
        judge_selection(*run_selection(problem, debug), problem)
        shapes, block = f"q {list(problem.q.shape)} k {list(problem.k.shape)}", problem.pattern.block
        done(f"select {shapes} stride {problem.stride} block {block}", started)


def reach_problems() -> Iterator[tuple[Tensor, Tensor, Pattern, Ranges]]:
    """The small random problems, and longer ones, whose key tiles take every place of a ring several times."""
    for seed in SEEDS:
        q, k, _, _, pattern, ranges, _ = random_problem(seed).args()
        yield q, k, pattern, ranges
    for group, dim in ((4, 128), (3, 64)):
        q, k, ranges = mixed(group, dim, torch.bfloat16)
        yield q, k, Pattern(64, 256), ranges


def far(_debug: tuple[str, ...]) -> None:
    """Reach by every kernel, the CTAs one for all heads and several for each."""
    for q, k, pattern, ranges in reach_problems():
        started = time.perf_counter()
        for path in paths():
            for processors in (1, 7):
                judge_reach(run_reach(q, k, pattern, ranges, path, processors), q, k, pattern, ranges)
        done(f"reach q {list(q.shape)} k {list(k.shape)} {q.dtype}", started)


def over_pages(_debug: tuple[str, ...]) -> None:
    """Decoding and the forward pass over pages, small."""
    for seed in SEEDS:
        started = time.perf_counter()
        problem = random_paged(seed, decode=True, longest=300)
        for config in decode_configs(problem):
            run_paged_decode(problem, config)
        problem = random_paged(seed, decode=False, longest=300)
        for path in paths():
            run_paged(problem, path)
        done(f"pages of {problem.pools[0].shape[1]}, seed {seed}", started)


def count(log: str) -> Counter[str]:
    """Reports by kernel: ours by name, all others together."""
    found: Counter[str] = Counter()
    for line in log.splitlines():
        place = re.search(r"=====\s+at (.*?)\+0x[0-9a-f]+", line)
        if place:
            ours = OURS.search(place[1])
            found[ours[0] if ours else "other kernels (PyTorch)"] += 1
    return found


PARTS: dict[str, Callable[[tuple[str, ...]], None]] = {
    "run": attention,
    "decode": decode,
    "router": route,
    "select": select,
    "reach": far,
    "paged": over_pages,
}

if __name__ == "__main__":
    main()
