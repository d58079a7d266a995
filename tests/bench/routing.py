"""The study that the routing tables of RESULTS.md come from: measures an order of heads for each seed and fits level
routers to it by `elastic calibrate`, trains other kinds of routers by `elastic fit`, evaluates each at several
operating points by `elastic validate` and `elastic test`, on rows of the training's kind and on the foreign set, and
keeps the small files in one folder for `elastic bench routing`.

    python tests/bench/routing.py --out runs/routing --parallel 3 --compiled
    elastic bench routing runs/routing --main elastic-target-0 --out tests/bench/results
    elastic bench table tests/bench/results --out tests/bench/RESULTS.md

Rivals are among the kinds: `need` is the order itself at several levels, `static` a learned pattern; dense, streaming
and random heads are tested beside the first run. After a kill the same command resumes: finished parts are skipped,
training continues from its last checkpoint. `--out` alone is enough to resume elsewhere what is trained.
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, its neighbours are found too

from elastic.bench.records import stamp
from elastic.bench.studies.runs import FOREIGN, PLAN, UNTRAINED
from elastic.data.shards import MANIFEST
from tests.bench.routing_plans import (
    BASELINES,
    DATA,
    KINDS,
    LAYERS,
    NEED_AT,
    OBJECTIVES,
    ROOT,
    Plan,
    calibration,
    plans,
)

__all__ = ["LAYERS", "ROOT", "build_data", "elastic_command", "over_gpus"]
T = TypeVar("T")
METRICS, CHECKPOINT = "metrics.csv", "checkpoint"
DRAWN = (
    "loss",
    "regulariser",
    "msr/",
    "kl/",
    "l/",
    "u/",
    "v/",
    "l2/",
    "router_entropy",
    "gradient_norm",
    "step_seconds",
)
EVALUATED = {  # command: files that it leaves
    "validate": ("results_validation.json",),
    "test": ("results_test.json", "samples_test.jsonl"),
}
SETS = {"heldout": "", FOREIGN: FOREIGN}  # data, and the folder below a run's that its files are kept in


def build_data(folder: Path, names: Sequence[str] = ("train", "heldout")) -> None:
    """Pack what is not there yet."""
    for name in names:
        if not (folder / name / MANIFEST).is_file():
            words = ["-m", "data_prep.pack_mixture", str(ROOT / DATA[name]), "--out", str(folder / name)]
            subprocess.run([sys.executable, *words], check=True, cwd=ROOT)


def calibrate(seed: int, args: argparse.Namespace, gpu: str | None, deadline: float) -> str:
    """Measure the order of a seed and, if wanted, fit level routers. Returns what became of it."""
    order, folder = order_of(seed, args), args.work / f"order-{seed}"
    levels = args.out / Plan("level", UNTRAINED, seed).name / CHECKPOINT if "level" in args.routers else None
    judged = levels is not None and (levels.parent / "elastic.json").is_file()
    if order.is_file() and (levels is None or judged):
        return "was there"
    for path in (folder, order.parent):
        path.mkdir(parents=True, exist_ok=True)
    began, device = time.monotonic(), "cpu" if gpu is None else "cuda"
    words = calibration(seed, args.data / "train", order, levels, device, shlex.split(args.calibrate))
    problem = elastic_command(words, folder / "log.txt", deadline - began, gpu)
    if not problem and levels is not None:
        shutil.copy(levels / "elastic.json", levels.parent / "elastic.json")
    return f"calibrate {problem}" if problem else f"calibrate {time.monotonic() - began:.0f} s"


def order_of(seed: int, args: argparse.Namespace) -> Path:
    """The file of a seed's order of heads."""
    return Path(args.out / "orders" / f"order-{seed}.json")


def execute(plan: Plan, args: argparse.Namespace, gpu: str | None, deadline: float) -> str:
    """Train and evaluate one run; keeps the files of each part when it is done. Returns what became of it."""
    kept, folder = args.out / plan.name, args.work / plan.name
    if plan.kind.in_order and not order_of(plan.seed, args).is_file():
        return "not begun, its order is missing"
    for path in (kept, folder):
        path.mkdir(parents=True, exist_ok=True)
    told = {"router": plan.router, "objective": plan.objective, "seed": plan.seed}
    (kept / PLAN).write_text(json.dumps(told) + "\n")
    done = []
    for name, files, work in parts(plan, args, kept, folder):
        if all(path.is_file() for path in files):
            continue
        began = time.monotonic()
        problem = work(deadline - began, gpu)
        if problem:
            return ", ".join([*done, f"{name} {problem}"])
        done.append(f"{name} {time.monotonic() - began:.0f} s")
    needed = [kept / below / name for below in SETS.values() for names in EVALUATED.values() for name in names]
    if plan.seed not in args.checkpoints and all(path.is_file() for path in needed):
        shutil.rmtree(kept / CHECKPOINT, ignore_errors=True)  # megabytes, needed no more
    return ", ".join(done) or "was there"


Part = tuple[str, list[Path], Callable[[float, str | None], str]]


def parts(plan: Plan, args: argparse.Namespace, kept: Path, folder: Path) -> Iterator[Part]:
    """The parts of a run in their order: name, what shows that it is done, and how it is done in so many seconds."""
    if plan.trained:
        yield "fit", [kept / name for name in (METRICS, "elastic.json")], lambda *at: fit(plan, args, kept, folder, *at)
    for command in EVALUATED:
        for data in args.sets:
            target = kept / SETS[data]
            files = [target / name for name in EVALUATED[command]]
            yield (
                command if data == "heldout" else f"{command} {data}",
                files,
                lambda *at, at_data=data, what=command, to=target: evaluate(plan, args, what, at_data, to, folder, *at),
            )


def fit(plan: Plan, args: argparse.Namespace, kept: Path, folder: Path, seconds: float, gpu: str | None) -> str:
    """Train; keep curves and the checkpoint, which evaluation takes from there."""
    words = plan.fit(folder, args.data / "train", order_of(plan.seed, args), args.extra)
    words += ["--model.compiled=true"] if args.compiled else []
    if problem := elastic_command(words, folder / "log.txt", seconds, gpu):
        return problem
    shutil.copytree(folder / CHECKPOINT, kept / CHECKPOINT, dirs_exist_ok=True)
    thin(folder / METRICS, kept / METRICS)
    shutil.copy(folder / CHECKPOINT / "elastic.json", kept / "elastic.json")
    return ""


def evaluate(
    plan: Plan,
    args: argparse.Namespace,
    command: str,
    data: str,
    target: Path,
    folder: Path,
    seconds: float,
    gpu: str | None,
) -> str:
    """Validate or test on one set of rows; all operating points on both, methods are compared at equal quality."""
    beside = [*BASELINES, *args.baselines] if command == "test" and plan == args.first else ["dense"]
    routers = str(args.out / plan.name / CHECKPOINT)
    if plan.router == "need":
        routers = f"static:{order_of(plan.seed, args)}@{NEED_AT}"
    elif plan.router == "reach":
        routers = ""
    elif not Path(routers).is_dir():
        return f"not begun, {routers} is gone; remove {Path(routers).parent} to train again"
    methods = plan.methods(args.biases, beside)
    words = plan.evaluate(command, folder, args.data / data, routers, methods, args.extra)
    if problem := elastic_command(words, folder / "log.txt", seconds, gpu):
        return problem
    target.mkdir(exist_ok=True)
    for name in EVALUATED[command]:
        shutil.copy(folder / name, target / name)
    return ""


def thin(source: Path, target: Path) -> None:
    """Copy the scalars of the training steps that curves are drawn from, with four digits."""
    with open(source, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/lr")]
    names = ["step", *(name for name in rows[0] if name.startswith(tuple(f"train/{kind}" for kind in DRAWN)))]
    with open(target, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([f"{float(row[name]):.4g}" if row[name] else "" for name in names] for row in rows)


def elastic_command(words: list[str], log: Path, seconds: float, gpu: str | None) -> str:
    """One command of `elastic`; what went wrong, or nothing."""
    if seconds < 5:
        return "not begun, out of time"
    command = [sys.executable, "-m", "elastic.cli", *words]
    limit = None if seconds == float("inf") else seconds
    environment = os.environ if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    try:
        with open(log, "a") as file:
            done = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=file, timeout=limit, check=False, env=environment
            )
    except subprocess.TimeoutExpired:
        return "cut, out of time"
    return f"failed, see {log}" if done.returncode else ""


def visible_gpus() -> list[str | None]:
    """As CUDA_VISIBLE_DEVICES names them; one None without a GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(index) for index in range(torch.cuda.device_count())]
    return [*names] or [None]


def over_gpus(todo: Sequence[T], work: Callable[[T, str | None], str], parallel: int) -> Iterator[tuple[T, str]]:
    """`work(item, gpu)` of every item, `parallel` at a time on each visible GPU; items and outcomes, in order."""
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    free: SimpleQueue = SimpleQueue()
    for gpu in visible_gpus() * parallel:
        free.put(gpu)

    def on_a_free_one(item: T) -> str:
        gpu = free.get()
        try:
            return work(item, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(free.qsize()) as pool:
        yield from zip(todo, pool.map(on_a_free_one, todo), strict=True)


def build_parser() -> argparse.ArgumentParser:
    """What is compared, where, and for how long."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/routing"), help="small files of finished parts")
    parser.add_argument("--work", type=Path, default=Path("runs/routing-work"), help="folders of the runs")
    parser.add_argument("--data", type=Path, default=Path("data/routing"), help="packed data, built if missing")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="rows to validate and test on")
    parser.add_argument("--routers", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--biases", type=float, nargs="*", help="operating points beside 0 (default: those of each kind)"
    )
    parser.add_argument("--baselines", nargs="*", default=[], help="methods tested beside the first run, by name")
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[0], help="seeds whose checkpoints are kept")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time on each visible GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start and resume nothing after these")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    parser.add_argument("--compiled", action="store_true", help="train with model.compiled (pays from a minute on)")
    parser.add_argument("--calibrate", default="", metavar="FLAGS", help="further flags of `elastic calibrate`")
    parser.add_argument("extra", nargs="*", help="flags of `elastic fit`, `validate` and `test`, after --")
    return parser


REPEATED = ("sets", "routers", "objectives", "seeds", "biases", "baselines", "compiled", "calibrate")


def repeat(args: argparse.Namespace) -> str:
    """The command, without folders."""
    words, defaults = ["python tests/bench/routing.py"], build_parser()
    for name in REPEATED:
        value = getattr(args, name)
        if value != defaults.get_default(name):
            listed = [str(x) for x in value] if isinstance(value, list) else [] if value is True else [str(value)]
            words.append(shlex.join([f"--{name}", *listed]))
    return " ".join([*words, *(["--", *args.extra] if args.extra else [])])


def main(argv: list[str]) -> int:
    """Run the study."""
    args = build_parser().parse_args(argv)
    deadline = time.monotonic() + args.seconds
    args.out, args.work, args.data = (path.resolve() for path in (args.out, args.work, args.data))
    args.out.mkdir(parents=True, exist_ok=True)
    build_data(args.data, ("train", *args.sets))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    (args.out / "stamp.json").write_text(json.dumps(stamp(repeat(args), args.commit, device), indent=1) + "\n")
    todo = plans(args.routers, args.objectives, args.seeds)
    args.first = todo[0]

    def tell(what: str, outcome: str) -> None:
        sys.stdout.write(f"{what}: {outcome}\n")
        sys.stdout.flush()

    orders = args.seeds if any(plan.kind.in_order for plan in todo) else []
    for seed, outcome in over_gpus(orders, lambda seed, gpu: calibrate(seed, args, gpu, deadline), args.parallel):
        tell(f"order-{seed}", outcome)
    for plan, outcome in over_gpus(todo, lambda plan, gpu: execute(plan, args, gpu, deadline), args.parallel):
        tell(plan.name, outcome)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
