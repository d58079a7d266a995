"""The study behind the routing table of RESULTS.md: trains elastic and static routers by `elastic fit`, evaluates each
at several operating points by `elastic test`, and keeps their small files in one folder for `elastic bench routing`.

    python tests/bench/routing.py --out runs/routing --parallel 4
    elastic bench routing runs/routing --out tests/bench/results
    elastic bench table tests/bench/results --out tests/bench/RESULTS.md

The same command goes on after a kill: finished runs are skipped, others resume from their last checkpoint.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from elastic.bench.records import stamp
from elastic.bench.runs import FILES
from elastic.shards import MANIFEST

ROOT = Path(__file__).parent.parent.parent
LAYERS = ("configs/train.yaml", "configs/smollm2-gpu.yaml", "configs/logger/csv.yaml")
OBJECTIVES = {"quality": ["configs/objective/quality.yaml"], "target": []}
ROUTERS = {"elastic": [], "static": ["configs/router/static.yaml"]}
BIASES = (-4, -2, -1, 1, 2, 4)
BASELINES = ("dense", "streaming", "random:0.8", "random:0.8:1")
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
        flags += ["--trainer.limit_val_batches=0", f"--seed_everything={self.seed}", f"--data.seed={self.seed}"]
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


def execute(plan: Plan, args: argparse.Namespace, deadline: float) -> str:
    """Train and evaluate one run; keeps its files once both are done. Returns what became of it."""
    kept, folder = args.out / plan.name, args.work / plan.name
    if all((kept / name).is_file() for name in FILES):
        return "was there"
    folder.mkdir(parents=True, exist_ok=True)
    logger = "--trainer.logger.init_args.save_dir"
    fit = ["fit", *plan.arguments(folder, args.extra), f"--data.data_dir={args.data / 'train'}", f"{logger}={folder}"]
    methods = ["elastic", *(f"elastic:{bias}" for bias in args.biases)]
    methods += BASELINES if plan == args.first else []
    test = ["test", *plan.arguments(folder, args.extra), f"--data.data_dir={args.data / 'heldout'}"]
    test += [f"{logger}={folder / 'test'}", f"--model.methods={json.dumps(methods)}"]
    seconds = []
    for words in (fit, test):
        left, began = deadline - time.monotonic(), time.monotonic()
        if left < 5:
            return f"out of time before {words[0]}"
        try:
            with open(folder / "log.txt", "a") as log:
                command = [sys.executable, "-m", "elastic.cli", *words, "--ckpt_path=last"]
                done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=left, check=False)
        except subprocess.TimeoutExpired:
            return f"out of time in {words[0]}"
        if done.returncode:
            return f"{words[0]} failed, see {folder / 'log.txt'}"
        seconds.append(time.monotonic() - began)
    kept.mkdir(parents=True, exist_ok=True)
    for source in (folder / "metrics.csv", folder / "checkpoint" / "elastic.json", folder / "results_test.json"):
        shutil.copy(source, kept / source.name)
    if plan.seed in args.checkpoints:
        shutil.copytree(folder / "checkpoint", kept / "checkpoint", dirs_exist_ok=True)
    return "fit {:.0f} s, test {:.0f} s".format(*seconds)


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
    parser.add_argument("--checkpoints", type=int, nargs="*", default=[0], help="seeds whose checkpoints are kept too")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time on this GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start and go on with nothing after these")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    parser.add_argument("extra", nargs="*", help="more flags of `elastic fit`, after --")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    args.out, args.work, args.data = (path.resolve() for path in (args.out, args.work, args.data))
    args.out.mkdir(parents=True, exist_ok=True)
    build_data(args.data)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    command = f"python tests/bench/routing.py {' '.join(args.extra)}".strip()
    (args.out / "stamp.json").write_text(json.dumps(stamp(command, args.commit, device), indent=1) + "\n")
    todo = plans(args.routers, args.objectives, args.seeds)
    args.first = todo[0]
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    with ThreadPoolExecutor(args.parallel) as pool:
        for plan, outcome in zip(todo, pool.map(lambda plan: execute(plan, args, deadline), todo), strict=True):
            sys.stdout.write(f"{plan.name}: {outcome}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
