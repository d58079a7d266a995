"""What a generator draws from: randomness, the split's half of the wording, its texts, and the length asked for."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from . import sources

T = TypeVar("T")
Measure = Callable[[str], int]


class Parts(NamedTuple):
    """What a generator makes of a record."""

    context: str
    question: str
    answer: str
    answer_prefix: str = ""


def word_count(text: str) -> int:
    """Length in words."""
    return len(text.split())


def token_count(tokenizer: Any) -> Measure:
    """Length in tokens of this tokenizer. Short texts, which come again, are remembered."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    remembered = lru_cache(maxsize=1 << 16)(count)
    return lambda text: (remembered if len(text) < 2000 else count)(text)


@dataclass(frozen=True)
class Draw:
    """One record's means.

    Attributes:
        rng: all randomness.
        split: `train`, `validation` or `test`; decides texts and wording.
        length: longest context, in units of `measure`.
        measure: length of a text.
        text, code: the user's folders of documents and of source files; None: what Python itself carries.
    """

    rng: random.Random
    split: str
    length: int
    measure: Measure = word_count
    text: Path | None = None
    code: Path | None = None

    def pick(self, halves: tuple[tuple[T, ...], tuple[T, ...]]) -> T:
        """One item of the split's half."""
        return self.rng.choice(self.half(halves))

    def half(self, halves: tuple[T, T]) -> T:
        """The split's half."""
        return halves[0 if self.split == "train" else 1]

    def sentences(self, room: int) -> list[str]:
        """Whole sentences of prose from random places on, together at most `room` and, where the text has sentences
        short enough, at least four fifths of it.
        """
        taken: list[str] = []
        left, vain = room, 0
        passages = sources.prose(self.split, self.text)
        while left > room // 5 and vain < 50:
            passage = sources.sentences(self.rng.choice(passages))
            vain += 1
            for sentence in passage[self.rng.randrange(max(1, len(passage) // 2)) :]:
                needed = self.measure(f" {sentence}")
                if needed <= left:
                    taken.append(sentence)
                    left, vain = left - needed, 0
                elif left <= room // 5:
                    break
        return taken or [cut_words(passages[0], 0, max(1, room // 3))]

    def repeated(self, lines: Callable[[], str], room: int) -> list[str]:
        """Lines of a source that never ends, together at most `room`."""
        taken: list[str] = []
        while True:
            line = lines()
            room -= self.measure(f"{line}\n")
            if room < 0 and taken:
                return taken
            taken.append(line)

    def hide(self, lines: list[str], facts: list[str], ordered: bool = False) -> list[str]:
        """Put the facts between the lines: at random places, in random order or in theirs."""
        facts = facts if ordered else self.rng.sample(facts, len(facts))
        places = sorted(self.rng.randrange(len(lines) + 1) for _ in facts)
        result, done = [], 0
        for place, fact in zip(places, facts, strict=True):
            result += [*lines[done:place], fact]
            done = place
        return result + lines[done:]

    def room_beside(self, *texts: str) -> int:
        """What the length leaves after these texts."""
        return max(8, self.length - sum(self.measure(f" {text}") for text in texts))


def tail(text: str, characters: int) -> str:
    """The last lines of a text that fit into so many characters."""
    return text[text.find("\n", max(0, len(text) - characters)) + 1 :]


def cut_words(text: str, first: int, last: int | None = None) -> str:
    """Words `first` to `last` of a text, with the white space between them as it is."""
    spans = [match.span() for match in re.finditer(r"\S+", text)][first:last]
    return text[spans[0][0] : spans[-1][1]] if spans else ""
