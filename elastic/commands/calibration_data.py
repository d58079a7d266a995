"""The rows of `elastic calibrate`: of the offline generators, of packed data, or of a user's own texts. All are drawn
by seed, so every process makes the same ones.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from elastic.commands.data_prep import part
from elastic.config import SparseConfig
from elastic.data.calibration_rows import RowSet, batches_of, of_folder, text_samples
from elastic.data.packing import Sample, tokenise
from elastic.data.prompts import TEMPLATE
from elastic.data.shards import row_tokens, verify
from elastic.model.loading import TINY, backbone_config, load_tokenizer, longest_context
from elastic.protocols import Tokenizer
from elastic.training.resume import check_data

MULTIPLES = (2, 4, 6)  # of sink + window: default lengths of the contexts, as far as the backbone reads so many tokens
BATCH_TOKENS = 32768
LEVEL_SEED = 1 << 20  # apart from the seeds of the other sets
REST = 0.125  # of the longest context, left for question, template and answer
FROM = 0.75  # of a length is the shortest context that a generator makes for it


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    Attributes:
        backbone, gguf_file: whose tokenizer to use.
        sparse: sizes that contexts must exceed.
        samples: that make the order; half as many measure what it costs.
        lengths: of contexts or pieces, in tokens; None: `default_lengths`.
        batch_tokens: tokens in one forward pass.
        seed: of what is drawn.
        folder, split: packed data to draw from instead.
        texts: folder of texts to cut into pieces instead.
        level_samples: that level routers are fitted to; 0: none.
    """

    backbone: str
    gguf_file: str | None
    sparse: SparseConfig
    samples: int
    lengths: tuple[int, ...] | None
    batch_tokens: int
    seed: int
    folder: Path | None
    split: str
    texts: Path | None
    level_samples: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if self.folder is not None and self.texts is not None:
            raise ValueError("--data and --text both name what to judge heads by; give one of them")
        if self.folder is not None and self.lengths is not None:
            raise ValueError("--lengths does not go with --data, whose rows are packed already; leave it out")

    @property
    def counts(self) -> list[int]:
        """Samples that make the order, samples that measure what it costs, and, if wanted, those of level routers."""
        return [self.samples, -(-self.samples // 2), *([self.level_samples] if self.level_samples else [])]


def choose_sizes(args: Namespace, target: Any) -> str | None:
    """Fill in `--batch-tokens` and `--checkpointing` where they are not given: on the CPU their defaults, else by the
    GPU's memory; then the line that says so.

    Args:
        args: of the command.
        target: what is calibrated (`elastic.commands.calibrate.Target`).

    Raises:
        FileNotFoundError, ValueError: no such backbone, or one whose configuration cannot be read.
    """
    given = {"batch_tokens": args.batch_tokens, "checkpointing": args.checkpointing}
    if None not in given.values() or not args.device.startswith("cuda"):
        args.batch_tokens = BATCH_TOKENS if args.batch_tokens is None else args.batch_tokens
        return None
    from elastic.model.memory import Shape
    from elastic.training.sizes import Backbone, Room, calibration_sizes

    usual = int(MULTIPLES[-1] * (target.sparse.sink + target.sparse.window) * (1 + REST))
    asked = max(args.lengths or (usual,)) if args.data is None else row_tokens(args.data) or usual
    longest = min(asked, longest_context(target.backbone, gguf_file=target.gguf_file))
    shape = Shape.of(backbone_config(target.backbone, gguf_file=target.gguf_file))
    gpus = [torch.device(args.device).index or 0] if args.devices == 1 else list(range(args.devices))
    if len(gpus) > (there := torch.cuda.device_count()):
        raise ValueError(f"--devices {args.devices} is more than the {there} CUDA GPUs that torch sees")
    backbone = Backbone(shape, 4 if target.dtype == "float32" else 2)
    sizes, told = calibration_sizes(backbone, Room.of(gpus), longest, given)
    args.batch_tokens, args.checkpointing = sizes["batch_tokens"], sizes["checkpointing"]
    return told


def build(wanted: Wanted) -> tuple[list[RowSet], dict[str, Any]]:
    """The sets of rows, as many as `Wanted.counts`, which share none, and what a calibration says about them.

    Raises:
        FileNotFoundError: folders that are missing or empty.
        ValueError: lengths that do not fit the backbone or the window, packed data of another tokenizer, too few rows.
    """
    limit = longest_context(wanted.backbone, gguf_file=wanted.gguf_file)
    tokenizer = load_tokenizer(wanted.backbone, gguf_file=wanted.gguf_file)
    if wanted.folder is not None:
        manifest = verify(wanted.folder)
        check_data(manifest, limit, tokenizer, wanted.backbone)
        rows = of_folder(wanted.folder, manifest, wanted.split, wanted.counts, wanted.batch_tokens, wanted.seed)
        told = {TEMPLATE: manifest.get(TEMPLATE, {})}  # earlier data was told nothing
        return rows, {"from": "packed data", "split": wanted.split, "seed": wanted.seed, **told}
    lengths = checked_lengths(wanted, limit)
    counts = wanted.counts
    if wanted.texts is not None:
        pieces = iter(text_samples(wanted.texts, tokenizer, lengths, sum(counts), wanted.seed))
        samples = [list(islice(pieces, count)) for count in counts]
    else:
        seeds = (wanted.seed, wanted.seed, wanted.seed + LEVEL_SEED)
        draws = zip(counts, ("train", "validation", "train"), seeds, strict=False)
        samples = [
            generated(replace(wanted, seed=seed), tokenizer, lengths, limit, split, count)
            for count, split, seed in draws
        ]
    origin = "generators" if wanted.texts is None else "texts"
    rows = [batches_of(drawn, wanted.batch_tokens) for drawn in samples]
    return rows, {"from": origin, "lengths": list(lengths), "seed": wanted.seed}


def checked_lengths(wanted: Wanted, limit: int) -> tuple[int, ...]:
    """The lengths asked for, or those of `MULTIPLES` that the backbone reads.

    Raises:
        ValueError: lengths that the backbone does not read, or in which streaming heads see every key.
    """
    sparse = wanted.sparse
    beyond = sparse.has("streaming") or wanted.level_samples > 0  # level routers go by reach, whatever the modes
    seen = sparse.sink + sparse.window if beyond else 1024
    longest = int(limit * (1 - REST)) if wanted.texts is None else limit
    lengths = wanted.lengths or tuple(seen * times for times in MULTIPLES if seen * times <= longest) or (longest,)
    if max(lengths) > limit:
        raise ValueError(f"--lengths {max(lengths)} is more than the {limit} tokens that {wanted.backbone} reads")
    if min(lengths) <= seen and beyond:
        why = "streaming heads see every key" if sparse.has("streaming") else "level routers (--levels) find no reach"
        raise ValueError(
            f"contexts of {min(lengths)} tokens lie within sink {sparse.sink} + window {sparse.window}, where {why}; "
            f"ask for longer --lengths or a smaller --window ({wanted.backbone} reads {limit} tokens)"
        )
    return lengths


def generated(
    wanted: Wanted, tokenizer: Tokenizer, lengths: Sequence[int], limit: int, split: str, count: int
) -> list[Sample]:
    """Samples of every generator and length in turn; those that come out longer than the backbone reads are left out.

    Raises:
        ValueError: lengths that no generator can fill, or that leave no sample.
    """
    tiny = wanted.backbone == TINY
    names = part("tiny_language").TASKS if tiny else tuple(part("generators").GENERATORS)
    cells = [(name, place) for place in range(len(lengths)) for name in names]
    measure = part("draw").token_count(tokenizer)
    samples = []
    for number, (name, place) in enumerate(cells):
        wanted_here = count // len(cells) + (number < count % len(cells))
        seed, length = wanted.seed * 1000 + place, lengths[place]
        if tiny:
            records = part("tiny_language").build_records(name, split, wanted_here, length, seed)
        else:
            shortest = int(FROM * length)
            records = part("generators").generate(name, split, wanted_here, length, seed, measure, shortest=shortest)
        samples += [replace(tokenise(record, tokenizer), source=name) for record in records]
    fitting = [sample for sample in samples if len(sample.input_ids) <= limit]
    if not fitting:
        raise ValueError(f"all {len(samples)} samples are longer than {limit} tokens; ask for shorter --lengths")
    return fitting
