"""Packed corpora on disk: memory-mapped arrow files and one manifest with checksums and counts.

Layout: `<data_dir>/manifest.json` and `<data_dir>/<split>/<corpus>.arrow`, one row per packed row. A data folder is
written beside its final place and renamed, so a half-written one is never picked up.
"""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

from elastic.data.packing import PackedRow
from elastic.data.prompts import TEMPLATE, template_kwargs
from elastic.data.tasks import TASKS
from elastic.files import file_sha256, is_foreign, member, new_folder, sealed, sole_writer, text_sha256, unsealed
from elastic.protocols import Tokenizer

FORMAT = 2
SPLITS = ("train", "validation", "test")
MANIFEST = "manifest.json"
_LONGEST_NAME = 200  # characters; file systems take 255 bytes, with the ending


class DataWriter:
    """Context manager that writes a data folder: `add` each corpus, leave the context to put the folder into place.

    Args:
        out: final folder.
        origin: what the manifest should say about how the data was made (seed, tokenizer, sequence length, versions).

    Raises:
        ValueError: `out` exists but is not a data folder (it is never replaced; an existing data folder is), or another
            process is writing it.
    """

    def __init__(self, out: str | Path, origin: dict[str, Any]) -> None:
        self.out = Path(out)
        self.manifest: dict[str, Any] = {"format": FORMAT, **origin, "splits": {}}

    def __enter__(self) -> "DataWriter":
        if is_foreign(self.out, MANIFEST):
            raise ValueError(f"{self.out} exists but is not an Elastic Attention data folder; choose another --out")
        with ExitStack() as leaving:
            leaving.enter_context(sole_writer(self.out))
            self.scratch = leaving.enter_context(new_folder(self.out))
            leaving.push(self._finish)
            self._leaving = leaving.pop_all()
        return self

    def add(self, split: str, corpus: str, rows: Iterable[PackedRow]) -> dict[str, Any]:
        """Write one corpus; returns its entry in the manifest.

        Raises:
            ValueError: an unknown split, or no rows.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
        file = self.scratch / split / f"{corpus}.arrow"
        file.parent.mkdir(exist_ok=True)
        entry = write_shard(file, rows)
        if not entry["rows"]:
            raise ValueError(f"corpus {corpus!r} of split {split!r} has no rows; build more records for it")
        self.manifest["splits"].setdefault(split, {})[corpus] = entry
        return entry

    def __exit__(self, *error: Any) -> None:
        self._leaving.__exit__(*error)

    def _finish(self, kind: Any, *_: object) -> None:
        if kind is None:
            (self.scratch / MANIFEST).write_text(sealed(self.manifest), encoding="utf-8")


def write_shard(file: Path, rows: Iterable[PackedRow]) -> dict[str, Any]:
    """Write one shard; returns its entry in a manifest: counts, tokens of the longest sample, samples per task and
    source, the token histogram per task (`lengths`: samples of at most 2^k tokens and more than half of that) and the
    checksum.
    """
    from datasets.arrow_writer import ArrowWriter

    tasks: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    lengths: dict[str, Counter[int]] = {}
    tokens = samples = count = 0
    longest = 0
    writer = ArrowWriter(path=str(file), features=_features())
    for row in rows:
        writer.write(dict(row))
        names = [TASKS[i] for i in row["task_id"]]
        tasks.update(names)
        sources.update(row["source"])
        for name, (start, stop) in zip(names, pairwise(row["cu_seq_lens"]), strict=True):
            lengths.setdefault(name, Counter())[1 << (stop - start - 1).bit_length()] += 1
            longest = max(longest, stop - start)
        count, tokens, samples = count + 1, tokens + len(row["input_ids"]), samples + len(names)
    writer.finalize()
    return {
        "rows": count,
        "samples": samples,
        "tokens": tokens,
        "longest": longest,
        "tasks": dict(tasks),
        "sources": dict(sources),
        "lengths": {name: {str(k): found[k] for k in sorted(found)} for name, found in lengths.items()},
        "sha256": file_sha256(file),
    }


def read_manifest(data_dir: str | Path) -> dict[str, Any]:
    """The manifest of a data folder.

    Raises:
        FileNotFoundError: no folder or no manifest.
        ValueError: a manifest that is damaged or of another format.
    """
    path = Path(data_dir) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"no data at {data_dir} ({MANIFEST} is missing); build it with `elastic data_prep tokenize_and_pack`"
            " (docs/data.md)"
        )
    try:
        manifest = unsealed(path.read_text(encoding="utf-8"))
        found = member(manifest, "format", int)
        if found == FORMAT:
            _check(manifest)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); build the data again") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}, this version reads format {FORMAT}; build the data again")
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """ValueError unless what this package reads of a manifest is there."""
    if member(manifest, "seq_length", int) < 1:
        raise ValueError(f"seq_length is {manifest['seq_length']}, expected 1 or more")
    tokenizer = member(manifest, "tokenizer", dict)
    _ = [member(tokenizer, key, str) for key in ("name", "sha256")]
    splits = member(manifest, "splits", dict)
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"split {split!r:.40} is unknown, expected some of {', '.join(SPLITS)}")
        if not member(splits, split, dict):
            raise ValueError(f"split {split!r} holds nothing")
        for corpus in splits[split]:
            if Path(corpus).name != corpus or not corpus.isprintable() or len(corpus) > _LONGEST_NAME:
                raise ValueError(f"corpus {corpus!r:.40} is not the name of a file")
            entry = member(splits[split], corpus, dict)
            member(entry, "sha256", str)
            _ = [member(entry, key, int) for key in ("rows", "samples", "tokens")]
            _ = [member(entry, key, dict) for key in ("tasks", "sources", "lengths")]


def row_tokens(folder: str | Path) -> int | None:
    """Tokens of a packed row, as the manifest says; None where it cannot be read, of which `verify` says why."""
    try:
        return int(read_manifest(folder)["seq_length"])
    except (OSError, ValueError, KeyError):
        return None


def verify(data_dir: str | Path) -> dict[str, Any]:
    """Check every shard's checksum; returns the manifest.

    Raises:
        ValueError: a missing or damaged shard, with both checksums.
    """
    manifest = read_manifest(data_dir)
    for split, corpora in manifest["splits"].items():
        for corpus, entry in corpora.items():
            file = Path(data_dir) / split / f"{corpus}.arrow"
            found = file_sha256(file) if file.is_file() else "no file"
            if found != entry["sha256"] and read_manifest(data_dir) != manifest:
                return verify(data_dir)  # another folder was put there meanwhile
            if found != entry["sha256"]:
                raise ValueError(
                    f"shard {file} is damaged: sha256 {found}, expected {entry['sha256']}; build the data again"
                )
    return manifest


def open_corpus(data_dir: str | Path, split: str, corpus: str) -> Any:
    """Memory-mapped `datasets.Dataset` of packed rows."""
    from datasets import Dataset

    return Dataset.from_file(str(Path(data_dir) / split / f"{corpus}.arrow"))


def sources_of(manifest: dict[str, Any], split: str) -> tuple[str, ...]:
    """Names of the generators and data sets whose records a split holds, in alphabetical order."""
    return tuple(sorted({name for entry in manifest["splits"][split].values() for name in entry["sources"]}))


def tokenizer_origin(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a manifest says about how records became tokens."""
    named = {"name": Path(tokenizer.name_or_path).name, "sha256": tokenizer_hash(tokenizer)}
    return {"tokenizer": named, TEMPLATE: template_kwargs(tokenizer)}


def longest_sample(manifest: dict[str, Any]) -> int:
    """Tokens of the longest sample; of data from before that was recorded, a power of two that no sample exceeds."""
    entries = [entry for corpora in manifest["splits"].values() for entry in corpora.values()]
    return max(
        entry.get("longest") or max(int(size) for counts in entry["lengths"].values() for size in counts)
        for entry in entries
    )


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """sha256 of vocabulary and chat template: what decides how records become tokens."""
    text = json.dumps([sorted(tokenizer.get_vocab().items()), str(tokenizer.chat_template)])
    return text_sha256(text)


def _features() -> Any:
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    return Features(
        {
            "input_ids": ids,
            "labels": ids,
            "cu_seq_lens": ids,
            "prompt_spans": List(ids),
            "user_spans": List(ids),
            "task_id": ids,
            "source": List(Value("string")),
        }
    )
