"""Where the host time of one call goes: python tests/bench/profile_host.py."""

import cProfile
import pstats
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from tests.bench.bench_attention import Case, host_microseconds, ours

if __name__ == "__main__":
    call = ours(Case("host", 1024).problem(), None)
    call()
    torch.cuda.synchronize()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(500):
        call()
    profile.disable()
    pstats.Stats(profile).sort_stats("tottime").print_stats(22)
    print("host us", host_microseconds())
