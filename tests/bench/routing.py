"""The study that the routing table of RESULTS.md comes from: trains elastic and static routers by `elastic fit`,
evaluates each at several operating points by `elastic validate`, judges the one that these rows choose by `elastic
test`, and keeps their small files in one folder for `elastic bench routing`.

    python tests/bench/routing.py --out runs/routing --parallel 3 --compiled
    elastic bench routing runs/routing --main elastic-target-0 --out tests/bench/results
    elastic bench table tests/bench/results --out tests/bench/RESULTS.md

After a kill the same command resumes: finished runs are skipped, others continue from their last checkpoint.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch

from elastic.bench.records import stamp
from elastic.data.shards import MANIFEST
from elastic.routing.methods import Method

T = TypeVar("T")
ROOT = Path(__file__).parent.parent.parent
LAYERS = ("configs/train.yaml", "configs/smollm2-gpu.yaml", "configs/logger/csv.yaml")
OBJECTIVES = {"target": [], "quality": ["configs/objective/quality.yaml"]}
ROUTERS = {"static": ["configs/router/static.yaml"], "elastic": []}
BIASES = (-3, -2, -1, 1.5)
BASELINES = ("dense", "streaming", "random:0.7", "random:0.7:1")
METRICS = "metrics.csv"
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
FILES_OF = {  # what each part leaves, and what it is kept as
    "fit": {METRICS: METRICS, "checkpoint/elastic.json": "elastic.json"},
    "validate": {"results_validation.json": "results_validation.json"},
    "test": {name: name for name in ("results_test.json", "samples_test.jsonl")},
}
DATA = {"train": "configs/mixture/offline.yaml", "heldout": "configs/mixture/heldout.yaml"}


@dataclass(frozen=True)
class Plan:
    """One run: which router, trained for which objective, from which seed."""

    router: str
    objective: str
    seed: int

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"{self.router}-{self.objective}-{self.seed}"

    def arguments(self, folder: Path, extra: list[str]) -> list[str]:
        """Of `elastic fit` and `elastic test` alike."""
        layers = [*LAYERS, *OBJECTIVES[self.objective], *ROUTERS[self.router]]
        flags = [f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
        flags += [f"--seed_everything={self.seed}", f"--data.seed={self.seed}"]
        return [*(word for layer in layers for word in ("-c", str(ROOT / layer))), *flags, *extra]


def plans(routers: list[str], objectives: list[str], seeds: list[int]) -> list[Plan]:
    """Most telling runs first: every router and objective of one seed, then the next seed."""
    return [Plan(router, objective, seed) for seed in seeds for objective in objectives for router in routers]


def build_data(folder: Path) -> None:
    """Pack what is not there yet."""
    for name, mixture in DATA.items():
        if not (folder / name / MANIFEST).is_file():
            words = ["-m", "data_prep.pack_mixture", str(ROOT / mixture), "--out", str(folder / name)]
            subprocess.run([sys.executable, *words], check=True, cwd=ROOT)


def execute(plan: Plan, args: argparse.Namespace, gpu: str | None, deadline: float) -> str:
    """Train and evaluate one run; keeps the files of each part when it is done. Returns what became of it."""
    kept, folder = args.out / plan.name, args.work / plan.name
    for path in (kept, folder):
        path.mkdir(parents=True, exist_ok=True)
    done = []
    for part in FILES_OF:
        if all((kept / name).is_file() for name in FILES_OF[part].values()):
            continue
        began, words = time.monotonic(), words_of(part, plan, folder, args)
        problem = elastic_command(words, folder / "log.txt", deadline - began, gpu)
        if problem:
            return ", ".join([*done, f"{part} {problem}"])
        done.append(f"{part} {time.monotonic() - began:.0f} s")
        for made, name in FILES_OF[part].items():
            (thin if name == METRICS else shutil.copy)(folder / made, kept / name)
        if part == "fit" and plan.seed in args.checkpoints:
            shutil.copytree(folder / "checkpoint", kept / "checkpoint", dirs_exist_ok=True)
    return ", ".join(done) or "was there"


def words_of(part: str, plan: Plan, folder: Path, args: argparse.Namespace) -> list[str]:
    """Arguments of `elastic` for one part of a run."""
    common, logger = plan.arguments(folder, args.extra), "--trainer.logger.init_args.save_dir"
    if part == "fit":
        words = [f"--data.data_dir={args.data / 'train'}", f"{logger}={folder}", "--trainer.limit_val_batches=0"]
        return [part, *common, *words, *(["--model.compiled=true"] if args.compiled else [])]
    words = [f"--data.data_dir={args.data / 'heldout'}", f"{logger}={folder / 'judged'}"]
    methods = ["elastic", *map(elastic_at, args.biases)]  # on the test rows too: methods are compared at equal quality
    if part == "validate" or plan != args.first:
        methods.append("dense")
    else:
        methods += [*BASELINES, *args.baselines]
    return [part, *common, *words, f"--model.methods={json.dumps(methods)}"]


def elastic_at(bias: float) -> str:
    """The method's name at a `sparsity_bias`."""
    return Method("elastic", bias=bias or None).name


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
    """One command of `elastic`, resumed from its run's last checkpoint; what went wrong, or nothing."""
    if seconds < 5:
        return "not begun, out of time"
    command = [sys.executable, "-m", "elastic.cli", *words, "--ckpt_path=last"]
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


def main(argv: list[str]) -> int:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/routing"), help="small files of finished runs")
    parser.add_argument("--work", type=Path, default=Path("runs/routing-work"), help="folders of the runs")
    parser.add_argument("--data", type=Path, default=Path("data/routing"), help="packed data, built if missing")
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS))
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--biases", type=float, nargs="*", default=BIASES, help="operating points beside bias 0")
    parser.add_argument("--baselines", nargs="*", default=[], help="methods tested beside the first run, by name")
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[0], help="seeds whose checkpoints are kept")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time on each visible GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start and resume nothing after these")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    parser.add_argument("--compiled", action="store_true", help="train with model.compiled (pays from a minute on)")
    parser.add_argument("extra", nargs="*", help="flags of `elastic fit` and `elastic test`, after --")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    args.out, args.work, args.data = (path.resolve() for path in (args.out, args.work, args.data))
    args.out.mkdir(parents=True, exist_ok=True)
    build_data(args.data)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    told = (
        ["--baselines", *args.baselines] * bool(args.baselines)
        + ["--compiled"] * args.compiled
        + [*(["--", *args.extra] if args.extra else [])]
    )
    if tuple(args.biases) != BIASES:
        told = ["--biases", *map("{:g}".format, args.biases), *told]
    command = " ".join(["python tests/bench/routing.py", *told])
    (args.out / "stamp.json").write_text(json.dumps(stamp(command, args.commit, device), indent=1) + "\n")
    todo = plans(args.routers, args.objectives, args.seeds)
    args.first = todo[0]
    for plan, outcome in over_gpus(todo, lambda plan, gpu: execute(plan, args, gpu, deadline), args.parallel):
        sys.stdout.write(f"{plan.name}: {outcome}\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
