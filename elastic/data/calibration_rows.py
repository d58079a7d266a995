"""Rows that heads are judged on (`elastic calibrate`): packed samples in batches, with what identifies them. They come
from records, from a packed data folder, or from texts as they are.
"""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, zip_longest
from pathlib import Path
from typing import Any

from elastic.data.packing import PackedRow, Sample, best_fit, packed_row
from elastic.data.shards import open_corpus
from elastic.data.tasks import TASKS, task_index
from elastic.files import text_sha256
from elastic.protocols import Tokenizer

TEXT_ENDINGS = (".txt", ".md")
TEXTS = "texts"  # the source of all of a user's own texts
JUDGED = 128  # last tokens of a piece of text, which the model has to predict
_CHARACTERS = 12  # of a token, more than there are: bounds what is read of a long file


@dataclass(frozen=True)
class RowSet:
    """Packed rows, in the batches that run in one forward pass each."""

    batches: list[list[PackedRow]]

    @property
    def sources(self) -> list[str]:
        """Source of every sample, batch by batch."""
        return [name for batch in self.batches for row in batch for name in row["source"]]

    @property
    def places(self) -> list[tuple[int, int]]:
        """Where the samples of each batch are among all samples."""
        ends = accumulate((sum(len(row["source"]) for row in batch) for batch in self.batches), initial=0)
        return list(pairwise(ends))

    def summary(self) -> dict[str, Any]:
        """Samples, tokens, samples by source, and a checksum of tokens and labels."""
        rows = [row for batch in self.batches for row in batch]
        content = [[row["input_ids"], row["labels"], row["cu_seq_lens"], row["source"]] for row in rows]
        return {
            "samples": len(self.sources),
            "tokens": sum(len(row["input_ids"]) for row in rows),
            "sources": dict(sorted(Counter(self.sources).items())),
            "sha256": text_sha256(str(content)),
        }


def batches_of(samples: Sequence[Sample], batch_tokens: int) -> RowSet:
    """Samples packed into batches of at most so many tokens, the longest first; a longer sample is a batch of its own.

    Raises:
        ValueError: no samples.
    """
    if not samples:
        raise ValueError("there are no samples to judge heads by; ask for at least one")
    longest = max(len(sample.input_ids) for sample in samples)
    return RowSet([[packed_row(row)] for row in best_fit(samples, max(batch_tokens, longest))])


def of_folder(
    data_dir: str | Path, manifest: dict[str, Any], split: str, counts: tuple[int, int], batch_tokens: int, seed: int
) -> tuple[RowSet, RowSet]:
    """Rows of a packed data folder, drawn by seed: two sets that have no row in common, of about `counts` samples.

    The second set is drawn from the validation split where `split` is another one and the folder has it.

    Raises:
        ValueError: a split that the folder lacks, or too few rows.
    """
    splits = manifest["splits"]
    if split not in splits:
        raise ValueError(f"{data_dir} has no split {split!r}, only {', '.join(splits)}; choose one of them")
    apart = "validation" if split != "validation" and "validation" in splits else split
    rows = _drawn(data_dir, split, list(splits[split]), seed)
    first = _take(rows, counts[0])
    second = _take(rows if apart == split else _drawn(data_dir, apart, list(splits[apart]), seed), counts[1])
    if not second:
        raise ValueError(
            f"the {len(first)} rows of split {split!r} of {data_dir} make the order, and none is left to measure what "
            "it costs; ask for fewer --samples, or pack more data"
        )
    _tell_tasks_apart([*first, *second])
    return _grouped(first, batch_tokens), _grouped(second, batch_tokens)


def _drawn(data_dir: str | Path, split: str, corpora: list[str], seed: int) -> Iterator[PackedRow]:
    """All rows of a split, its corpora in turn, each in an order that the seed draws."""
    orders = []
    for name in corpora:
        data = open_corpus(data_dir, split, name)
        places = list(range(len(data)))
        random.Random(f"{split}/{name}/{seed}").shuffle(places)
        orders.append([(data, place) for place in places])
    for turn in zip_longest(*orders):
        yield from (found[0][found[1]] for found in turn if found is not None)


def _tell_tasks_apart(rows: Sequence[PackedRow]) -> None:
    """Put the task before the name of a source that has several of them."""
    tasks: dict[str, set[int]] = {}
    for row in rows:
        for task, name in zip(row["task_id"], row["source"], strict=True):
            tasks.setdefault(name, set()).add(task)
    for row in rows:
        pairs = zip(row["task_id"], row["source"], strict=True)
        row["source"] = [f"{TASKS[task]}/{name}" if len(tasks[name]) > 1 else name for task, name in pairs]


def _take(rows: Iterator[PackedRow], samples: int) -> list[PackedRow]:
    taken: list[PackedRow] = []
    found = 0
    while found < samples and (row := next(rows, None)) is not None:
        taken.append(row)
        found += len(row["source"])
    return taken


def _grouped(rows: list[PackedRow], batch_tokens: int) -> RowSet:
    """Neighbouring rows in batches of at most so many tokens, at least one row each."""
    batches: list[list[PackedRow]] = []
    room = 0
    for row in rows:
        size = len(row["input_ids"])
        if not batches or size > room:
            batches.append([])
            room = batch_tokens
        batches[-1].append(row)
        room -= size
    return RowSet(batches)


def text_samples(
    folder: Path, tokenizer: Tokenizer, lengths: Sequence[int], count: int, seed: int
) -> list[Sample]:  # fmt: skip
    """Pieces of a folder's texts, of these lengths in turn; the last `JUDGED` tokens of each are what is predicted.

    Files are read in an order that the seed draws, until there are `count` pieces.

    Raises:
        FileNotFoundError: no folder, or one without texts.
        ValueError: lengths that leave no context, a file that is not UTF-8, or too little text.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--text {folder} is not a folder; name one with {' or '.join(TEXT_ENDINGS)} files")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in TEXT_ENDINGS and path.is_file())
    if not files:
        raise FileNotFoundError(f"--text {folder} holds no {' or '.join(TEXT_ENDINGS)} file; name a folder with texts")
    if min(lengths) < 2 * JUDGED:
        raise ValueError(f"pieces of {min(lengths)} tokens leave too little before the {JUDGED} judged ones")
    random.Random(seed).shuffle(files)
    begin, task = tokenizer("")["input_ids"], task_index("summarization")
    samples: list[Sample] = []
    for file in files:
        tokens = tokenizer(_read(file, count * max(lengths) * _CHARACTERS), add_special_tokens=False)["input_ids"]
        place = 0
        while len(samples) < count:
            size = lengths[len(samples) % len(lengths)] - len(begin)
            if place + size > len(tokens):
                break
            piece = [*begin, *tokens[place : place + size]]
            samples.append(Sample(piece, len(piece) - JUDGED, task, TEXTS))
            place += size
    if len(samples) < count:
        raise ValueError(
            f"--text {folder} has {len(samples)} pieces of {', '.join(map(str, lengths))} tokens, but {count} are "
            "needed; ask for fewer --samples or shorter --lengths, or add texts"
        )
    return samples


def _read(file: Path, characters: int) -> str:
    try:
        with open(file, encoding="utf-8-sig") as stream:
            return stream.read(characters)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 (byte {error.start}); convert it or take it out") from error
