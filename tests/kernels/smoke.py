"""First look at a kernel on a GPU, with the watchdog on:
python -m tests.kernels.smoke sm90|sm80|backward|selection [seeds].
"""

import sys

from tests.kernels.generators import random_problem
from tests.kernels.gpu import judge, reference, run
from tests.kernels.gpu_backward import forward_exact, judge_gradients, reference_gradients, run_backward, upstream
from tests.kernels.gpu_selection import judge_selection, random_selection, run_selection

WATCHDOG = ("ELASTIC_WATCHDOG=1",)


def check(path: str, seed: int) -> None:
    """Raise unless the problem of this seed comes out right on this path."""
    if path == "selection":
        selection = random_selection(seed)
        judge_selection(*run_selection(selection, WATCHDOG), selection)
        return
    problem = random_problem(seed)
    if path == "backward":
        grad = upstream(problem, seed)
        found = run_backward(problem, grad, *forward_exact(problem), deterministic=seed % 2 == 1, debug=WATCHDOG)
        judge_gradients(found, problem, reference_gradients(problem, grad))
    else:
        judge(*run(problem, path, WATCHDOG if path == "sm90" else ()), problem, reference(problem))


def main() -> None:
    """Run the first seeds on one path and say which fail."""
    path, seeds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 40
    failed = 0
    for seed in range(seeds):
        try:
            check(path, seed)
        except AssertionError as error:
            failed += 1
            problem = random_selection(seed) if path == "selection" else random_problem(seed)
            shape = list(problem.q.shape), list(problem.k.shape), problem.q.dtype, problem.mode.tolist()
            sys.stdout.write(f"seed {seed} {shape} partial={problem.ranges.partial}: {error}\n")
    sys.stdout.write(f"{path}: {failed} of {seeds} failed\n")


if __name__ == "__main__":
    main()
