"""Published data sets as common records: MuSiQue, GovReport, XSum, from the hub or local files in their own format.

python -m data_prep.published musique --path musique_ans_v1.0_train.jsonl --out data/records/train/musique.jsonl
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elastic.records import Record, write_records

HUB = {
    "musique": "dgslibisey/MuSiQue",
    "govreport": "ccdv/govreport-summarization",
    "xsum": "EdinburghNLP/xsum",
}
NOT_YET = ("chatqa2", "colt")


@dataclass
class Left:
    """Rows that gave no record, by reason."""

    reasons: dict[str, int] = field(default_factory=dict)

    def out(self, reason: str) -> None:
        """Count one row."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1


def musique(row: dict[str, Any]) -> Record:
    """All paragraphs of a question, numbered with their titles; unanswerable questions are refused."""
    if not row.get("answerable", True):
        raise ValueError("not answerable")
    paragraphs = [f"Passage {i}: {p['title']}\n{p['paragraph_text']}" for i, p in enumerate(row["paragraphs"], 1)]
    question = f"Answer the question from the passages, as briefly as possible. Question: {row['question']}"
    return Record("multihop_qa", "\n\n".join(paragraphs), question, row["answer"], f"musique/{row['id']}")


def govreport(row: dict[str, Any]) -> Record:
    """A government report and its summary."""
    return Record(
        "summarization", row["report"], "Write a one-page summary of the report.", row["summary"], "govreport"
    )


def xsum(row: dict[str, Any]) -> Record:
    """A news article and its one-sentence summary."""
    question = "Summarise the article in one sentence."
    return Record("summarization", row["document"], question, row["summary"], f"xsum/{row['id']}")


CONVERTERS: dict[str, Callable[[dict[str, Any]], Record]] = {"musique": musique, "govreport": govreport, "xsum": xsum}


def convert(
    name: str, rows: Iterable[dict[str, Any]], measure: Callable[[str], int], shortest: int, longest: int, left: Left
) -> Iterator[Record]:
    """Records of a data set, without repeats, whose prompts have `shortest` to `longest` units of `measure`.

    Raises:
        ValueError: a data set that is not known.
    """
    if name not in CONVERTERS:
        reason = "is not converted yet" if name in NOT_YET else "is unknown"
        raise ValueError(f"data set {name!r} {reason}; expected one of {', '.join(CONVERTERS)}")
    if not 0 <= shortest <= longest:
        raise ValueError(f"lengths from {shortest} to {longest}; expected 0 <= shortest <= longest")
    seen: set[int] = set()
    for row in rows:
        try:
            record = CONVERTERS[name](row)
        except (KeyError, TypeError, ValueError) as error:
            left.out(f"{type(error).__name__}: {error}")
            continue
        key = hash((" ".join(record.context.split()), record.question))
        if key in seen:
            left.out("repeated")
        elif not shortest <= measure(record.prompt) <= longest:
            left.out("length")
        else:
            seen.add(key)
            yield record


def rows_of(name: str, path: Path | None, split: str) -> Iterator[dict[str, Any]]:
    """Rows of a local file or folder (.jsonl, .json, .parquet), or of the hub, streamed.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: files that cannot be read.
    """
    from datasets import load_dataset

    if path is None:
        yield from load_dataset(HUB[name], split=split, streaming=True)
        return
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in _KINDS)
    if not files:
        raise FileNotFoundError(f"nothing to read at {path}; expected files ending in {', '.join(_KINDS)}")
    for file in files:
        if file.suffix not in _KINDS:
            raise ValueError(f"{file} ends in {file.suffix!r}; expected {', '.join(_KINDS)}")
        try:
            yield from load_dataset(_KINDS[file.suffix], data_files=str(file), split="train", streaming=True)
        except Exception as error:  # arrow, json and codec errors share no base
            raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}); fetch it again") from error


_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.published", description="published data as records")
    parser.add_argument("name", help=", ".join(CONVERTERS))
    parser.add_argument("--path", type=Path, help="local file or folder (default: the hub)")
    parser.add_argument("--split", default="train", help="of the hub's data set (default train)")
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines file to write")
    parser.add_argument("--backbone", default="smollm2-135m", help="whose tokens count (default smollm2-135m)")
    parser.add_argument("--shortest", type=int, default=8192, help="tokens of a prompt (default 8192)")
    parser.add_argument("--longest", type=int, default=65536, help="tokens of a prompt (default 65536)")
    args = parser.parse_args(argv)
    from data_prep.draw import token_count
    from elastic.backbones import load_tokenizer

    left = Left()
    writing = args.out.with_name(f".{args.out.name}.writing")
    try:
        measure = token_count(load_tokenizer(args.backbone))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        rows = tqdm(rows_of(args.name, args.path, args.split), desc=args.name, unit="row")
        count = write_records(writing, convert(args.name, rows, measure, args.shortest, args.longest, left))
        writing.replace(args.out)
    except (ValueError, OSError) as error:
        writing.unlink(missing_ok=True)
        parser.error(str(error))
    told = ", ".join(f"{n} {reason}" for reason, n in left.reasons.items()) or "none"
    sys.stdout.write(f"{args.out}: {count} records; left out: {told}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
