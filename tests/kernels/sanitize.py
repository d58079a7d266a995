"""The kernels on small problems, for compute-sanitizer, and who its reports name.

compute-sanitizer --tool racecheck --kernel-name kns=attention_ --print-limit 10000 \
  python -m tests.kernels.sanitize run ELASTIC_EVERY_LANE=1
compute-sanitizer --tool initcheck --print-limit 100000 python -m tests.kernels.sanitize run > log
python -m tests.kernels.sanitize count log
compute-sanitizer --kernel-name-exclude kns=at:: python -m tests.kernels.sanitize decode

The kernels are compiled with line numbers. initcheck must see all kernels, because PyTorch's write what ours read;
`count` then tells whose reads it reports. `decode` runs decode attention and the router instead.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import torch

from elastic.kernels import jit, route_gap
from elastic.kernels.route_prompt import route_prompt
from tests.kernels.generators import random_problem
from tests.kernels.gpu import run
from tests.kernels.gpu_backward import forward_exact, run_backward, upstream
from tests.kernels.gpu_decode import configs, random_decode, run_decode
from tests.kernels.test_router_gpu import linears, operands, trained_router

SEEDS = (2, 232, 157, 182, 221, 0, 1)  # small; tails, packing, every mode, both head dims
OURS = re.compile(r"attention_\w+|route_prompt")
DECODE_SEEDS = (1, 3, 9, 11, 16)


def main() -> None:
    """Run the problems, or count the reports of a log by kernel."""
    if sys.argv[1] == "count":
        for name, number in count(Path(sys.argv[2]).read_text()).most_common():
            sys.stdout.write(f"{number:8d} {name}\n")
        return
    options = jit.Variant.options
    jit.Variant.options = property(lambda self: (*options.fget(self), "-lineinfo"))  # type: ignore[method-assign,assignment]
    if sys.argv[1] == "decode":
        return decode_and_route()
    for seed in SEEDS:
        problem = random_problem(seed)
        grad, (out, lse) = upstream(problem, seed), forward_exact(problem)
        run(problem, "sm90")
        for deterministic in (False, True):
            run_backward(problem, grad, out, lse, deterministic=deterministic, debug=tuple(sys.argv[2:]))
        if problem.bits is None:
            q, k, v, mode, pattern, ranges, _ = problem.args()
            route_gap(grad, out, q, k, v, 1 - mode, share=0.5, **pattern._asdict(), **ranges.named())
        torch.cuda.synchronize()
        sys.stdout.write(f"seed {seed} done\n")


def decode_and_route() -> None:
    """Decode problems in several launch shapes, and the router on a few samples."""
    for seed in DECODE_SEEDS:
        problem = random_decode(seed)
        for config in configs(problem):
            run_decode(problem, config)
        sys.stdout.write(f"decode seed {seed} {list(problem.q.shape)} done\n")
    for kv_heads, dim in ((8, 128), (3, 64)):
        router = trained_router(kv_heads, dim)
        keys = operands(2, kv_heads, dim, torch.bfloat16, pool=20)
        route_prompt(*keys, linears(router), (router.mean, router.var, router.count))
        torch.cuda.synchronize()
        sys.stdout.write(f"router {kv_heads} heads, D {dim} done\n")


def count(log: str) -> Counter[str]:
    """Reports by kernel: ours by name, all others together."""
    found: Counter[str] = Counter()
    for line in log.splitlines():
        place = re.search(r"=====\s+at (.*?)\+0x[0-9a-f]+", line)
        if place:
            ours = OURS.search(place[1])
            found[ours[0] if ours else "other kernels (PyTorch)"] += 1
    return found


if __name__ == "__main__":
    main()
