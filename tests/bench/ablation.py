"""Train routers with different settings, once each, and judge them on the validation rows. Writes records for `elastic
bench table`.

    python -m tests.bench.ablation --parallel 3 --out tests/bench/results

The file maps names to flags of `elastic fit`. After a kill the same command resumes: finished variants are skipped.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
import yaml

from elastic.bench.records import save, stamp
from elastic.bench.studies.ablation import cells, records
from elastic.console import say, table
from tests.bench.routing import LAYERS, ROOT, build_data, elastic_command, over_gpus

BIASES = (-2, 2)
RESULTS = "results_validation.json"
METHODS = ["elastic", *(f"elastic@{bias}" for bias in BIASES), "dense"]


def judge(name: str, flags: list[str], args: argparse.Namespace, gpu: str | None) -> str:
    """Train and judge a variant; keeps its results and how it was run. Returns what became of it."""
    work, kept = args.work / name, args.kept / name
    if (kept / RESULTS).is_file():
        return "was there"
    work.mkdir(parents=True, exist_ok=True)
    layers = [word for layer in LAYERS for word in ("-c", str(ROOT / layer))]
    logger = "--trainer.logger.init_args.save_dir"
    common = [*layers, f"--data.data_dir={args.data / 'train'}", *flags]
    common += [f"--trainer.default_root_dir={work}", "--trainer.enable_progress_bar=false", "--ckpt_path=last"]
    common += args.extra
    commands = [
        ["fit", *common, "--trainer.limit_val_batches=0", f"{logger}={work}", "--ckpt_path=last"],
        ["validate", *common, f"--data.data_dir={args.data / 'heldout'}", f"{logger}={work / 'judged'}"],
    ]
    commands[1].append(f"--model.methods={json.dumps(METHODS)}")
    for words in commands:
        problem = elastic_command(words, work / "log.txt", float("inf"), gpu)
        if problem:
            return f"{words[0]} {problem}"
    kept.mkdir(parents=True, exist_ok=True)
    (kept / "variant.json").write_text(json.dumps({"flags": " ".join(flags), **args.stamp}, indent=1) + "\n")
    shutil.copy(work / RESULTS, kept / RESULTS)
    return "done"


def main(argv: list[str]) -> int:
    """Run what is missing, write the records of all, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = Path(__file__).with_name("variants.yaml")
    parser.add_argument(
        "--variants", type=Path, default=listed, help="YAML: name -> flags (default: those beside this)"
    )
    parser.add_argument("--kept", type=Path, default=Path("runs/ablation"), help="results of finished variants")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation-work"), help="folders of the runs")
    parser.add_argument("--data", type=Path, default=Path("data/routing"), help="packed data, built if missing")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time on each visible GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--tag", default="ablation", help="name of the file")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    parser.add_argument("extra", nargs="*", help="flags for all variants, after --")
    args = parser.parse_args(argv)
    args.kept, args.work, args.data = (path.resolve() for path in (args.kept, args.work, args.data))
    variants = yaml.safe_load(args.variants.read_text(encoding="utf-8"))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    args.stamp = stamp("python -m tests.bench.ablation", args.commit, device)
    names = list(variants)
    if not all((args.kept / name / RESULTS).is_file() for name in names):
        build_data(args.data)
    for name, outcome in over_gpus(names, lambda name, gpu: judge(name, variants[name], args, gpu), args.parallel):
        say(f"{name}: {outcome}")
    done = [name for name in names if (args.kept / name / RESULTS).is_file()]
    told = {name: json.loads((args.kept / name / "variant.json").read_text()) for name in done}
    results = {name: json.loads((args.kept / name / RESULTS).read_text()) for name in done}
    flags = {name: variant.pop("flags") for name, variant in told.items()}
    found = records(results, flags, told)
    say(table(*cells(found)))
    say(f"wrote {save(args.out / f'{args.tag}.json', found)}")
    return int(len(done) < len(names))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
