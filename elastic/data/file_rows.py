"""Rows of a user's files, one at a time whatever the file's size: JSON Lines, JSON (arrays of objects) and parquet.
Lines and rows that cannot be read are named and skipped, as are files of a folder with names that say nothing about
their format; files that cannot be read are refused.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ENDINGS = (".jsonl", ".json", ".parquet")
PIECE, LONGEST = 1 << 20, 1 << 28  # characters: read at once, of one item at the most
Rows = Iterator[tuple[str, Any]]


@dataclass
class ReadReport:
    """What reading a file or folder met: good records, and for each bad one where it stood and why."""

    good: int = 0
    bad: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        shown = "".join(f"\n  {line}" for line in self.bad[:20])
        more = f"\n  … and {len(self.bad) - 20} more" if len(self.bad) > 20 else ""
        return f"{self.good} records read, {len(self.bad)} skipped{shown}{more}"


def read_rows(path: Path, report: ReadReport, every: int = 1, first: int = 0) -> Rows:
    """Where a row is, and its value, in order.

    Args:
        path: the file.
        report: gets the lines that are not JSON.
        every, first: take only each `every`-th line or row, from the place `first` (from 0) on.

    Raises:
        ValueError: another file type, a parquet file that cannot be read, or a damaged JSON array: the rows before the
            damage have been given out by then.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path} has the ending {path.suffix!r}; expected {', '.join(ENDINGS)}")
    yield from readers[path.suffix.lower()](path, report, every, first)


def files_of(path: Path, report: ReadReport) -> list[Path]:
    """A file itself, or those of a folder that can be read, by name. The report gets the others, and folders in it,
    which are not entered; hidden files do not count.
    """
    found = [path] if path.is_file() else sorted(p for p in path.glob("*") if not p.name.startswith("."))
    read = [p for p in found if p == path or (p.suffix.lower() in ENDINGS and p.is_file())]
    report.bad += [f"{p}: not read, expected files ending in {', '.join(ENDINGS)}" for p in found if p not in read]
    return read


def _jsonl(path: Path, report: ReadReport, every: int, first: int) -> Rows:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if (number - 1) % every != first or not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                report.bad.append(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8")
            except json.JSONDecodeError as error:
                report.bad.append(f"{where}: not JSON ({error.msg} at column {error.colno})")
            except RecursionError:
                report.bad.append(f"{where}: nested too deeply for a record")
            except ValueError as error:  # a number of more digits than Python reads
                report.bad.append(f"{where}: {error}")


def _json(path: Path, report: ReadReport, every: int, first: int) -> Rows:
    """Items of a JSON array, or of several one after the other, a piece of the file at a time: published arrays have
    many gigabytes. A file that begins otherwise is read as JSON Lines.
    """
    with open(path, "rb") as start:
        if not start.read(64).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _jsonl(path, report, every, first)
            return
    number = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            for value in _items(file):
                number += 1
                if (number - 1) % every == first:
                    yield f"{path}: item {number}", value
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 after item {number} ({error}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:  # not JSON, or a number of more digits than Python reads
        raise ValueError(
            f"{path} is a damaged JSON array after item {number} ({error}); fetch it again, or write JSON Lines"
        ) from error


def _items(file: TextIO) -> Iterator[Any]:
    """Values of arrays whose text comes in pieces; each read is at least as long as what is still undecided, so that a
    long item is not begun again too often.
    """
    decoder, text, place, between = json.JSONDecoder(), "", 0, "["
    while piece := file.read(max(PIECE, len(text) - place)):
        text, place = text[place:] + piece, 0
        while (place := _skip_space(text, place)) < len(text):
            if between:
                ends = text[place] == "]" and between == ","
                if not ends and text[place] != between:
                    raise json.JSONDecodeError(f"expected {between!r}", text, place)
                between, place = "[" if ends else "", place + 1
                continue
            if text[place] == "]":  # of an empty array
                between, place = "[", place + 1
                continue
            try:
                value, end = decoder.raw_decode(text, place)
            except json.JSONDecodeError as error:
                if len(text) - place > LONGEST:
                    raise json.JSONDecodeError("no end of an item", text[place : place + 9], 0) from error
                break
            yield value
            between, place = ",", end
    if between != "[":
        raise json.JSONDecodeError("the file ends before its array", text[place : place + 9], 0)


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


def _parquet(path: Path, _report: ReadReport, every: int, first: int) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(256):
            for row in batch.to_pylist():
                number += 1
                if (number - 1) % every == first:
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet ({error}); write or fetch it again") from error
