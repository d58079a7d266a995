"""`elastic eval`: several methods on RULER through lm-evaluation-harness, in one command that resumes."""

import argparse
import importlib.util
import logging
import os
import time
from pathlib import Path

from elastic.config import SparseConfig
from elastic.console import Parser, complain, say

SUMMARY = "compare dense, streaming, static, random and trained routing on long-context benchmarks"


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = Parser(prog="elastic eval", description=SUMMARY)
    parser.add_argument("--tasks", nargs="+", default=["ruler"], metavar="TASK", help="ruler (default) or its tasks")
    parser.add_argument("--lengths", default="1024,2048", help="tokens of prompt and answer (default 1024,2048)")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="samples per task and length (default 50)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["dense", "streaming"],
        metavar="METHOD",
        help="dense, streaming, xattention[:<threshold>], random:<msr>, static:<pattern file>, elastic:<checkpoint> "
        "(default: dense streaming)",
    )
    parser.add_argument(
        "--backbone", default="smollm2-135m", help="of methods without checkpoint (default smollm2-135m)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), metavar="DIR", help="default runs/eval")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples in a forward pass (default 8)")
    parser.add_argument("--chat", action="store_true", help="put prompts into the chat template")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")
    parser.add_argument("--sink", type=int, default=64, help="of methods without checkpoint, in tokens (default 64)")
    parser.add_argument("--window", type=int, default=256, help="likewise (default 256)")
    parser.add_argument("--block", type=int, default=64, help="likewise (default 64)")
    parser.add_argument("--stride", type=int, default=16, help="of XAttention (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of samples and random patterns (default 0)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    # Threads that spin while they wait make a shared machine many times slower; torch must not be loaded before this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        run(args)
    except (ValueError, OSError) as error:
        return complain("eval", error)
    return 0


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked, evaluate, print the table, write the files."""
    from elastic.evaluation.methods import Method

    methods = [Method.parse(name) for name in args.methods]
    for package in ("lm_eval", "wonderwords"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package} is missing; run `pip install 'elastic-attention[eval]'`")
    from elastic.evaluation.benchmark import choose
    from elastic.evaluation.ruler import Ruler
    from elastic.evaluation.runner import Plan, run
    from elastic.evaluation.summary import summary_table, write_summary

    benchmarks = [Ruler()]
    tasks = tuple(choose(benchmarks, args.tasks))
    try:
        lengths = tuple(int(length) for length in args.lengths.split(","))
    except ValueError as error:
        raise ValueError(
            f"--lengths {args.lengths!r}: expected numbers divided by commas, such as 1024,2048"
        ) from error
    sparse = SparseConfig(sink=args.sink, window=args.window, block=args.block, stride=args.stride)
    plan = Plan(
        args.backbone,
        args.device,
        args.dtype,
        tasks,
        lengths,
        args.limit,
        args.batch_size,
        args.chat,
        sparse,
        args.seed,
    )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its notes on things that are meant
    began = time.perf_counter()
    rows = run(plan, methods, args.out)
    say(f"\nscore ± half of the 95 % interval @ MSR\n\n{summary_table(rows)}\n")
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in tasks):
        if benchmark.name in args.tasks and benchmark.left_out():
            left_out = "; ".join(f"{task} ({reason})" for task, reason in benchmark.left_out().items())
            say(f"Not in the means of {benchmark.name}: {left_out}")
        for correction in benchmark.corrections:
            say(f"Corrected: {correction}")
    files = ", ".join(str(path) for path in write_summary(rows, args.out))
    say(f"Written: {args.out / 'samples'}, {args.out / 'summary.json'}, {files}")
    say(f"Done in {(time.perf_counter() - began) / 60:.1f} minutes.")
