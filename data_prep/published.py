"""Published data sets as common records, from the hub or from local files in their own format, and any other file whose
columns you name.

elastic data_prep published musique --path musique_ans_v1.0_train.jsonl --out data/records/train/musique.jsonl
elastic data_prep published mine --fields context=text,question=ask,answer=reply --task code --path my.parquet ...
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elastic.console import Parser
from elastic.data.file_rows import ENDINGS, ReadReport, files_of, read_rows
from elastic.data.records import Record, write_records
from elastic.data.tasks import TASKS
from elastic.files import check_place, new_file

from .formats import CONVERTERS, Converter, mapped

HUB: dict[str, tuple[tuple[str, str | None], ...]] = {
    "chatqa2": (
        ("nvidia/ChatQA2-Long-SFT-data", "long_sft"),
        ("nvidia/ChatQA2-Long-SFT-data", "NarrativeQA_131072"),
    ),
    "musique": (("dgslibisey/MuSiQue", None),),
    "govreport": (("ccdv/govreport-summarization", None),),
    "xsum": (("EdinburghNLP/xsum", None),),
}
ELSEWHERE = {"colt": "CoLT-132K.zip at zenodo.org/records/15019938"}


@dataclass
class Left:
    """Rows that gave no record: how many by reason, and where the first of each stood; lines that were unreadable."""

    reasons: dict[str, int] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    unread: ReadReport = field(default_factory=ReadReport)

    def out(self, reason: str, where: str) -> None:
        """Count one row."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.places.setdefault(reason, where)

    def __str__(self) -> str:
        told = [f"{n} {reason} (first: {self.places[reason]})" for reason, n in self.reasons.items()]
        shown = self.unread.bad[:20]
        told += [f"{len(self.unread.bad)} unreadable:\n  " + "\n  ".join(shown)] if shown else []
        return ", ".join(told) or "none"


def converter(name: str, fields: str | None, task: str | None) -> Converter:
    """The converter of a known data set, or of the columns `fields` ("context=a,question=b,answer=c").

    Raises:
        ValueError: an unknown data set, or fields that are not understood.
    """
    if fields is not None:
        pairs = [pair.split("=", 1) for pair in fields.split(",")]
        if task is None or any(len(pair) < 2 for pair in pairs):
            raise ValueError(
                f"--fields {fields} {'needs --task' if task is None else 'is not understood'}; expected "
                f"context=COLUMN,question=COLUMN,answer=COLUMN and a task class out of {', '.join(TASKS)}"
            )
        return mapped(name, task, {pair[0]: pair[1] for pair in pairs})
    if name not in CONVERTERS:
        raise ValueError(
            f"data set {name!r} is unknown; expected one of {', '.join(CONVERTERS)}, or name the columns with --fields"
        )
    if task is None:
        return CONVERTERS[name]
    return lambda row: Record(**{**vars(CONVERTERS[name](row)), "task": task})


def convert(
    make: Converter,
    rows: Iterable[tuple[str, Any]],
    measure: Callable[[str], int],
    shortest: int,
    longest: int,
    left: Left,
) -> Iterator[Record]:
    """Records of a data set, without repeats, whose prompts have `shortest` to `longest` units of `measure`.

    Raises:
        ValueError: lengths in the wrong order.
    """
    if not 0 <= shortest <= longest:
        raise ValueError(f"lengths from {shortest} to {longest}; expected 0 <= shortest <= longest")
    seen: set[int] = set()
    for where, row in rows:
        try:
            record = make(row)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            left.out(f"without {error}" if isinstance(error, KeyError) else str(error), where)
            continue
        key = hash((" ".join(record.context.split()), record.question))
        if key in seen:
            left.out("repeated", where)
        elif not shortest <= measure(record.prompt) <= longest:
            left.out("too short or too long", where)
        else:
            seen.add(key)
            yield record


def rows_of(name: str, path: Path | None, split: str, left: Left) -> Iterator[tuple[str, Any]]:
    """Where a row is, and the row: of a local file or folder (.jsonl, .json, .parquet), or of the hub, streamed.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: a data set that is not on the hub, or files that cannot be read.
        ConnectionError: the hub cannot be reached, or does not have it.
    """
    if path is not None:
        files = files_of(path, left.unread)
        if not files:
            raise FileNotFoundError(f"nothing to read at {path}; expected files ending in {', '.join(ENDINGS)}")
        for file in files:
            yield from read_rows(file, left.unread)
        return
    if name not in HUB:
        found = f"fetch {ELSEWHERE[name]}, unpack it" if name in ELSEWHERE else "put it on this disk"
        raise ValueError(f"data set {name!r} has no place on the hub; {found} and name the file or folder with --path")
    from datasets import load_dataset

    for repository, part in HUB[name]:
        where = f"{repository} {part or ''}".strip()
        try:
            for number, row in enumerate(load_dataset(repository, part, split=split, streaming=True), 1):
                yield f"{where}: row {number}", row
        except Exception as error:  # the hub's client, arrow and json share no base
            raise ConnectionError(
                f"{where} cannot be had from the hub ({type(error).__name__}: {error}); fetch it by other means and "
                "name the file or folder with --path"
            ) from error


def main(argv: list[str] | None = None, prog: str = "python -m data_prep.published") -> int:
    """Command line; `prog` is how it was called."""
    parser = Parser(
        prog=prog,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help=f"{', '.join(CONVERTERS)}, or any name with --fields")
    parser.add_argument("--path", type=Path, help="local file or folder: .jsonl, .json, .parquet (default: the hub)")
    parser.add_argument("--split", default="train", help="of the hub's data set (default train)")
    parser.add_argument("--fields", help="columns of a file of your own: context=A,question=B,answer=C")
    parser.add_argument("--task", choices=TASKS, help="task class (default: the data set's own)")
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file to write")
    parser.add_argument("--backbone", default="smollm2-135m", help="whose tokens count (default smollm2-135m)")
    parser.add_argument("--shortest", type=int, default=8192, help="tokens of a prompt (default 8192)")
    parser.add_argument("--longest", type=int, default=65536, help="tokens of a prompt (default 65536)")
    args = parser.parse_args(argv)
    left = Left()
    try:
        check_place("--out", args.out)
        make = converter(args.name, args.fields, args.task)
        from elastic.model.loading import load_tokenizer

        from .draw import token_count

        measure = token_count(load_tokenizer(args.backbone))
        rows = tqdm(rows_of(args.name, args.path, args.split, left), desc=args.name, unit="row")
        with new_file(args.out) as writing:
            count = write_records(writing, convert(make, rows, measure, args.shortest, args.longest, left))
            if not count:
                raise ValueError(
                    f"no record came out of {args.path or args.name} with --shortest {args.shortest} and --longest "
                    f"{args.longest}; left out: {left}"
                )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{args.out}: {count} records; left out: {left}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
