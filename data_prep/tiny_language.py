"""A language of 64 words for the shipped tiny backbone: ordinary records, learned on a CPU in minutes.

`single_qa` hides one key with a four-digit value in filler, far from the question, so it needs the whole context.
`in_context` repeats a short pattern and `code` counts on in steps of one to three: there a local window is enough. The
answer of `in_context` begins with the question's last word, so that each later word follows from an earlier place.
"""

import random
from typing import Any

from elastic.data.records import Record
from elastic.files import text_sha256

SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>")
FILLER = tuple(f"f{i}" for i in range(16))
KEYS = tuple(f"k{i}" for i in range(12))
DIGITS = tuple(str(i) for i in range(10))
PATTERN = tuple(f"p{i}" for i in range(16))
WORDS = ("key", "find", "repeat", "count", "on", "then")
VOCABULARY = (*SPECIAL, *WORDS, *FILLER, *KEYS, *DIGITS, *PATTERN)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<assistant> {{ message['content'] }} <eos> "
    "{% else %}<user> {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TASKS = ("single_qa", "in_context", "code")
SHARES = {"train": range(0, 6), "validation": range(6, 7), "test": range(7, 8)}  # eighths of all possible records
MARGIN = 40  # filler words after the value: a window of up to 32 tokens at the question never sees it


def build_tokenizer() -> Any:
    """Word-level tokenizer with padding, end-of-sequence and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="then"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="then")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def build_records(task: str, split: str, count: int, words: int, seed: int) -> list[Record]:
    """`count` records of one task with contexts of `words` / 2 to `words` words.

    Splits are disjoint: a record belongs to one split by the hash of its text, whatever the seed.

    Raises:
        ValueError: a task or split that this language does not have, or contexts too short to hide anything in.
    """
    if task not in TASKS:
        raise ValueError(f"the tiny language has no task {task!r}; it has {', '.join(TASKS)}")
    if split not in SHARES:
        raise ValueError(f"the tiny language has no split {split!r}; it has {', '.join(SHARES)}")
    if words < 48:
        raise ValueError(f"contexts of {words} words are too short for the tiny language; use 48 or more")
    rng = random.Random(f"{task}/{split}/{seed}")
    make = {"single_qa": _needle, "in_context": _pattern, "code": _counting}[task]
    records: list[Record] = []
    while len(records) < count:
        record = make(rng, rng.randint(words // 2, words), f"tiny/{split}/{len(records)}")
        if _eighth(record) in SHARES[split]:
            records.append(record)
    return records


def _eighth(record: Record) -> int:
    return int(text_sha256(f"{record.prompt}/{record.answer}")[:2], 16) % 8


def _needle(rng: random.Random, words: int, source: str) -> Record:
    key, value = rng.choice(KEYS), rng.choices(DIGITS, k=4)
    filler = rng.choices(FILLER, k=words - 6)
    place = rng.randint(0, len(filler) - min(MARGIN, len(filler) // 2))  # short contexts: in their first half
    context = [*filler[:place], "key", key, *value, *filler[place:]]
    return Record("single_qa", " ".join(context), f"find {key}", " ".join(value), source)


def _pattern(rng: random.Random, words: int, source: str) -> Record:
    period = rng.sample(PATTERN, rng.randint(3, 8))
    text = [period[i % len(period)] for i in range(words + 8)]
    last = text[words - 1]
    return Record(
        "in_context", " ".join(text[:words]), f"repeat on {last}", f"{last} {' '.join(text[words:-1])}", source
    )


def _counting(rng: random.Random, words: int, source: str) -> Record:
    start, step = rng.randrange(10), rng.choice([1, 2, 3])
    text = [DIGITS[(start + step * i) % 10] for i in range(words + 8)]
    return Record("code", " ".join(text[:words]), f"count on {text[words - 1]}", " ".join(text[words:]), source)
