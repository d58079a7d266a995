"""Records of a benchmark run: flat objects, and the JSON file that holds them.

case, who (the contestant), metric, value, unit; the case's own fields (length, msr, heads, ...); and how it was run:
gpu, kernel, versions, commit and command. A contestant that could not run a case has a record with metric `left out`,
value null and the reason in `why`.

The file is `{"format": 2, "stamps": [...], "records": [...]}`: what says how a record came about (`STAMPED`) is written
once for all records that share it, and a record names it by its place in `stamps`. One stamp and one record a line;
measured numbers have five significant digits. Files of the first format, a list of whole records, are read too.
"""

import importlib.metadata
import json
import shlex
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from elastic.files import write_atomic
from elastic.kernels import kernel_path

Measurement = dict[str, Any]
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
STAMPED = ("gpu", "kernel", "versions", "commit", "command", "config", "flags", "routers", "sparse")
UNNAMED = ("shape", "timed_length")  # what tells figures apart beside case, contestant and metric
ALIKE = ("gpu", "heads", "kv_heads", "head_dim", "dtype", "hidden", "batch")  # and what does not, but could
FORMAT, DIGITS = 2, 5
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
    return shlex.join(["elastic", "bench", *_without("--out", argv)])


def _without(option: str, words: Iterable[str]) -> list[str]:
    """The words of a command but for an option and its value."""
    kept, skip = [], False
    for word in words:
        if not skip and word != option and not word.startswith(f"{option}="):
            kept.append(word)
        skip = word == option
    return kept


def stamp(command: str, commit: str | None, device: torch.device) -> Measurement:
    """What every record of a run shares; `commit` where git cannot tell."""
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "kernel": kernel_path(device),
        "versions": versions(),
        "commit": commit or git_commit(),
        "command": command,
    }


def save(path: Path, found: Sequence[Measurement]) -> Path:
    """Write the records of one run, rounded; readers see the file whole or as it was before.

    Raises:
        OSError: a full disk; the file is as it was before.
    """
    stamps: dict[str, int] = {}
    lines = []
    for record in found:
        made = json.dumps({name: record[name] for name in STAMPED if name in record})
        told = {name: rounded(value) for name, value in record.items() if name not in STAMPED}
        lines.append(json.dumps({**told, "stamp": stamps.setdefault(made, len(stamps))}))
    parts = [f'{{"format": {FORMAT}', *map(_listed, ("stamps", "records"), (stamps, lines))]
    write_atomic(path, ",\n".join(parts) + "}\n")
    return path


def _listed(name: str, lines: Iterable[str]) -> str:
    return f'"{name}": [\n' + ",\n".join(lines) + "\n]"


def rounded(value: Any) -> Any:
    """A number with `DIGITS` significant digits, whole numbers as they are; lists and objects likewise."""
    if isinstance(value, float):
        return value if value.is_integer() else float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(of) for name, of in value.items()}
    return [rounded(of) for of in value] if isinstance(value, (list, tuple)) else value


def merge(runs: Sequence[Sequence[Measurement]]) -> tuple[list[Measurement], int]:
    """Records of several runs as those of one, and how many were left out because an earlier run has that figure. Cases
    are sorted by shape and length where they have them, else kept in the order of the runs.

    Raises:
        ValueError: a case of the same name that was another one, or on another GPU (`ALIKE`).
    """
    found: dict[tuple[Any, ...], Measurement] = {}
    for record in (record for run in runs for record in run):
        figure = (*(record[name] for name in ("case", "who", "metric")), *map(record.get, UNNAMED))
        there = found.setdefault(figure, record)
        for name in ALIKE:
            if there.get(name) != record.get(name):
                raise ValueError(
                    f"{record['metric']} of {record['who']} in {record['case']} was measured with {name} "
                    f"{there.get(name)} and {record.get(name)}, which one table cannot tell apart; merge runs of one"
                )
    shapes = list(dict.fromkeys(record.get("shape") for record in found.values()))
    merged = sorted(found.values(), key=lambda r: (shapes.index(r.get("shape")), r.get("length") or 0))
    return merged, sum(map(len, runs)) - len(merged)


def check_replaced(path: Path, command: str) -> None:
    """Refuse to write over what another command made, and may have taken hours to; the same one may be of a new commit.

    Raises:
        ValueError: naming both; also a file that holds no records.
    """
    own = _without("--commit", shlex.split(command))
    made = dict.fromkeys(record["command"] for record in (load(path) if path.exists() else []))
    others = [other for other in made if _without("--commit", shlex.split(other)) != own]
    if others:
        raise ValueError(
            f"{path} holds records of `{others[0]}`, which those of `{command}` would replace; give them another --tag "
            "or --out, or delete the file"
        )


def load(path: Path) -> list[Measurement]:
    """Read the records of one run, each with its stamp's fields.

    Raises:
        ValueError: not JSON, another format, no records, or a record that lacks a field or holds one of another type.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    found = _stamped(content, path) if isinstance(content, dict) else content
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path} holds no records; expected them as `elastic bench` writes them")
    for number, record in enumerate(found):
        for name, types in REQUIRED.items():
            if not isinstance(record, dict) or name not in record or not isinstance(record[name], types):
                got = repr(record[name]) if isinstance(record, dict) and name in record else "nothing"
                wanted = " or ".join(kind.__name__ for kind in types)
                raise ValueError(f"record {number} of {path}: {name!r} is {got}, expected {wanted}")
    return found


def _stamped(content: dict[str, Any], path: Path) -> list[Measurement]:
    """The records of a file's content, with the fields of the stamps that they name."""
    given = content.get("format")
    if given != FORMAT:
        raise ValueError(f"{path} has format {given!r}, expected {FORMAT}; a later version of elastic reads it")
    stamps, listed, found = content.get("stamps", []), content.get("records", []), []
    for name, of in (("stamps", stamps), ("records", listed)):
        if not isinstance(of, list) or not all(isinstance(one, dict) for one in of):
            raise ValueError(
                f"{path} holds no list of objects under {name!r}; expected it as `elastic bench` writes it"
            )
    for number, record in enumerate(listed):
        place = record.pop("stamp", None)
        if not isinstance(place, int) or not 0 <= place < len(stamps):
            raise ValueError(f"record {number} of {path}: 'stamp' is {place!r}, expected one of 0 to {len(stamps) - 1}")
        found.append({**record, **stamps[place]})
    return found


def load_folder(folder: Path) -> dict[str, list[Measurement]]:
    """Records of every JSON file in a folder, by file name without its ending.

    Raises:
        ValueError: no such file, or one that holds no records.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"no *.json in {folder}; run `elastic bench attention --out {folder}` first")
    return {file.stem: load(file) for file in files}
