"""First look at a kernel on a GPU, with the watchdog on: python -m tests.kernels.smoke sm90 [seeds]."""

import sys

from tests.kernels.generators import random_problem
from tests.kernels.gpu import judge, reference, run


def main() -> None:
    """Run the first seeds on one path and say which fail."""
    path, seeds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 40
    failed = 0
    for seed in range(seeds):
        problem = random_problem(seed)
        try:
            judge(*run(problem, path, ("ELASTIC_WATCHDOG=1",) if path == "sm90" else ()), problem, reference(problem))
        except AssertionError as error:
            failed += 1
            shape = list(problem.q.shape), list(problem.k.shape), problem.q.dtype, problem.mode.tolist()
            sys.stdout.write(f"seed {seed} {shape} {problem.pattern} partial={problem.ranges.partial}: {error}\n")
    sys.stdout.write(f"{path}: {failed} of {seeds} failed\n")


if __name__ == "__main__":
    main()
