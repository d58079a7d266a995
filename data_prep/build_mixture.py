"""Step 1: write the records of an offline mixture, `<out>/<split>/<task>.jsonl`. Needs no network."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from data_prep import generators, tiny_language
from elastic.records import Record, write_records
from elastic.shards import SPLITS

LANGUAGES: dict[str, tuple[Sequence[str], Callable[[str, str, int, int, int], list[Record]]]] = {
    "text": (tuple(generators.GENERATORS), generators.generate),
    "tiny": (tiny_language.TASKS, tiny_language.build_records),
}


def build_mixture(
    out: str | Path,
    per_task: int,
    words: int,
    seed: int = 0,
    language: str = "text",
    held_out: int | None = None,
    tasks: Sequence[str] | None = None,
) -> dict[str, dict[str, int]]:
    """Write the records; returns counts by split and task.

    Args:
        per_task: training records per task.
        words: longest context in words.
        language: `text` (English prose, code and generated facts) or `tiny` (for the shipped tiny backbone).
        held_out: validation and test records per task; default a quarter of `per_task`, at least 8.
        tasks: task classes; default all that the language has.

    Raises:
        ValueError: an unknown language, a task that it lacks, or counts below 1.
    """
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; expected one of {', '.join(LANGUAGES)}")
    known, make = LANGUAGES[language]
    tasks = tuple(known if tasks is None else tasks)
    lacking = [task for task in tasks if task not in known]
    if lacking or not tasks:
        raise ValueError(
            f"language {language!r} has no task {', '.join(lacking) or '(none asked for)'}; it has {', '.join(known)}"
        )
    held_out = max(8, per_task // 4) if held_out is None else held_out
    if per_task < 1 or held_out < 1:
        raise ValueError(
            f"per_task={per_task} and held_out={held_out}: a mixture needs at least one record of each task"
        )
    counts: dict[str, dict[str, int]] = {}
    with tqdm(total=len(SPLITS) * len(tasks), desc="records", unit="file") as bar:
        for split in SPLITS:
            folder = Path(out) / split
            folder.mkdir(parents=True, exist_ok=True)
            for task in tasks:
                records = make(task, split, per_task if split == "train" else held_out, words, seed)
                write_records(folder / f"{task}.jsonl", records)
                counts.setdefault(split, {})[task] = len(records)
                bar.update()
    return counts


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.build_mixture", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    parser.add_argument("--per-task", type=int, default=200, help="training records per task (default 200)")
    parser.add_argument("--words", type=int, default=600, help="longest context in words (default 600)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn (default 0)")
    parser.add_argument("--language", choices=sorted(LANGUAGES), default="text", help="default: text")
    parser.add_argument("--held-out", type=int, help="validation and test records per task (default a quarter)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="task classes (default: all of the language)")
    args = parser.parse_args(argv)
    try:
        counts = build_mixture(args.out, args.per_task, args.words, args.seed, args.language, args.held_out, args.tasks)
    except ValueError as error:
        parser.error(str(error))
    for split, tasks in counts.items():
        sys.stdout.write(f"{split}: " + ", ".join(f"{task} {n}" for task, n in tasks.items()) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
