"""Records of a benchmark run, as JSON: a list of flat objects.

case, who (the contestant), metric, value, unit; the case's own facts (length, msr, heads, ...); and, the same in every
record of a run, gpu, kernel, versions, commit and command. A contestant that could not run a case has a record with
metric `left out`, value null and the reason in `why`.
"""

import importlib.metadata
import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from elastic.kernels import kernel_path

Record = dict[str, Any]
LEFT_OUT = "left out"
REQUIRED: dict[str, tuple[type, ...]] = {
    "case": (str,),
    "who": (str,),
    "metric": (str,),
    "value": (int, float, type(None)),
    "unit": (str,),
    "gpu": (str,),
    "kernel": (str,),
    "versions": (dict,),
    "commit": (str,),
    "command": (str,),
}
PACKAGES = ("elastic-attention", "cupy-cuda12x", "cupy-cuda13x", "triton", "flash-attn-4")


def versions() -> dict[str, str]:
    """Versions of what a timing depends on."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit(folder: Path | None = None) -> str:
    """Commit of the checkout that holds this package, with `-dirty` where files differ from it; else `unknown`."""
    folder = Path(__file__).resolve().parent if folder is None else folder

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
    return (git("describe", "--always", "--dirty", "--exclude=*") if tracked else "") or "unknown"


def command_line(argv: Sequence[str]) -> str:
    """How to repeat a run, without the folder that its records went to."""
    words, skip = ["elastic", "bench"], False
    for word in argv:
        if not skip and word != "--out" and not word.startswith("--out="):
            words.append(word)
        skip = word == "--out"
    return shlex.join(words)


def stamp(command: str, commit: str | None, device: torch.device) -> Record:
    """What every record of a run shares; `commit` where git cannot tell."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "kernel": kernel_path(device),
        "versions": versions(),
        "commit": commit or git_commit(),
        "command": command,
    }


def save(path: Path, found: Sequence[Record]) -> Path:
    """Write the records of one run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(found), indent=1) + "\n")
    return path


def merge(runs: Sequence[Sequence[Record]]) -> tuple[list[Record], int]:
    """Records of several runs as those of one, and how many were left out because an earlier run has that figure. Cases
    stand by shape and length where they have them, else in the order of the runs.
    """
    found: dict[tuple[Any, ...], Record] = {}
    for record in (record for run in runs for record in run):
        found.setdefault((record["case"], record["who"], record["metric"]), record)
    shapes = list(dict.fromkeys(record.get("shape") for record in found.values()))
    merged = sorted(found.values(), key=lambda r: (shapes.index(r.get("shape")), r.get("length") or 0))
    return merged, sum(map(len, runs)) - len(merged)


def load(path: Path) -> list[Record]:
    """Read the records of one run.

    Raises:
        ValueError: not JSON, no records, or a record that lacks a field or holds one of another type.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} holds no records; expected a list as `elastic bench` writes it")
    for number, record in enumerate(found):
        for name, types in REQUIRED.items():
            if not isinstance(record, dict) or name not in record or not isinstance(record[name], types):
                got = repr(record[name]) if isinstance(record, dict) and name in record else "nothing"
                wanted = " or ".join(kind.__name__ for kind in types)
                raise ValueError(f"record {number} of {path}: {name!r} is {got}, expected {wanted}")
    return found


def load_folder(folder: Path) -> dict[str, list[Record]]:
    """Records of every JSON file in a folder, by file name without its ending.

    Raises:
        ValueError: no such file, or one that holds no records.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"no *.json in {folder}; run `elastic bench attention --out {folder}` first")
    return {file.stem: load(file) for file in files}
