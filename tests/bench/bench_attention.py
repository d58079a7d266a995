"""Times the fused attention kernel against its competitors, and writes records (JSON) and a table.

python tests/bench/bench_attention.py                     every case, every competitor
python tests/bench/bench_attention.py --only ours --cases dense-16k,hybrid-64k
python tests/bench/bench_attention.py --table             rewrite RESULTS.md from the records, no GPU needed

Times are medians of CUDA-event timings on random data. Before a case is timed, its output is compared with cuDNN or
FlexAttention where they can compute it. eff counts the FLOPs of visited 128-blocks only.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from elastic.kernels import attention_forward, bits_from_mask, kernel_path
from tests.bench import records
from tests.kernels.generators import Problem, dense_problem

BLOCK = 128


@dataclass(frozen=True)
class Case:
    """One line of the table: `streaming` of `kv_heads` KV heads in streaming mode, or a random block mask."""

    name: str
    length: int
    streaming: int = 0
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    density: float | None = None  # of a random block mask on every head

    def problem(self) -> Problem:
        """Tensors of the case, on the GPU."""
        size = {"heads": self.heads, "kv_heads": self.kv_heads, "dim": self.dim}
        return dense_problem(self.length, streaming=self.streaming, **size)


def all_cases() -> list[Case]:
    """Lengths 8K-256K at MSR 0, 0.5, 0.75 and 1, a random block mask, and SmolLM2-135M's heads."""
    cases = []
    for length in (8192, 16384, 32768, 65536, 131072, 262144):
        size = f"{length // 1024}k"
        cases.append(Case(f"dense-{size}", length))
        cases += [Case(f"streaming-{n}of8-{size}", length, streaming=n) for n in (4, 6, 8)]
    cases.append(Case("random-25pct-64k", 65536, density=0.25))
    cases += [Case(f"dense-d64-{n // 1024}k", n, heads=9, kv_heads=3, dim=64) for n in (8192, 65536)]
    return cases


def random_bits(case: Case) -> torch.Tensor:
    """Bits of a random causal block mask that always holds the diagonal."""
    blocks = case.length // BLOCK
    gen = torch.Generator("cuda").manual_seed(7)
    mask = torch.rand(1, case.heads, blocks, blocks, generator=gen, device="cuda") < case.density
    mask |= torch.eye(blocks, dtype=torch.bool, device="cuda")
    return bits_from_mask(mask.tril())


def visited_blocks(case: Case, bits: torch.Tensor | None) -> float:
    """128 x 128 blocks that the query heads visit, the diagonal ones counted half."""
    n = case.length // BLOCK
    dense = n * n / 2
    if bits is not None:
        from elastic.kernels.block_bits import mask_from_bits

        return float(mask_from_bits(bits).sum().item()) - case.heads * n / 2
    local, sink = 2048 // BLOCK, 1
    streaming = sum(min(i + 1, local + sink) - 0.5 for i in range(n))
    group = case.heads // case.kv_heads
    return group * (case.streaming * streaming + (case.kv_heads - case.streaming) * dense)


def flops(case: Case, bits: torch.Tensor | None) -> float:
    """FLOPs of the visited blocks."""
    return visited_blocks(case, bits) * BLOCK * BLOCK * case.dim * 4


def measure(call: Callable[[], Any], budget_ms: float = 400.0) -> float:
    """Median milliseconds of a call, over 5 to 50 repeats after warm-up."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    once = (time.perf_counter() - start) * 1e3
    repeats = int(min(50, max(5, budget_ms / max(once, 1e-3))))
    for _ in range(max(2, repeats // 5)):
        call()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for first, last in pairs:
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in pairs)


def ours(problem: Problem, bits: torch.Tensor | None) -> Callable[[], torch.Tensor]:
    """Our operator on the problem."""
    mode = torch.full_like(problem.mode, 2) if bits is not None else problem.mode
    size = {"sink": 128, "window": 2048, "granule": "block", "block": BLOCK, "bits": bits}
    return lambda: attention_forward(problem.q, problem.k, problem.v, mode, **size)[0]


def host_microseconds() -> float:
    """Host time of one call while the GPU is busy with earlier ones: launch path only, everything cached."""
    call, calls, times = ours(Case("host", 1024).problem(), None), 20, []
    for _ in range(75):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[25:])


def extra_bytes(length: int = 262144) -> int:
    """Device memory of a call beyond its inputs and outputs, 6 of 8 KV heads streaming."""
    problem = dense_problem(length, streaming=6)
    call = ours(problem, None)
    out = call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    del out
    call()
    peak = torch.cuda.max_memory_allocated()
    return peak - before - problem.q.shape[2] * length * 4


def sdpa(problem: Problem, backend: SDPBackend) -> Callable[[], torch.Tensor]:
    """PyTorch's dense attention by one backend."""
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


def peak_tflops() -> float:
    """bf16 8192^3 matrix product of this GPU, the ceiling that the table is read against."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / measure(lambda: a @ b) / 1e9


def command() -> str:
    """How to repeat this run; where its records went does not matter."""
    words = list(sys.argv)
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return "python " + " ".join(words)


def git_commit() -> str:
    """The checkout's commit, where git knows it."""
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def run_case(case: Case, only: set[str]) -> list[dict[str, Any]]:
    """Records of one case: milliseconds and eff TFLOP/s of every contestant."""
    problem = case.problem()
    bits = random_bits(case) if case.density is not None else None
    contestants: dict[str, Callable[[], torch.Tensor]] = {"ours": ours(problem, bits)}
    if case.streaming == 0 and bits is None:
        contestants["cudnn"] = sdpa(problem, SDPBackend.CUDNN_ATTENTION)
        contestants["flash2"] = sdpa(problem, SDPBackend.FLASH_ATTENTION)
    elif case.length <= 65536 and {"flex", "serial"} & only:
        from tests.bench import competitors

        contestants |= competitors.sparse(problem, case.streaming, bits)
    work, found, reference = flops(case, bits), [], None
    for name, call in contestants.items():
        if name not in only:
            continue
        out = call()
        if reference is None:
            reference = out
        else:
            other = out.transpose(1, 2) if out.shape != reference.shape else out
            difference = (other.float() - reference.float()).abs().amax().item()
            if difference > 0.05:
                raise RuntimeError(f"{case.name}: {name} differs from ours by {difference}; nothing is timed")
        del out
        ms = measure(call)
        found.append({"case": case.name, "who": name, "metric": "time", "value": ms, "unit": "ms"})
        found.append({"case": case.name, "who": name, "metric": "eff", "value": work / ms / 1e9, "unit": "TFLOP/s"})
        print(f"{case.name:24s} {name:8s} {ms:9.4f} ms {work / ms / 1e9:7.1f} TFLOP/s", flush=True)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="", help="comma-separated names; default all")
    parser.add_argument("--only", default="ours,cudnn,flash2,flex,serial", help="contestants")
    parser.add_argument("--out", default=str(records.RESULTS), help="directory of the JSON records")
    parser.add_argument("--tag", default="attention", help="file name of the records")
    parser.add_argument("--commit", default="", help="commit to state where git is not at hand")
    parser.add_argument("--table", action="store_true", help="only rewrite RESULTS.md from the records")
    args = parser.parse_args()
    if args.table:
        records.write_table()
        return
    chosen = [c for c in all_cases() if not args.cases or c.name in args.cases.split(",")]
    found: list[dict[str, Any]] = []
    if not args.cases or "host" in args.cases.split(","):
        found.append({"case": "host", "who": "ours", "metric": "host time", "value": host_microseconds(),
                      "unit": "us"})  # fmt: skip
    for case in chosen:
        found += run_case(case, set(args.only.split(",")))
        torch.cuda.empty_cache()
    if not args.cases or "memory" in args.cases.split(","):
        found.append({"case": "memory-256k", "who": "ours", "metric": "extra memory", "value": extra_bytes(),
                      "unit": "bytes"})  # fmt: skip
    found.append({"case": "matmul-8192", "who": "cublas", "metric": "eff", "value": peak_tflops(), "unit": "TFLOP/s"})
    shared = {
        "gpu": torch.cuda.get_device_name(),
        "kernel": kernel_path(torch.device("cuda", 0)),
        "versions": records.versions(),
        "commit": args.commit or git_commit(),
        "command": command(),
    }
    path = records.save(Path(args.out), args.tag, [{**record, **shared} for record in found])
    print(f"wrote {path}")
    for record in found:
        if record["case"] in ("host", "memory-256k", "matmul-8192"):
            print(record["case"], record["who"], record["value"], record["unit"])


if __name__ == "__main__":
    main()
