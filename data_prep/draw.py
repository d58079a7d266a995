"""What a generator draws from: randomness, the split's half of the wording, its texts, and the length asked for."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count
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
        used: sentences of prose that the record has taken; none of them is taken again.
    """

    rng: random.Random
    split: str
    length: int
    measure: Measure = word_count
    text: Path | None = None
    code: Path | None = None
    used: set[str] = field(default_factory=set, compare=False)

    def pick(self, halves: tuple[tuple[T, ...], tuple[T, ...]]) -> T:
        """One item of the split's half."""
        return self.rng.choice(self.half(halves))

    def half(self, halves: tuple[T, T]) -> T:
        """The split's half."""
        return halves[0 if self.split == "train" else 1]

    def sentences(self, room: int, again: bool = False) -> list[str]:
        """Sentences of prose from random places on, none twice in a record, together at most `room` and at least four
        fifths of it. Where the sentences that remain are all longer than what is left, one of them is cut.

        Args:
            room: in units of `measure`.
            again: start anew when every sentence was taken, for filler that no answer lies in.

        Raises:
            ValueError: every sentence of the split was taken, and `again` is not set.
        """
        taken: list[str] = []
        left, vain = room, 0
        while left > room // 5:
            before = left
            for sentence in next(self._stretches):
                if sentence in self.used:
                    continue
                needed = self.measure(f" {sentence}")
                if needed <= left:
                    taken.append(sentence)
                    self.used.add(sentence)
                    left -= needed
                elif left <= room // 5:
                    break
            vain = 0 if left < before else vain + 1
            if vain > 2 * len(self._passages):  # so many in a row include every passage in full
                vain, cut = 0, self._cut_sentence(left, again)
                taken += cut
                left -= sum(self.measure(f" {piece}") for piece in cut)
        return taken

    def _cut_sentence(self, room: int, again: bool) -> list[str]:
        """The beginning of a sentence that was not taken; where there is none, a refusal or a new start."""
        untaken = [s for passage in self._passages for s in sources.sentences(passage) if s not in self.used]
        if untaken:
            sentence = self.rng.choice(untaken)
            self.used.add(sentence)
            return [longest_start(sentence, room, self.measure)]
        if not again:
            raise self._too_little("passages of prose", self._passages, "text")
        self.used.clear()
        return []

    @property
    def _passages(self) -> tuple[str, ...]:
        return sources.prose(self.split, self.text)

    @cached_property
    def _stretches(self) -> Iterator[tuple[str, ...]]:
        """Passages in random order, from a random place of their first half on; then all of them whole, for ever."""
        for lap in count():
            for passage in self.shuffled(self._passages):
                found = sources.sentences(passage)
                yield found[self.rng.randrange(max(1, len(found) // 2)) if lap == 0 else 0 :]

    def shuffled(self, items: Sequence[T]) -> Iterator[T]:
        """All items in random order; the time it takes is that of the items asked for."""
        moved: dict[int, int] = {}  # places whose item was given out, and the item that is there now
        for last in reversed(range(len(items))):
            place = self.rng.randrange(last + 1)
            yield items[moved.get(place, place)]
            moved[place] = moved.pop(last, last)

    def rounds(self, items: Sequence[T]) -> Iterator[T]:
        """All items in random order, then all of them in another one, for ever."""
        while True:
            yield from self.shuffled(items)

    def deck(self, what: str, folder: str, *groups: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Items of one group after another, each group in random order, none twice; after the last one a refusal.

        Args:
            what: the items, in words, for the refusal.
            folder: the field that names where they come from, `text` or `code`.
            groups: items with their text as the second value.
        """
        for group in groups:
            yield from self.shuffled(group)
        raise self._too_little(what, [text for group in groups for _, text in group], folder)

    def _too_little(self, what: str, texts: Sequence[str], folder: str) -> ValueError:
        unit = "words" if self.measure is word_count else "tokens"
        return ValueError(
            f"{getattr(self, folder) or 'the Python library'} has {len(texts)} {what} ({sum(map(word_count, texts))} "
            f"words) for the {self.split} split, too little for a context of {self.length} {unit} without repetition; "
            f"name a folder with more (`{folder}:` in a mixture, --{folder}), or ask for shorter contexts (`context:`, "
            "--words)"
        )

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


def longest_start(text: str, room: int, measure: Measure) -> str:
    """The longest beginning, in words and at least one, that fits into the room."""
    words = word_count(text)
    while (found := measure(text)) > room and words > 1:
        words = max(1, min(words - 1, int(words * room / found)))
        text = cut_words(text, 0, words)
    return text


def longest_end(text: str, room: int, measure: Measure) -> str:
    """The longest end, in words and at least one, that fits into the room."""
    words = word_count(text)
    while (found := measure(text)) > room and words > 1:
        words = max(1, min(words - 1, int(words * room / found)))
        text = cut_words(text, -words)
    return text
