"""Records of the five task classes from local text. Held-out wording, names and texts never occur in training."""

import random
import re
from collections.abc import Callable
from typing import Any

from data_prep import sources
from elastic.records import Record

# Two disjoint halves of everything that is drawn: the first for training, the second for validation and test.
CITIES = (
    ("Lisbon", "Oslo", "Cairo", "Quito", "Hanoi", "Perth", "Turin", "Lagos", "Kyoto", "Dakar", "Minsk", "Boston"),
    ("Riga", "Lima", "Accra", "Delhi", "Porto", "Osaka", "Basel", "Tunis", "Sofia", "Davos", "Malmo", "Denver"),
)
NAMES = (
    ("Alice", "Bruno", "Chloe", "David", "Elena", "Felix", "Grace", "Henry", "Irene", "Jonas", "Karen", "Louis"),
    ("Maria", "Nolan", "Olivia", "Peter", "Quinn", "Rosa", "Simon", "Tessa", "Ulric", "Vera", "Walter", "Yvonne"),
)
PLACES = (
    ("kitchen", "garage", "library", "cellar", "garden", "attic", "studio", "harbour"),
    ("office", "museum", "barn", "tower", "chapel", "workshop", "station", "orchard"),
)
NEEDLES = (
    ("The special magic number for {city} is {value}.", "Remember that the secret number of {city} is {value}."),
    ("Note for later: the locker number for {city} reads {value}.", "In the register, {city} has the number {value}."),
)
NEEDLE_QUESTIONS = (
    ("What is the number for {city}? Reply with the number only.", "Which number belongs to {city}? Digits only."),
    ("What number does {city} have? Answer with digits only.", "Tell me the number of {city}, just the digits."),
)
HOPS = (
    ("{first} shares a desk with {second}.", "{second} keeps the spare key in the {place}."),
    ("{first} always travels with {second}.", "The notebook of {second} lies in the {place}."),
)
HOP_QUESTIONS = (
    "Where does the person who shares a desk with {first} keep the spare key? Answer with one word.",
    "In which place lies the notebook of the person who travels with {first}? Answer with one word.",
)
CONTINUE = ("Continue the text above.", "Write what follows in this text.")
COMPLETE = ("Write the next lines of this file.", "Continue this source file.")
CLASSES = {
    "animal": (
        ("horse", "otter", "eagle", "whale", "tiger", "goose"),
        ("camel", "robin", "shark", "zebra", "mouse", "raven"),
    ),
    "fruit": (
        ("apple", "mango", "peach", "grape", "lemon", "melon"),
        ("cherry", "banana", "papaya", "orange", "plum", "fig"),
    ),
    "colour": (
        ("red", "green", "purple", "white", "brown", "pink"),
        ("blue", "yellow", "black", "beige", "grey", "violet"),
    ),
    "metal": (
        ("iron", "copper", "zinc", "silver", "lead", "nickel"),
        ("gold", "tin", "cobalt", "steel", "bronze", "titanium"),
    ),
}
SHOTS = ("Word: {word}\nClass: {label}", "Item {word} -> group {label}")
SHOT_QUESTIONS = (
    "Word: {word}\nClass: Answer with the class only.",
    "Item {word} -> which group? Answer with the group only.",
)


Measure = Callable[[str], int]
Size = tuple[int, Measure]


def word_count(text: str) -> int:
    """Length in words."""
    return len(text.split())


def token_count(tokenizer: Any) -> Measure:
    """Length in tokens of this tokenizer."""
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def generate(task: str, split: str, count: int, length: int, seed: int, measure: Measure = word_count) -> list[Record]:
    """`count` records of one task class with contexts of about `length` / 2 to `length`; deterministic.

    Args:
        measure: unit of `length`: words, or tokens by `token_count`.

    Raises:
        ValueError: an unknown task, or contexts too short.
    """
    if task not in GENERATORS:
        raise ValueError(f"no generator for task {task!r}; known tasks are {', '.join(GENERATORS)}")
    if length < 64:
        raise ValueError(f"contexts of {length} words are too short for the text generators; use 64 or more")
    rng = random.Random(f"{task}/{split}/{seed}")
    half = 0 if split == "train" else 1
    make = GENERATORS[task]
    return [make(rng, split, half, (rng.randint(length // 2, length), measure), f"{split}/{i}") for i in range(count)]


def single_qa(rng: random.Random, split: str, half: int, size: Size, name: str) -> Record:
    """One number hidden in prose."""
    city, value = rng.choice(CITIES[half]), str(rng.randint(1_000_000, 9_999_999))
    needle = rng.choice(NEEDLES[half]).format(city=city, value=value)
    context = _hide(rng, _sentences(rng, split, size), [needle])
    return Record("single_qa", context, rng.choice(NEEDLE_QUESTIONS[half]).format(city=city), value, f"needle/{name}")


def multihop_qa(rng: random.Random, split: str, half: int, size: Size, name: str) -> Record:
    """Two facts that only together answer the question, among facts about others."""
    people = rng.sample(NAMES[half], 6)
    places = rng.sample(PLACES[half], 3)
    facts = []
    for first, second, place in zip(people[::2], people[1::2], places, strict=True):
        facts += [fact.format(first=first, second=second, place=place) for fact in HOPS[half]]
    context = _hide(rng, _sentences(rng, split, size), facts)
    return Record("multihop_qa", context, HOP_QUESTIONS[half].format(first=people[0]), places[0], f"hops/{name}")


def summarization(rng: random.Random, split: str, half: int, size: Size, name: str) -> Record:
    """Continuation of a passage: lives on its subject and style, not on single details."""
    words = " ".join(_sentences(rng, split, (size[0] + 96, size[1]))).split(" ")
    return Record("summarization", " ".join(words[:-48]), CONTINUE[half], " ".join(words[-48:]), f"prose/{name}")


def code(rng: random.Random, split: str, half: int, size: Size, name: str) -> Record:
    """The next six lines of a source file; where the file is shorter than the context, other files stand before it."""
    files = sources.code(split)
    lines = rng.choice(files).rstrip().split("\n")
    cut = rng.randrange(40, len(lines) - 6)
    answer, before = "\n".join(lines[cut : cut + 6]), "\n".join(lines[:cut])
    if not answer.strip():
        return code(rng, split, half, size, name)
    length, measure = size
    room = 5 * length  # characters of code, about as many tokens as prose of that many words has
    while len(before) < room:
        before = f"{rng.choice(files).rstrip()}\n\n\n{before}"
    context = _tail(before, room)
    while measure is not word_count and (found := measure(context)) > length:
        context = _tail(context, int(len(context) * 0.99 * length / found))
    return Record("code", context, COMPLETE[half], answer, f"code/{name}")


def in_context(rng: random.Random, split: str, half: int, size: Size, name: str) -> Record:
    """Many-shot classification."""
    labels, (length, measure) = list(CLASSES), size
    shots: list[str] = []
    room = length
    while room > 0:
        label = rng.choice(labels)
        shots.append(SHOTS[half].format(word=rng.choice(CLASSES[label][half]), label=label))
        room -= measure(shots[-1] + "\n")
    label = rng.choice(labels)
    question = SHOT_QUESTIONS[half].format(word=rng.choice(CLASSES[label][half]))
    return Record("in_context", "\n".join(shots), question, label, f"{split}-shots/{name}")


Generator = Callable[[random.Random, str, int, Size, str], Record]
GENERATORS: dict[str, Generator] = {
    "single_qa": single_qa,
    "multihop_qa": multihop_qa,
    "summarization": summarization,
    "code": code,
    "in_context": in_context,
}


def _sentences(rng: random.Random, split: str, size: Size) -> list[str]:
    """Whole sentences of prose from random places on, together at most `size` and at least four fifths of it."""
    length, measure = size
    taken: list[str] = []
    room = length
    while room > length // 5:
        sentences = re.split(r"(?<=[.:])\s+", rng.choice(sources.prose(split)))
        for sentence in sentences[rng.randrange(max(1, len(sentences) // 2)) :]:
            text = " ".join(sentence.split())
            needed = measure(f" {text}")
            if text and needed <= room:
                taken.append(text)
                room -= needed
            elif room <= length // 5:
                break
    return taken


def _tail(text: str, characters: int) -> str:
    """The last lines of a text that fit into so many characters."""
    return text[text.find("\n", max(0, len(text) - characters)) + 1 :]


def _hide(rng: random.Random, sentences: list[str], facts: list[str]) -> str:
    """Put each fact between two sentences, in random order and places."""
    for fact in rng.sample(facts, len(facts)):
        sentences.insert(rng.randrange(len(sentences) + 1), fact)
    return " ".join(sentences)
