"""A language of 62 words for the shipped tiny backbone: ordinary records, learned on a CPU in minutes.

`single_qa` hides one key with a four-digit value in filler (needs the whole context); `in_context` repeats a short
pattern (a local window is enough).
"""

import random
from typing import Any

from elastic.records import Record

SPECIAL = ("<pad>", "<eos>", "<user>", "<assistant>")
FILLER = tuple(f"f{i}" for i in range(16))
KEYS = tuple(f"k{i}" for i in range(12))
DIGITS = tuple(str(i) for i in range(10))
PATTERN = tuple(f"p{i}" for i in range(16))
WORDS = ("key", "find", "repeat", "on")
VOCABULARY = (*SPECIAL, *WORDS, *FILLER, *KEYS, *DIGITS, *PATTERN)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<assistant> {{ message['content'] }} <eos> "
    "{% else %}<user> {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TASKS = ("single_qa", "in_context")


def build_tokenizer() -> Any:
    """Word-level tokenizer with padding, end-of-sequence and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="on"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="on")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.padding_side = "left"
    return tokenizer


def build_records(task: str, split: str, count: int, words: int, seed: int) -> list[Record]:
    """`count` records of one task with contexts of `words` / 2 to `words` words; splits draw from different streams.

    Raises:
        ValueError: a task that this language does not have, or contexts too short to hide anything in.
    """
    if task not in TASKS:
        raise ValueError(f"the tiny language has no task {task!r}; it has {', '.join(TASKS)}")
    if words < 32:
        raise ValueError(f"contexts of {words} words are too short for the tiny language; use 32 or more")
    rng = random.Random(f"{task}/{split}/{seed}")
    make = {"single_qa": _needle, "in_context": _pattern}[task]
    return [make(rng, rng.randint(words // 2, words), f"tiny/{split}/{i}") for i in range(count)]


def _needle(rng: random.Random, words: int, source: str) -> Record:
    key, value = rng.choice(KEYS), rng.choices(DIGITS, k=4)
    filler = rng.choices(FILLER, k=words - 6)
    place = rng.randrange(len(filler) + 1)
    context = [*filler[:place], "key", key, *value, *filler[place:]]
    return Record("single_qa", " ".join(context), f"find {key}", " ".join(value), source)


def _pattern(rng: random.Random, words: int, source: str) -> Record:
    period = rng.sample(PATTERN, rng.randint(3, 8))
    text = [period[i % len(period)] for i in range(words + 8)]
    return Record("in_context", " ".join(text[:words]), f"repeat on {text[words - 1]}", " ".join(text[words:]), source)
