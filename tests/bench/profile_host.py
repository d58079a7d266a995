"""Where the host time of one call goes: python -m tests.bench.profile_host."""

import cProfile
import pstats
import sys

import torch

from elastic.bench.cases import Case
from elastic.bench.contestants import forward
from elastic.bench.timing import host_microseconds

if __name__ == "__main__":
    inputs = Case(1024).inputs("cuda")
    forward(inputs)
    torch.cuda.synchronize()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(500):
        forward(inputs)
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(22)
    sys.stdout.write(f"host us {host_microseconds(lambda: forward(inputs))}\n")
