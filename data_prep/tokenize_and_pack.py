"""Step 2: tokenise records with a backbone's chat template and pack them into memory-mapped shards with a manifest."""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elastic.console import Parser
from elastic.data.file_rows import ENDINGS, ReadReport, files_of
from elastic.data.packing import Sample, pack, tokenise
from elastic.data.prompts import TEMPLATE_KWARGS, set_template_kwargs
from elastic.data.records import read_records
from elastic.data.shards import SPLITS, DataWriter, tokenizer_origin
from elastic.files import check_place

from .build_mixture import RECIPE


def prepare(records: str | Path, tokenizer: Any, out: str | Path, seq_length: int) -> tuple[dict[str, Any], ReadReport]:
    """Pack every `<records>/<split>/<name>.jsonl` (or `.json`, `.parquet`) into the corpus `<name>` of that split.

    Records longer than a row are skipped and named in the report, like unreadable ones and files of other names.

    Returns:
        The manifest, and the report on skipped records.

    Raises:
        FileNotFoundError: no records.
        ValueError: a file without usable records, a corpus that a split lacks, a tokenizer that cannot chat, or a
            sequence length below 1.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length={seq_length} is below 1; a row needs room for tokens")
    records, report = Path(records), ReadReport()
    here = [split for split in SPLITS if (records / split).is_dir()]
    others = sorted(p for p in records.glob("*") if p.name not in (*here, RECIPE) and not p.name.startswith("."))
    report.bad += [f"{p}: not read, expected the folders {', '.join(SPLITS)}" for p in others]
    files = [(split, file) for split in here for file in files_of(records / split, report)]
    if not files:
        raise FileNotFoundError(
            f"no records in {records}/{{{','.join(SPLITS)}}}; write them with `elastic data_prep build_mixture`"
            + (f" ({report})" if report.bad else "")
        )
    names = {split: [file.stem for s, file in files if s == split] for split in SPLITS}
    every = sorted({name for found in names.values() for name in found})
    for split, found in names.items():
        if found and (lacking := [name for name in every if name not in found]):
            raise ValueError(f"{records}/{split} lacks {', '.join(lacking)}, which other splits have; add the files")
        if len(set(found)) < len(found):
            raise ValueError(f"{records}/{split} has a corpus as several of {', '.join(ENDINGS)}; keep one of them")
    origin = {
        "seq_length": seq_length,
        "mixture": _recipe(records),
        "versions": {name: version(name) for name in ("transformers", "tokenizers", "datasets")},
        **tokenizer_origin(tokenizer),
    }
    with DataWriter(out, origin) as writer:
        for split, file in tqdm(files, desc="packing", unit="file"):
            writer.add(split, file.stem, pack(_samples(file, tokenizer, seq_length, report), seq_length))
    return writer.manifest, report


def _recipe(records: Path) -> dict[str, Any] | None:
    """How the records were generated; none for a user's own records."""
    file = records / RECIPE
    try:
        recipe: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); build the records again, or remove it") from error
    return recipe


def _samples(file: Path, tokenizer: Any, seq_length: int, report: ReadReport) -> Iterator[Sample]:
    for number, record in enumerate(read_records(file, report), 1):
        where = f"{file}: good record {number} ({record.source or 'no source'})"
        try:
            sample = tokenise(record, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if len(sample.input_ids) <= seq_length:
            yield sample
        else:
            report.good -= 1
            report.bad.append(f"{where} has {len(sample.input_ids)} tokens, more than the {seq_length} of a row")


def main(argv: list[str] | None = None, prog: str = "python -m data_prep.tokenize_and_pack") -> int:
    """Command line; `prog` is how it was called."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("--records", type=Path, required=True, help="folder written by build_mixture")
    parser.add_argument(
        "--backbone", required=True, help="tiny, smollm2-135m, a folder or a hub id: whose tokenizer to use"
    )
    parser.add_argument("--seq-length", type=int, required=True, help="tokens of a packed row")
    parser.add_argument("--out", type=Path, required=True, help="data folder to write")
    told = 'JSON object: variables of the chat template (default: {"enable_thinking": false})'
    parser.add_argument("--chat-template-kwargs", type=json.loads, default=TEMPLATE_KWARGS, metavar="JSON", help=told)
    args = parser.parse_args(argv)
    from elastic.model.loading import load_tokenizer

    try:
        check_place("--out", args.out, folder=True)
        tokenizer = load_tokenizer(args.backbone)
        set_template_kwargs(tokenizer, args.chat_template_kwargs)
        manifest, report = prepare(args.records, tokenizer, args.out, args.seq_length)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for split, corpora in manifest["splits"].items():
        for corpus, entry in corpora.items():
            sys.stdout.write(
                f"{split}/{corpus}: {entry['rows']} rows, {entry['samples']} samples, {entry['tokens']} tokens\n"
            )
    sys.stdout.write(f"{report}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
