"""`elastic eval`: several methods on the test rows of packed data, RULER and LongBench, in one command that resumes."""

import argparse
import importlib.util
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from elastic.commands.catalogue import COMMANDS
from elastic.config import RopeScaling, SparseConfig
from elastic.console import Parser, complain, say
from elastic.files import check_place
from elastic.routing.methods import GRAMMAR, caveats, parse_methods

if TYPE_CHECKING:
    from elastic.evaluation.benchmark import Benchmark
    from elastic.evaluation.runner import EvaluationPlan


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = Parser(prog="elastic eval", description=COMMANDS["eval"])
    _add_tasks(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["dense", "streaming"],
        metavar="METHOD",
        help=f"{GRAMMAR} (default: dense streaming)",
    )
    against = "of the methods, those that the others are compared with (default: dense and the first static)"
    parser.add_argument("--against", nargs="+", metavar="METHOD", help=against)
    parser.add_argument(
        "--sweep",
        type=Path,
        metavar="FILE.tsv",
        help="instead of --methods: the pattern file's heads streaming from none to all, by score; a file that is not "
        "there is made first, by ranking the backbone's heads by retrieval score",
    )
    parser.add_argument("--points", type=int, default=9, metavar="N", help="of a sweep (default 9)")
    backbone = "of all methods (default: that of the checkpoints among them, else smollm2-135m)"
    parser.add_argument("--backbone", metavar="NAME", help=backbone)
    rope = "stretch the backbone's RoPE for lengths over its own, by length / its own: yarn, or ntk (dynamic NTK)"
    parser.add_argument("--rope", choices=get_args(RopeScaling), help=rope)
    parser.add_argument("--out", type=Path, default=Path("runs/eval"), metavar="DIR", help="default runs/eval")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="samples in a forward pass (default 16)"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put prompts into the chat template, where the benchmark allows it"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    devices = "processes that the samples are shared out to, a GPU each with cuda (default 1)"
    parser.add_argument("--devices", type=int, default=1, metavar="N", help=devices)
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")
    sink = "of methods without checkpoint, in tokens (default: that of the checkpoints among the methods, else 64)"
    parser.add_argument("--sink", type=int, metavar="N", help=sink)
    parser.add_argument("--window", type=int, metavar="N", help="likewise (else 256)")
    parser.add_argument("--block", type=int, metavar="N", help="likewise (else 64)")
    parser.add_argument("--stride", type=int, metavar="N", help="of XAttention, likewise (else 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default 0)")
    return parser


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """What is evaluated, and where its data is."""
    tasks = (
        "names of --rows, ruler, ruler-paper, longbench_e, longbench2, or their tasks (default: all --rows and ruler)"
    )
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=tasks)
    rows = "packed data whose test rows are tasks of that name, such as foreign=data/foreign"
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME=DIR", help=rows)
    parser.add_argument(
        "--preset",
        choices=("official", "paper"),
        help="RULER's thirteen tasks with 500 samples, or the paper's eleven with 50, instead of --tasks and --limit",
    )
    parser.add_argument("--lengths", default="1024,2048", help="tokens of prompt and answer (default 1024,2048)")
    limit = "samples per task and length (default: 50 with RULER, else all)"
    parser.add_argument("--limit", type=int, metavar="N", help=limit)
    parser.add_argument("--data", type=Path, metavar="DIR", help="official LongBench files (default: the hub)")
    for name, ways in (
        ("essays", "haystack of five RULER tasks: text file, folder or PaulGrahamEssays.json, or hub"),
        ("squad", "dev-v2.0.json, or hub"),
        ("hotpotqa", "hotpot_dev_distractor_v1.json, or hub"),
        ("words", "RULER's english_words.json or a list of words, for ruler_cwe over about 64K"),
    ):
        parser.add_argument(f"--{name}", metavar="PATH", help=ways)


def main(argv: list[str]) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        return complain("eval", error)
    return 0


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked, evaluate, print the table, write the files."""
    named = parse_methods(args.methods, of_run=False)
    check_place("--out", args.out, folder=True)
    for package in ("lm_eval", "wonderwords"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package} is missing; run `pip install 'elastic-attention[eval]'`")
    from elastic.evaluation.comparison import references
    from elastic.evaluation.like_with_like import (
        check_orders,
        common_backbone,
        common_sizes,
        common_template,
        uneven,
    )
    from elastic.evaluation.runner import run
    from elastic.evaluation.sweep import make_ranking, sweep_methods
    from elastic.training.launch import launch

    methods = named if args.sweep is None else sweep_methods(args.sweep, args.points)
    against = references(methods, args.against)
    sizes = {"sink": args.sink, "window": args.window, "block": args.block, "stride": args.stride}
    backbone, sparse = common_backbone(methods, args.backbone), common_sizes(methods, sizes)
    check_orders(methods, sparse)
    notes = [f"Uneven: {difference}" for difference in uneven(methods, sparse)]
    notes += [f"Caveat: {caveat}" for caveat in caveats(methods)]
    tasks, samples = _tasks(args)
    template = common_template(methods if args.chat else [])
    plan = _plan(args, backbone, sparse, tasks, samples, template)
    notes += _stretching(plan)
    notes += [f"No samples: {', '.join(missing)}"] if (missing := plan.missing()) else []
    for package in ("lm_eval", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)  # their notes on things that are meant
    processes = launch(args.device, args.devices)
    began = time.perf_counter()
    with processes.ending_together():
        if args.sweep is not None:
            make_ranking(replace(plan, device=str(processes.device)), args.sweep)  # one makes it, the others wait
        rows = run(plan, methods, args.out, processes)
    if not processes.rank:
        _report(args, plan, rows, against, notes)
        say(f"Done in {(time.perf_counter() - began) / 60:.1f} minutes.")


def _stretching(plan: "EvaluationPlan") -> list[str]:
    """What a table says of a backbone that reads more than its own length."""
    lengths = (length for length in plan.lengths if plan.stretched(length) > 1)
    told = ", ".join(f"{length} tokens by {plan.stretched(length):g}" for length in lengths)
    return [f"Beyond the length of {plan.backbone}, its RoPE is stretched ({plan.rope}): {told}"] if told else []


def _tasks(args: argparse.Namespace) -> tuple[list[tuple["Benchmark", str]], int | None]:
    """What is evaluated, and how many samples of each task and length; None: all."""
    from elastic.evaluation.benchmark import choose
    from elastic.evaluation.longbench import TASKS, LongBench
    from elastic.evaluation.packed_rows import of_folder
    from elastic.evaluation.ruler import PRESETS, Ruler
    from elastic.evaluation.ruler_data import RulerData

    data = RulerData(args.essays, args.squad, args.hotpotqa, args.words)
    benchmarks: list[Benchmark] = [Ruler(data), Ruler(data, paper=True), *(LongBench(n, args.data) for n in TASKS)]
    known = {name for benchmark in benchmarks for name in (benchmark.name, *benchmark.tasks())}
    families: dict[str, list[str]] = {}
    for given in args.rows:
        name, equals, folder = given.partition("=")
        if not (name and equals and folder) or name in families or name in known:
            raise ValueError(f"--rows {given}: expected NAME=DIR with a name of its own, such as foreign=data/foreign")
        made = of_folder(name, Path(folder))
        families[name] = [benchmark.name for benchmark in made]
        benchmarks += made
    tasks = choose(benchmarks, [name for given in _asked(args) for name in families.get(given, [given])])
    samples = PRESETS[args.preset][1] if args.preset else None
    usual = next((benchmark.usual_samples for benchmark, _ in tasks if benchmark.usual_samples is not None), None)
    return tasks, next((count for count in (args.limit, samples, usual) if count is not None), None)


def _asked(args: argparse.Namespace) -> list[str]:
    """Names of tasks and benchmarks that the command is for."""
    from elastic.evaluation.ruler import PRESETS

    family = PRESETS[args.preset][0] if args.preset else "ruler"
    return args.tasks or [*(given.partition("=")[0] for given in args.rows), family]


def _report(
    args: argparse.Namespace, plan: "EvaluationPlan", rows: list[dict[str, Any]], against: list[str], notes: list[str]
) -> None:
    """Print the tables and what there is to say about them; write the files."""
    from elastic.evaluation.benchmark import corrections_of, reasons
    from elastic.evaluation.comparison import compare
    from elastic.evaluation.paper import write_tables
    from elastic.evaluation.summary import group_table, summary_table, write_summary
    from elastic.evaluation.sweep import write_sweep

    tables = "\n\n".join(filter(None, (summary_table(rows), group_table(rows))))
    say(f"\nscore ± half of the 95 % interval @ MSR, on {plan.backbone}\n\n{tables}\n")
    for note in notes:
        say(note)
    for benchmark in dict.fromkeys(benchmark for benchmark, _ in plan.tasks):
        if benchmark.name in _asked(args) and benchmark.left_out():
            say(f"Not in the means of {benchmark.name}: {reasons(benchmark.left_out())}")
        for correction in corrections_of(benchmark, [task for owner, task in plan.tasks if owner is benchmark]):
            say(f"Corrected: {correction}")
        for row in benchmark.skipped:
            say(f"Not a usable document: {row}")
    written = write_tables(compare(rows, args.out, against), against, notes, args.out)
    written += write_summary(rows, args.out, notes) + (write_sweep(rows, args.out) if args.sweep else [])
    say(f"Written: {args.out / 'samples'}, {args.out / 'summary'}.{{json,txt}}, {', '.join(map(str, written))}")


def _plan(
    args: argparse.Namespace,
    backbone: str,
    sparse: SparseConfig,
    tasks: list[tuple["Benchmark", str]],
    samples: int | None,
    template: dict[str, Any],
) -> "EvaluationPlan":
    from elastic.evaluation.runner import EvaluationPlan

    try:
        lengths = tuple(int(length) for length in args.lengths.split(","))
    except ValueError as error:
        raise ValueError(
            f"--lengths {args.lengths!r}: expected numbers divided by commas, such as 1024,2048"
        ) from error
    return EvaluationPlan(
        backbone,
        args.device,
        args.dtype,
        tuple(tasks),
        lengths,
        samples,
        args.batch_size,
        args.chat,
        sparse,
        args.seed,
        template,
        args.rope,
    )
