"""What the foreign kinds draw from: the halves of validation and test, prose that no record repeats, facts with values
that are found once.
"""

import random
import re
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from . import sources
from .draw import Draw
from .foreign_names import FIRST, LAST, PLACES, THINGS, WORDS
from .foreign_wording import Phrase

T = TypeVar("T")
HELD_OUT = ("validation", "test")  # the set's only splits


class Made(NamedTuple):
    """What a kind makes of a record; `turns` are earlier (user, assistant) pairs."""

    context: str
    question: str
    answer: str
    answer_prefix: str = ""
    turns: tuple[tuple[str, str], ...] = ()

    @property
    def given(self) -> str:
        """All that is said before the question."""
        return "\n\n".join([*(text for turn in self.turns for text in turn), self.context])


@dataclass(frozen=True)
class ForeignDraw(Draw):
    """One record's means, where the halves of a table are validation and test."""

    def half(self, halves: tuple[T, T]) -> T:
        """The split's half."""
        return halves[HELD_OUT.index(self.split)]

    def several(self, halves: tuple[tuple[T, ...], tuple[T, ...]], count: int) -> list[T]:
        """Different items of the split's half."""
        return self.rng.sample(self.half(halves), count)

    def people(self, count: int) -> list[str]:
        """Names that share no part."""
        pairs = zip(self.several(FIRST, count), self.several(LAST, count), strict=True)
        return [f"{first} {last}" for first, last in pairs]

    def values(self, sort: str, count: int) -> list[str]:
        """Different values of a sort: number, word, place, thing, who."""
        if sort == "number":
            return [str(number) for number in self.rng.sample(range(1_000, 99_999), count)]
        if sort == "who":
            return self.people(count)
        return self.several({"word": WORDS, "place": PLACES, "thing": THINGS}[sort], count)

    def told(self, phrase: Phrase, distractors: int, **more: str) -> tuple[list[str], str, str, str]:
        """Facts of a phrase, the asked one first, those of other people after it; then question, answer and prefix."""
        count = 1 + distractors
        values = self.values(phrase.sort, count)
        about = [
            {"who": who, "place": place, "thing": thing, **more}
            for who, place, thing in zip(
                self.people(count), self.several(PLACES, count), self.several(THINGS, count), strict=True
            )
        ]
        facts = [phrase.fact.format(value=value, **slots) for value, slots in zip(values, about, strict=True)]
        return facts, phrase.question.format(**about[0]), values[0], phrase.prefix.format(**about[0])

    def prose(self, room: int, without: str = "") -> list[str]:
        """Sentences of library prose, together at most `room`; no paragraph comes twice, none is of the passage
        `without`. The last sentence of a paragraph ends in a blank line.

        Raises:
            ValueError: the split has less text than `room`.
        """
        taken: list[str] = []
        left = room
        share = max(room // 3, 300)  # of one passage at most, for variety
        passages = [text for text in sources.prose(self.split, self.text) if text != without]
        for rounds in (share, room):  # what the passages have beyond their share comes last
            for passage in self.rng.sample(passages, len(passages)):
                start = left
                for paragraph in rotated(self.rng, passage) if rounds == share else paragraphs(passage):
                    if start - left > rounds or left <= room // 50:
                        break
                    if paragraph[0] not in taken:
                        left -= self._add(paragraph, left, taken)
                if left <= room // 50:
                    return taken
        if left > room // 10:
            raise self._too_little("passages of prose", passages, "text")
        return taken

    def _add(self, paragraph: list[str], room: int, taken: list[str]) -> int:
        """Append what fits of a paragraph, whole sentences from its start; returns their length."""
        used = 0
        for sentence in paragraph:
            size = self.measure(f" {sentence}") + sentence.endswith("\n\n")  # the blank line
            if used + size > room:
                break
            taken.append(sentence)
            used += size
        return used

    def text_of(self, room: int, without: str = "") -> str:
        """Prose as one text."""
        return joined(self.prose(room, without))


def joined(sentences: list[str]) -> str:
    """One text of sentences, some of which end in a blank line."""
    return " ".join(sentences).replace("\n\n ", "\n\n").strip()


def paragraphs(passage: str) -> list[list[str]]:
    """Sentences of each paragraph, the last of them with the blank line that follows it."""
    found = [list(sources.sentences(part)) for part in re.split(r"\n\s*\n", passage) if part.strip()]
    return [[*part[:-1], f"{part[-1]}\n\n"] for part in found if part]


def rotated(rng: random.Random, passage: str) -> list[list[str]]:
    """The paragraphs from a random one of the first half on."""
    found = paragraphs(passage)
    return found[rng.randrange(1 + len(found) // 2) :]
