"""Speed, fill, memory and resuming of mixtures on this machine's CPU: python -m tests.bench.bench_mixture.

Every run is the command a user gives, in a process of its own; peak memory is that of the largest of its processes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from elastic.bench import records
from elastic.bench.records import Record
from elastic.console import say
from elastic.data.records import Record as Sample
from elastic.data.records import write_records

OFFLINE = Path(__file__).parents[2] / "configs" / "mixture" / "offline.yaml"
COMMAND = "python -m tests.bench.bench_mixture"


def pack(folder: Path, name: str, settings: dict[str, Any], workers: int) -> tuple[dict[str, Any], float, float]:
    """Manifest, seconds and peak MiB of one run."""
    began = time.perf_counter()
    _, status, usage = os.wait4(start(folder, name, settings, workers).pid, 0)
    if status:
        raise RuntimeError(f"packing {name} ended with status {status}; see above")
    manifest = json.loads((folder / name / "manifest.json").read_text())
    return manifest, time.perf_counter() - began, usage.ru_maxrss / 1024


def start(folder: Path, name: str, settings: dict[str, Any], workers: int) -> "subprocess.Popen[bytes]":
    """The command, started."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "data_prep.pack_mixture", str(file), "--out", str(folder / name)]
    return subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL, start_new_session=True)


def total(manifest: dict[str, Any], key: str) -> int:
    """Rows, samples or tokens of all splits."""
    return sum(entry[key] for parts in manifest["splits"].values() for entry in parts.values())


def speed_and_fill(folder: Path, tokens: int, workers: int) -> list[tuple[str, str, float, str]]:
    """The shipped mixture, at its own row length and at the paper's 65,536 tokens with contexts up to 60,000."""
    base = yaml.safe_load(OFFLINE.read_text())
    found = []
    for name, changes in (
        ("offline-4k", {"seq_length": 4096, "context": [512, 3000]}),
        ("offline-64k", {"seq_length": 65536, "context": [64, 60000]}),
    ):
        settings = {**base, **changes, "tokens": {"train": tokens}}
        manifest, seconds, _ = pack(folder, name, settings, workers)
        found += [
            (name, "tokens per minute", total(manifest, "tokens") / seconds * 60, f"tokens ({workers} processes)"),
            (name, "fill", total(manifest, "tokens") / (total(manifest, "rows") * settings["seq_length"]), "of rows"),
        ]
    return found


def memory(folder: Path, tokens: int, workers: int) -> list[tuple[str, str, float, str]]:
    """Peak memory of corpora of three sizes, generated and from a file of records."""
    base = yaml.safe_load(OFFLINE.read_text())
    found = []
    for scale in (1, 2, 4):
        size = tokens * scale // 4
        sample = Sample("code", "for value in range(10): total += value * 3\n" * 60, "Go on.", "return total", "own")
        file = folder / f"own-{scale}.jsonl"
        write_records(file, (sample for _ in range(size // 800)))
        own = {"sources": {"own": {"path": str(file)}}, "part_tokens": 250_000}
        for name, changes in (("generated", {"part_tokens": 250_000}), ("records", own)):
            case = f"{name}-{size}"
            _, _, peak = pack(folder, case, {**base, **changes, "tokens": {"train": size}}, workers)
            found.append((case, "peak memory", peak, "MiB"))
    return found


def resuming(folder: Path, tokens: int, workers: int) -> list[tuple[str, str, float, str]]:
    """A run killed with its workers once half of its shards are there, and the same command again."""
    settings = {**yaml.safe_load(OFFLINE.read_text()), "tokens": {"train": tokens}, "part_tokens": tokens // 8}
    whole, _, _ = pack(folder, "whole", settings, workers)
    process = start(folder, "killed", settings, workers)
    parts = folder / ".killed.parts" / "train"
    while len(list(parts.glob("*.json"))) < 4:
        if process.poll() is not None:
            raise RuntimeError("the run that was to be killed has ended before; raise --tokens")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list(parts.glob("*.json")))
    again, seconds, _ = pack(folder, "killed", settings, workers)
    same = again["splits"] == whole["splits"]  # with the checksum of every shard
    return [
        ("killed", "shards kept", kept, "of 8"),
        ("killed", "seconds to resume", seconds, "s"),
        ("killed", "same checksums as unbroken", float(same), "(1 = all)"),
    ]


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("tests/bench/results"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of the largest corpus (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--commit", help="where git cannot tell")
    args = parser.parse_args(argv)
    shared: Record = {
        "gpu": f"none ({os.cpu_count()} CPU cores)",
        "kernel": "none",
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "datasets", "pyarrow")},
        "commit": args.commit or records.git_commit(),
        "command": f"{COMMAND} --tokens {args.tokens} --workers {args.workers}",
    }
    with tempfile.TemporaryDirectory() as scratch:
        parts = [part(Path(scratch), args.tokens, args.workers) for part in (speed_and_fill, memory, resuming)]
    rows = [
        {"case": case, "who": "ours", "metric": metric, "value": value, "unit": unit, **shared}
        for part in parts
        for case, metric, value, unit in part
    ]
    for row in rows:
        say(f"{row['case']}, {row['metric']}: {row['value']:.4g} {row['unit']}")
    say(f"written: {records.save(args.out / 'mixture.json', rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
