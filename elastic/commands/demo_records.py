"""What `elastic demo` measures on: settings for both backbones, questions whose answer is far from them or within the
window, and other tasks. Sets of rows share no record; `test` rows share neither wording nor texts with the others.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from elastic.commands.data_prep import part
from elastic.config import SparseConfig
from elastic.data.calibration_rows import RowSet, batches_of
from elastic.data.packing import tokenise
from elastic.data.records import Record
from elastic.model.loading import SMOLLM2, TINY
from elastic.protocols import Tokenizer
from elastic.training.head_need import Recipe

FAR, NEAR = "needle_far", "needle_near"
NEEDLE = "needle_single"  # the generator of both
TINY_NEAR = 42  # its training data have at least 40 words after a value
TINY_TASKS = {NEEDLE: "single_qa"}
LEVEL_SEED = 1 << 20  # apart from the seeds of the other sets
SHORTEST = 0.75  # of a length is the shortest context
SUMMARY = "Summarise the text in one sentence."


@dataclass(frozen=True)
class DemoSettings:
    """One demo.

    Attributes:
        backbone: name of the model.
        sources: kinds of records beside the two of needles.
        lengths: of contexts, in tokens (words of the tiny language), in turn.
        sparse: sizes of what a streaming head sees, small enough for such short contexts.
        recipe: how the need of heads is measured, with few draws.
        order, cost, levels, held_out: records of each kind that make the order of heads, that measure what it costs,
            that level routers are fitted to, and that they are tested on.
        budget: divergence from the dense model that level routers are asked to stay below, in nats per answer token.
        batch_tokens: tokens in one forward pass.
        new_tokens: length of printed answers.
        minutes: what the whole demo takes on two idle cores, about.
    """

    backbone: str
    sources: tuple[str, ...]
    lengths: tuple[int, ...]
    sparse: SparseConfig
    recipe: Recipe
    order: int
    cost: int
    levels: int
    held_out: int
    budget: float
    batch_tokens: int
    new_tokens: int
    minutes: str

    @property
    def tiny(self) -> bool:
        """Whether the backbone knows the tiny language alone."""
        return self.backbone == TINY


SMALL = DemoSettings(
    backbone=SMOLLM2,
    sources=("fact_chain", "continuation", "many_shot"),
    lengths=(160,),
    sparse=SparseConfig(sink=16, window=80, block=16),
    recipe=Recipe(rates=(0.15, 0.3), draws=2),
    order=3,
    cost=2,
    levels=6,
    held_out=8,
    budget=0.1,
    batch_tokens=1200,
    new_tokens=24,
    minutes="about 6 minutes",
)
SMALLEST = DemoSettings(
    backbone=TINY,
    sources=("in_context", "code"),
    lengths=(180, 240),
    sparse=SparseConfig(sink=4, window=64, block=4),
    recipe=Recipe("ablation"),
    order=8,
    cost=4,
    levels=28,
    held_out=24,
    budget=0.01,
    batch_tokens=2048,
    new_tokens=10,
    minutes="half a minute",
)


class Rows(NamedTuple):
    """Rows that make the order, that measure its cost, that level routers are fitted to, and held-out ones."""

    order: RowSet
    cost: RowSet
    levels: RowSet
    held_out: RowSet


def build_rows(settings: DemoSettings, tokenizer: Tokenizer, seed: int) -> Rows:
    """All four sets."""

    def rows(split: str, count: int, seed: int) -> RowSet:
        found = records(settings, tokenizer, split, count, seed)
        samples = [replace(tokenise(record, tokenizer), source=record.source_name) for record in found]
        return batches_of(samples, settings.batch_tokens)

    return Rows(
        rows("train", settings.order, seed),
        rows("validation", settings.cost, seed),
        rows("train", settings.levels, seed + LEVEL_SEED),
        rows("test", settings.held_out, seed),
    )


def records(settings: DemoSettings, tokenizer: Tokenizer, split: str, count: int, seed: int) -> list[Record]:
    """`count` records of every kind."""
    found = []
    for kind in (FAR, NEAR, *settings.sources):
        shares = [
            count // len(settings.lengths) + (i < count % len(settings.lengths)) for i in range(len(settings.lengths))
        ]
        for place, (length, share) in enumerate(zip(settings.lengths, shares, strict=True)):
            number = seed * 1000 + place
            if kind not in (FAR, NEAR):
                found += drawn(settings, tokenizer, kind, split, share, length, number)
                continue
            # The same records twice: only the place of the fact differs.
            needles = drawn(settings, tokenizer, NEEDLE, split, share, length, number)
            found += [replace(moved(record, kind == NEAR), source=f"{kind}/{record.source}") for record in needles]
    return found


def drawn(
    settings: DemoSettings, tokenizer: Tokenizer, source: str, split: str, count: int, length: int, seed: int
) -> list[Record]:
    """Records of a generator; their source begins with its name."""
    if settings.tiny:
        made = part("tiny_language").build_records(TINY_TASKS.get(source, source), split, count, length, seed)
        return [replace(record, source=f"{source}/{record.source}") for record in made]
    measure, shortest = part("draw").token_count(tokenizer), int(SHORTEST * length)
    return list(part("generators").generate(source, split, count, length, seed, measure, shortest=shortest))


def fact_of(record: Record) -> str:
    """The sentence of a needle record that answers its question; in the tiny language, the key with its value."""
    if record.answer_prefix:
        return f"{record.answer_prefix} {record.answer}."
    return f"key {record.question.split()[-1]} {record.answer}"


def moved(record: Record, near: bool) -> Record:
    """A needle record with its fact where the window reaches it, or else in the first third of the context.

    In prose the near place is the end, after all sentences. The tiny backbone has never seen a key so near: there it
    is `TINY_NEAR` words before the end.
    """
    fact = fact_of(record)
    before, found, after = record.context.partition(fact)
    if not found:
        raise ValueError(f"the context of {record.source} lacks its fact {fact!r}")
    rest, prose = f"{before.rstrip()} {after.lstrip()}".strip(), bool(record.answer_prefix)
    if near and prose:
        return replace(record, context=f"{rest} {fact}")
    pieces, mark = (rest.split(". "), ". ") if prose else (rest.split(), " ")
    place = len(pieces) - TINY_NEAR if near else max(1, len(pieces) // 4)
    return replace(record, context=mark.join([*pieces[:place], fact.removesuffix("."), *pieces[place:]]))


def shared_context(settings: DemoSettings, tokenizer: Tokenizer, seed: int, tries: int) -> list[list[Record]]:
    """Held-out prompts to print, so many sets of three: a far question and a near one about the same text, and a
    request for a summary of it. The tiny backbone knows one key a text and no summaries: there the near question is the
    far one with its fact moved, and the third prompt is a pattern to continue.
    """
    longest, first = max(settings.lengths), seed * 1000 + 500
    needles = drawn(settings, tokenizer, NEEDLE, "test", 2 * tries, longest, first)
    if settings.tiny:
        patterns = drawn(settings, tokenizer, "in_context", "test", tries, longest, first)
        return [
            [moved(one, near=False), moved(one, near=True), three]
            for one, three in zip(needles, patterns, strict=False)
        ]
    found = []
    for one, two in zip(needles[::2], needles[1::2], strict=True):
        if one.question != two.question:
            context = moved(replace(two, context=f"{moved(one, near=False).context} {fact_of(two)}"), near=True).context
            three = Record("summarization", context, SUMMARY, "(any)")
            found.append([replace(one, context=context), replace(two, context=context), three])
    return found
