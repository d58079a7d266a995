"""Step 3: show what a model will see: task shares, how full the rows are, decoded samples with their label mask, and a
picture of shares and lengths.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from elastic.console import Parser
from elastic.data.packing import IGNORE
from elastic.data.shards import SPLITS, open_corpus, verify
from elastic.data.tasks import TASKS
from elastic.files import check_place
from elastic.plots import bars_figure, save_png


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
    for what in ("tasks", "sources"):
        counts = summed(corpora, what)
        yield f"{what}: " + ", ".join(f"{key} {n} ({n / sum(counts.values()):.1%})" for key, n in counts.items())
    for name in corpora:
        for row in open_corpus(data_dir, split, name).select(range(min(samples, corpora[name]["rows"]))):
            yield from _sample(name, row, tokenizer)


def summed(corpora: dict[str, Any], what: str) -> dict[str, int]:
    """Samples per task or source over all corpora of a split."""
    counts: Counter[str] = Counter()
    for entry in corpora.values():
        counts.update(entry[what])
    return dict(sorted(counts.items()))


def picture(data_dir: str | Path, split: str, path: str | Path) -> Path:
    """PNG of a split: samples per task and source, and the histogram of their lengths by task."""
    corpora = verify(data_dir)["splits"][split]
    lengths: dict[str, Counter[int]] = {}
    for entry in corpora.values():
        for task, counts in entry["lengths"].items():
            lengths.setdefault(task, Counter()).update({int(size): n for size, n in counts.items()})
    sizes = sorted({size for counts in lengths.values() for size in counts})
    panels = {
        f"{split}: samples per task": {"samples": summed(corpora, "tasks")},
        "samples per source": {"samples": summed(corpora, "sources")},
        "samples by length": {
            task: {f"to {size}": counts[size] for size in sizes} for task, counts in sorted(lengths.items())
        },
    }
    return save_png(bars_figure(panels), path)


def _sample(corpus: str, row: dict[str, Any], tokenizer: Any) -> Iterator[str]:
    """The first sample of a row: its prompt's ends and its answer; the label mask of the whole row."""
    (begin, end), stop = row["prompt_spans"][0], row["cu_seq_lens"][1]
    labelled = sum(label != IGNORE for label in row["labels"][:stop])
    task, source = TASKS[row["task_id"][0]], row["source"][0]
    yield f"--- {corpus}: {task}, {source}, {end - begin} prompt tokens, {labelled} labelled tokens"
    yield f"label mask of its row ({len(row['task_id'])} samples): {mask_line(row['labels'])}"
    prompt = tokenizer.decode(row["input_ids"][begin:end])
    yield prompt if len(prompt) < 400 else f"{prompt[:200]} […] {prompt[-200:]}"
    yield f">>> {tokenizer.decode(row['input_ids'][end:stop])}"


def mask_line(labels: list[int], width: int = 64) -> str:
    """The row in `width` equal pieces: # where a piece has labelled tokens, . where it has none."""
    edges = [len(labels) * i // width for i in range(width + 1)]
    return "".join("#" if any(x != IGNORE for x in labels[a:b]) else "." for a, b in pairwise(edges) if a < b)


def main(argv: list[str] | None = None, prog: str = "python -m data_prep.inspect_shards") -> int:
    """Command line; `prog` is how it was called."""
    parser = Parser(prog=prog, description=__doc__)
    parser.add_argument("data", type=Path, help="data folder written by tokenize_and_pack or pack_mixture")
    parser.add_argument("--backbone", required=True, help="whose tokenizer decodes the tokens")
    parser.add_argument("--split", choices=SPLITS, default="train", help="default: train")
    parser.add_argument("--samples", type=int, default=1, help="samples shown per corpus (default 1)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write shares and lengths as a PNG")
    args = parser.parse_args(argv)
    from elastic.model.loading import load_tokenizer

    try:
        if args.picture is not None:
            check_place("--picture", args.picture)
        for line in describe(args.data, args.split, load_tokenizer(args.backbone), args.samples):
            sys.stdout.write(line + "\n")
        if args.picture is not None:
            sys.stdout.write(f"picture: {picture(args.data, args.split, args.picture)}\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
