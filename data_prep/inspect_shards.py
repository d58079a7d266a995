"""Step 3: show what a model will see: task shares, how full the rows are, and decoded samples with their label mask."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic.packed import IGNORE
from elastic.shards import SPLITS, open_corpus, verify
from elastic.tasks import TASKS


def describe(data_dir: str | Path, split: str, tokenizer: Any, samples: int) -> Iterator[str]:
    """Lines of text about one split; verifies the checksums first.

    Raises:
        ValueError: a split that the data does not have, or a damaged shard.
    """
    manifest = verify(data_dir)
    if split not in manifest["splits"]:
        raise ValueError(f"{data_dir} has no split {split!r}; it has {', '.join(manifest['splits'])}")
    corpora = manifest["splits"][split]
    total = sum(entry["tokens"] for entry in corpora.values())
    for name, entry in corpora.items():
        filled = entry["tokens"] / (entry["rows"] * manifest["seq_length"])
        share = entry["tokens"] / total
        yield f"{name}: {entry['rows']} rows, {entry['samples']} samples, {share:.1%} of tokens, {filled:.1%} full"
    for name in corpora:
        for row in open_corpus(data_dir, split, name).select(range(min(samples, corpora[name]["rows"]))):
            yield from _sample(name, row, tokenizer)


def _sample(corpus: str, row: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    """The first sample of a row: its prompt's ends and its answer."""
    (begin, end), stop = row["prompt_spans"][0], row["cu_seq_lens"][1]
    labelled = sum(label != IGNORE for label in row["labels"][:stop])
    yield f"--- {corpus}: {TASKS[row['task_id'][0]]}, {end - begin} prompt tokens, {labelled} labelled tokens"
    prompt = tokenizer.decode(row["input_ids"][begin:end])
    yield prompt if len(prompt) < 400 else f"{prompt[:200]} […] {prompt[-200:]}"
    yield f">>> {tokenizer.decode(row['input_ids'][end:stop])}"


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.inspect_shards", description=__doc__)
    parser.add_argument("data", type=Path, help="data folder written by data_prep.tokenize_and_pack")
    parser.add_argument("--backbone", required=True, help="whose tokenizer decodes the tokens")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    parser.add_argument("--samples", type=int, default=1, help="samples shown per corpus (default 1)")
    args = parser.parse_args(argv)
    from elastic.backbones import load_tokenizer

    try:
        for line in describe(args.data, args.split, load_tokenizer(args.backbone), args.samples):
            sys.stdout.write(line + "\n")
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
