"""Step 1: write the records of an offline mixture, `<out>/<split>/<task>.jsonl`. Needs no network."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elastic.console import Parser
from elastic.data.records import Record, write_records
from elastic.data.shards import SPLITS
from elastic.data.tasks import TASKS
from elastic.files import check_place, is_foreign, new_folder, sole_writer

from . import generators, tiny_language
from .draw import token_count, word_count
from .overlap import WINDOW

RECIPE = "mixture.json"
LANGUAGES: dict[str, tuple[Sequence[str], Callable[[str, str, int, int, int], Iterable[Record]]]] = {
    "text": (TASKS, generators.generate_task),
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
    tokenizer: Any = None,
    chosen: Sequence[str] | None = None,
    text: Path | None = None,
    code: Path | None = None,
    window: int | None = None,
) -> dict[str, dict[str, int]]:
    """Write the records and their recipe, `mixture.json`; returns counts by split and task.

    The folder is written beside its final place and renamed; an earlier mixture there is replaced, nothing else is.

    Args:
        out: folder for the records.
        per_task: training records per task.
        words: longest context, in words; in tokens where a tokenizer is given. English prose has about 1.5 tokens a
            word, at worst 3.
        seed: seed of everything drawn.
        language: `text` (English prose, code and generated facts) or `tiny` (for the shipped tiny backbone).
        held_out: validation and test records per task; default a quarter of `per_task`, at least 8.
        tasks: task classes; default all that the language has.
        tokenizer: counts context lengths in its tokens (the tiny language has one token a word anyway).
        chosen: generators of the language `text`; default all. The tasks are then those that they make.
        text, code: folders of the user's documents and source files, instead of what Python itself carries.
        window: end of a context, counted as `words` is, that answers of robust tasks may share text with
            (overlap.py); default 512. For the language `text`.

    Raises:
        ValueError: an unknown language or generator, a task that is lacking, counts below 1, text that is too little
            for the contexts, or a folder that holds something else.
        FileNotFoundError: `text` or `code` without files for every split.
    """
    tasks = _tasks(language, tasks, chosen)
    held_out = max(8, per_task // 4) if held_out is None else held_out
    if per_task < 1 or held_out < 1:
        raise ValueError(
            f"per_task={per_task} and held_out={held_out}: a mixture needs at least one record of each task"
        )
    unit = "words" if tokenizer is None else "tokens"
    recipe: dict[str, Any] = {"language": language, "seed": seed, "longest_context": words, "unit": unit}
    _, make = LANGUAGES[language]
    if language == "text":
        measure = word_count if tokenizer is None else token_count(tokenizer)
        recipe["window"] = window = WINDOW if window is None else window
        make = partial(generators.generate_task, chosen=chosen, measure=measure, text=text, code=code, window=window)
        recipe["generators"] = [name for task in tasks for name in generators.generators_of(task, chosen)]
    elif (chosen, text, code, window) != (None, None, None, None):
        raise ValueError(f"generators, a window and folders belong to language 'text', not {language!r}")

    def records(task: str, split: str) -> Iterable[Record]:
        return make(task, split, per_task if split == "train" else held_out, words, seed)

    return _write(Path(out), tasks, records, recipe)


def _tasks(language: str, tasks: Sequence[str] | None, chosen: Sequence[str] | None) -> Sequence[str]:
    """The task classes asked for, or those that the chosen generators make, checked."""
    if language not in LANGUAGES:
        raise ValueError(f"unknown language {language!r}; expected one of {', '.join(LANGUAGES)}")
    known, _ = LANGUAGES[language]
    if tasks is None:
        tasks = known if chosen is None else [task for task in known if generators.generators_of(task, chosen)]
    lacking = [task for task in tasks if task not in known]
    if lacking or not tasks:
        raise ValueError(
            f"language {language!r} has no task {', '.join(lacking) or '(none asked for)'}; it has {', '.join(known)}"
        )
    return tasks


def _write(
    out: Path, tasks: Sequence[str], make: Callable[[str, str], Iterable[Record]], recipe: dict[str, Any]
) -> dict[str, dict[str, int]]:
    """Write all files into a scratch folder and rename it; returns counts by split and task."""
    if is_foreign(out, RECIPE):
        raise ValueError(
            f"{out} exists and holds no {RECIPE}, so it is not a mixture that may be replaced; choose another --out"
        )
    counts: dict[str, dict[str, int]] = {}
    bar = tqdm(total=len(SPLITS) * len(tasks), desc="records", unit="file")
    with bar, sole_writer(out), new_folder(out) as scratch:
        for split in SPLITS:
            (scratch / split).mkdir(parents=True)
            for task in tasks:
                count = write_records(scratch / split / f"{task}.jsonl", make(task, split))
                counts.setdefault(split, {})[task] = count
                bar.update()
        (scratch / RECIPE).write_text(json.dumps({**recipe, "records": counts}, indent=1) + "\n", encoding="utf-8")
    return counts


def main(argv: list[str] | None = None, prog: str = "python -m data_prep.build_mixture") -> int:
    """Command line; `prog` is how it was called."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    parser.add_argument("--per-task", type=int, default=200, help="training records per task (default 200)")
    parser.add_argument("--words", type=int, default=600, help="longest context in words (default 600)")
    parser.add_argument("--backbone", help="count --words in the tokens of this backbone instead")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn (default 0)")
    parser.add_argument("--language", choices=sorted(LANGUAGES), default="text", help="default: text")
    parser.add_argument("--held-out", type=int, help="validation and test records per task (default a quarter)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="task classes (default: all of the language)")
    parser.add_argument(
        "--generators",
        nargs="+",
        metavar="NAME",
        help=f"default: all that make the tasks, of {', '.join(generators.GENERATORS)}",
    )
    parser.add_argument("--text", type=Path, metavar="DIR", help="folder of .txt, .md or .rst files to draw prose from")
    parser.add_argument("--code", type=Path, metavar="DIR", help="source tree to draw code from")
    parser.add_argument(
        "--window", type=int, help=f"end of a context that robust answers may share text with (default {WINDOW})"
    )
    args = parser.parse_args(argv)
    from elastic.model.loading import load_tokenizer

    try:
        check_place("--out", args.out, folder=True)
        tokenizer = load_tokenizer(args.backbone) if args.backbone else None
        counts = build_mixture(
            args.out,
            args.per_task,
            args.words,
            args.seed,
            args.language,
            args.held_out,
            args.tasks,
            tokenizer,
            args.generators,
            args.text,
            args.code,
            args.window,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for split, tasks in counts.items():
        sys.stdout.write(f"{split}: " + ", ".join(f"{task} {n}" for task, n in tasks.items()) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
