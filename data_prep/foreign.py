"""The foreign evaluation set: ten kinds of records in wording, names and layouts that no training generator has.

It judges routers where nobody tuned them, so it has a validation and a test half and no train split: nothing that makes
training data draws from it.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from elastic.data.records import Record

from . import foreign_facts, foreign_scenes, foreign_texts
from .draw import Measure, word_count
from .foreign_draw import HELD_OUT, ForeignDraw, Made
from .foreign_instructions import LONG_SYSTEM, SHORT_SYSTEM
from .overlap import SHARE, overlap

FOREIGN: dict[str, tuple[str, Callable[[ForeignDraw], Made]]] = {
    "foreign_pass_key": ("single_qa", foreign_facts.pass_key),
    "foreign_needle": ("single_qa", foreign_facts.needle),
    "foreign_json": ("single_qa", foreign_facts.json_object),
    "foreign_multi_needle": ("multihop_qa", foreign_facts.several_needles),
    "foreign_play": ("single_qa", foreign_scenes.play),
    "foreign_last_paragraph": ("single_qa", foreign_scenes.last_paragraph),
    "foreign_chat": ("single_qa", foreign_scenes.chat),
    "foreign_continuation": ("summarization", foreign_texts.continuation),
    "foreign_summary": ("summarization", foreign_texts.lost_opening),
    "foreign_code": ("code", foreign_texts.code),
}
TEXT_KINDS = ("foreign_continuation", "foreign_summary", "foreign_code")  # answers of real text; others are facts
SYSTEMS = ("none", "short", "long")
SHORTEST = 400  # a shorter context has no room for the last paragraph and others before it
TRIES = 200


def generate_foreign(
    name: str,
    split: str,
    count: int,
    length: int,
    seed: int,
    measure: Measure = word_count,
    text: Path | None = None,
    code: Path | None = None,
    shortest: int | None = None,
    system: str | None = None,
) -> Iterator[Record]:
    """`count` records of one kind; the arguments are those of `generators.generate`, and `system` is a name of
    `SYSTEMS`, None for all in turn. A record's `source` is the kind, its system prompt, its length (the next power of
    two) and a number: `foreign_needle/none/4096/17`.

    Raises:
        ValueError: an unknown kind or system prompt, the split train, or contexts too short.
        FileNotFoundError: folders without text for this split.
    """
    shortest = max(SHORTEST, length // 2) if shortest is None else shortest
    check_foreign(name, split, system, (shortest, length))
    task, make = FOREIGN[name]
    rng = random.Random(f"{name}/{split}/{seed}/{system}/{shortest}/{length}")
    for i in range(count):
        prompt = system or SYSTEMS[i % len(SYSTEMS)]
        draw = ForeignDraw(rng, split, rng.randint(shortest, length), measure, text, code)
        made = _accepted(name, make, draw)
        nominal = 1 << (draw.length - 1).bit_length()
        yield Record(task, **made._asdict(), system=_system(draw, prompt), source=f"{name}/{prompt}/{nominal}/{i}")


def check_foreign(name: str, split: str, system: str | None, context: tuple[int, int]) -> None:
    """Refuse kinds, splits and system prompts that the set does not have, and contexts (shortest, longest) too short.

    Raises:
        ValueError: with what there is.
    """
    if name not in FOREIGN:
        raise ValueError(f"no foreign kind {name!r}; known are {', '.join(FOREIGN)}")
    if split not in HELD_OUT:
        raise ValueError(
            f"{name} is for evaluation alone and has no {split} split; ask for {' or '.join(HELD_OUT)}, and train on "
            "the generators of data_prep/generators.py"
        )
    if system is not None and system not in SYSTEMS:
        raise ValueError(f"system={system!r}; expected one of {', '.join(SYSTEMS)}, or none given for all in turn")
    if not SHORTEST <= context[0] <= context[1]:
        raise ValueError(
            f"contexts of {context[0]} to {context[1]} words or tokens for {name}; expected two lengths "
            f"from {SHORTEST} up"
        )


def _accepted(name: str, make: Callable[[ForeignDraw], Made], draw: ForeignDraw) -> Made:
    """The first draw that keeps the set's rules."""
    for _ in range(TRIES):
        made = make(draw)
        if (is_new if name in TEXT_KINDS else is_found_once)(made):
            return made
    raise ValueError(
        f"{name}: {TRIES} draws of the {draw.split} split had answers that their own contexts repeat; name folders "
        "with more text, or text with fewer repeats"
    )


def is_found_once(made: Made) -> bool:
    """Whether each value of the answer is once in what is given, and not in the question or the reply's beginning."""
    given, asked = made.given.lower(), f"{made.question} {made.answer_prefix}".lower()
    values = made.answer.lower().split(", ")
    return all(given.count(value) == 1 and value not in asked for value in values)


def is_new(made: Made) -> bool:
    """Whether an answer of real text has eight words and shares at most 2 % of its runs of eight words with what is
    given, of which no window is left out.
    """
    share = overlap(made.given, made.answer, 0, word_count)
    return share is not None and share <= SHARE


def _system(draw: ForeignDraw, prompt: str) -> str:
    return "" if prompt == "none" else draw.pick(SHORT_SYSTEM if prompt == "short" else LONG_SYSTEM)
