"""RULER samples that fill their length: lm-evaluation-harness' generators, given a size of the haystack by a search
that measures the whole prompt, sample by sample.

The harness' own loops over these generators step coarsely (RULER's steps at 4K and more) and fill 84-97 % of 2K.
"""

import contextlib
import importlib
import io
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from elastic.evaluation.ruler_data import RulerData, sentences
from elastic.files import text_sha256
from elastic.protocols import Tokenizer

Doc = dict[str, Any]
ENOUGH, AIM = 0.97, 0.985  # of the length: a sample under ENOUGH is drawn again, one over AIM ends the search
DRAWS = 500

# haystack, key, value; needles by key, values by key, keys asked for
NEEDLES: dict[str, tuple[str, str, str, int, int, int]] = {
    "niah_single_1": ("repeat", "words", "numbers", 1, 1, 1),
    "niah_single_2": ("essay", "words", "numbers", 1, 1, 1),
    "niah_single_3": ("essay", "words", "uuids", 1, 1, 1),
    "niah_multikey_1": ("essay", "words", "numbers", 4, 1, 1),
    "niah_multikey_2": ("needle", "words", "numbers", 1, 1, 1),
    "niah_multikey_3": ("needle", "uuids", "uuids", 1, 1, 1),
    "niah_multivalue": ("essay", "words", "numbers", 1, 4, 1),
    "niah_multiquery": ("essay", "words", "numbers", 4, 1, 4),
}
NEW_TOKENS = {"ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50, "ruler_qa_squad": 32, "ruler_qa_hotpot": 32}


def new_tokens(task: str) -> int:
    """Length limit of an answer."""
    return NEW_TOKENS.get(task, 128)


@dataclass(frozen=True)
class Source:
    """Samples of a task by size.

    Attributes:
        make: (index, size, draw) -> sample with `input`, `gen_prefix` and `outputs`; draws from the global generators.
        guess: a size to begin with.
        smallest, largest: sizes that `make` takes.
        questions: how many there are to choose from; None where every index is a new one.
    """

    make: Callable[[int, int, int], Doc]
    guess: int
    smallest: int
    largest: int | None = None
    questions: int | None = None


def make_samples(
    task: str, length: int, count: int, tokens: Callable[[Doc], int], tokenizer: Tokenizer, data: RulerData, seed: int
) -> list[Doc]:
    """`count` samples whose prompt and answer together have at most `length` tokens.

    Args:
        tokens: length of the prompt that a sample becomes.

    Raises:
        ValueError: a length that the smallest sample overruns, or data that cannot be read.
    """
    with harness(seed, task in NEEDLES):
        source = _source(task, length, tokenizer, data)
        budget, size, made = length - new_tokens(task), source.guess, []
        for index in itertools.count() if source.questions is None else range(source.questions):
            found = _draw(source, tokens, budget, length, index, size, f"{seed}/{task}/{index}")
            if found is None and source.questions is None:
                raise ValueError(
                    f"{task} has more than {budget} tokens even at its smallest, so it does not fit into {length} with "
                    "its answer; use a longer length"
                )
            if found is not None:  # else the question's own documents are too long, and the next one is taken
                used, doc, size = found
                made.append({"index": index, **doc, "length": used + new_tokens(task), "max_length": length})
            if len(made) == count:
                return made
    raise ValueError(
        f"{task} has {len(made)} questions whose documents fit into {length} tokens, and {count} were asked for; use a "
        "longer length or a smaller --limit"
    )


def _draw(
    source: Source, tokens: Callable[[Doc], int], budget: int, length: int, index: int, size: int, seed: str
) -> tuple[int, Doc, int] | None:
    """Tokens, sample and size of the first draw that fills the length, or of the fullest of `DRAWS`; None where none
    fits.
    """

    def draw(size: int, attempt: int) -> Doc:
        _seed(f"{seed}/{attempt}")
        return source.make(index, size, attempt)

    aim = budget - (1 - AIM) * length
    best = fill(lambda size: draw(size, 0), tokens, budget, size, source.smallest, source.largest, aim)
    for attempt in range(1, DRAWS):
        if best is None or best[0] >= budget - (1 - ENOUGH) * length or best[2] == source.largest:
            break
        doc = draw(best[2] + 1, attempt)  # a unit more, and units vary in tokens
        used = tokens(doc)
        if best[0] < used <= budget:
            best = used, doc, best[2] + 1
    return best


def fill(
    make: Callable[[int], Doc],
    tokens: Callable[[Doc], int],
    budget: int,
    size: int,
    smallest: int,
    largest: int | None,
    aim: float,
) -> tuple[int, Doc, int] | None:
    """Tokens, sample and size of the largest sample within `budget`, or the first one with `aim` tokens or more; None
    where the smallest is too long. Sizes are guessed from the tokens per unit so far, inside the bracket known so far.
    """
    low, high = smallest - 1, (largest or 10**9) + 1  # low fits or is out of range, high does not
    best: tuple[int, Doc, int] | None = None
    while high - low > 1:
        size = min(max(size, low + 1), high - 1)
        doc = make(size)
        used = tokens(doc)
        if used <= budget:
            low, best = size, (used, doc, size)
            if used >= aim:
                break
        else:
            high = size
        step = round((budget - used) * size / used)
        size += step if step else (1 if used <= budget else -1)
    return best


@contextlib.contextmanager
def harness(seed: int, needles: bool) -> Iterator[None]:
    """The harness' generators draw from the global generators, write to the terminal and fetch a sentence splitter
    when they are imported; inside, they are seeded, silent, and split sentences by `ruler_data.sentences`.

    Args:
        needles: whether that of needles is used. It sorts six million words when it is imported, which takes seconds.
    """
    import nltk
    import numpy as np

    state, download = (random.getstate(), np.random.get_state()), nltk.download
    nltk.download = lambda *_, **__: False
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            _own_sentences() if needles else contextlib.nullcontext(),
        ):
            _seed(str(seed))
            yield
    finally:
        nltk.download = download
        random.setstate(state[0])
        np.random.set_state(state[1])


@contextlib.contextmanager
def _own_sentences() -> Iterator[None]:
    niah: Any = importlib.import_module("lm_eval.tasks.ruler.prepare_niah")
    split, niah.cached_sent_tokenize = niah.cached_sent_tokenize, sentences
    try:
        yield
    finally:
        niah.cached_sent_tokenize = split


def _seed(text: str) -> None:
    import numpy as np
    from lm_eval.tasks.ruler import cwe_utils

    number = int(text_sha256(text)[:8], 16)
    random.seed(number)
    np.random.seed(number)
    cwe_utils.RNG.seed(number)


def _source(task: str, length: int, tokenizer: Tokenizer, data: RulerData) -> Source:
    if task in NEEDLES:
        return _needles(task, length, tokenizer, data)
    makers = {"ruler_vt": _variables, "ruler_cwe": _common_words, "ruler_fwe": _frequent_words}
    if task in makers:
        return makers[task](length, tokenizer, data)
    return _questions(data.squad_questions if task == "ruler_qa_squad" else data.hotpotqa_questions)


def _needles(task: str, length: int, tokenizer: Tokenizer, data: RulerData) -> Source:
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import generate_input_output, get_haystack

    haystack, key, value, keys, values, queries = NEEDLES[task]
    one = queries * values == 1

    def make(_index: int, size: int, draw: int) -> Doc:
        with _short_identifiers(tokenizer, 1 + draw // 8 if haystack == "needle" else 1):
            text, answers, query = generate_input_output(
                size,
                (data.haystack * (size // len(data.haystack) + 1))[:size]
                if haystack == "essay"
                else get_haystack(haystack),
                type_haystack=haystack,
                type_needle_k=key,
                type_needle_v=value,
                template=TEMPLATE,
                num_needle_k=keys,
                num_needle_v=values,
                num_needle_q=queries,
            )
        asked = f"{value[:-1] if one else value} for {query} mentioned in the provided text {'is' if one else 'are'}"
        return {"input": text, "gen_prefix": f"The special magic {asked}", "outputs": answers}

    return Source(make, max(8, length // (1 if haystack == "essay" else 30)), keys * values + 1)


@contextlib.contextmanager
def _short_identifiers(tokenizer: Tokenizer, candidates: int) -> Iterator[None]:
    """Every identifier is the one with the fewest tokens among so many random ones. A line of two of them is too coarse
    a step for short lengths, and the sums of many random ones too alike for another draw to help.
    """
    from lm_eval.tasks.ruler import prepare_niah

    draw = prepare_niah.generate_random_uuid
    if candidates > 1:
        prepare_niah.generate_random_uuid = lambda: min(
            (draw() for _ in range(candidates)), key=lambda text: len(tokenizer(text)["input_ids"])
        )
    try:
        yield
    finally:
        prepare_niah.generate_random_uuid = draw


def _variables(length: int, tokenizer: Tokenizer, _data: RulerData) -> Source:
    from lm_eval.tasks.ruler import vt_utils

    example = vt_utils.sys_vartrack_w_noise_random(tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    shown = f"{example['input']} {' '.join(example['outputs'])}\n\n"
    template = vt_utils.CONFIG["variable_tracking"]
    beginning, ending = template["template"][:20], template["answer_prefix"][:40]

    def make(_index: int, size: int, _draw: int) -> Doc:
        text, answers = vt_utils.generate_input_output(size, num_chains=1, num_hops=4)
        begin, end = text.index(beginning), text.rfind(ending)
        question = f"{text[:begin]}{vt_utils.randomize_icl(shown)}\n\n{text[begin:end]}"
        return {"input": question, "gen_prefix": text[end:].strip(), "outputs": answers}

    return Source(make, max(6, length // 30), 6)


def _common_words(length: int, _tokenizer: Tokenizer, data: RulerData) -> Source:
    from lm_eval.tasks.ruler import cwe_utils

    small, large, prefix = cwe_utils.WORDS, data.long_words, cwe_utils.CONFIG["answer_prefix"]

    def make(_index: int, size: int, _draw: int) -> Doc:
        # RULER's own rule: the long list where the short one has not enough words.
        cwe_utils.WORDS = small if size <= len(small) or large is None else large
        try:
            example, text, answers = cwe_utils.generate_input_output(size, length)
        finally:
            cwe_utils.WORDS = small
        question = text[: text.rfind(prefix)].strip()
        return {"input": f"{example}\n{question}", "gen_prefix": prefix.strip(), "outputs": answers}

    return Source(make, max(11, length // (6 if length < 4096 else 18)), 11, max(len(small), len(large or ())))


def _frequent_words(length: int, _tokenizer: Tokenizer, _data: RulerData) -> Source:
    from lm_eval.tasks.ruler import fwe_utils

    prefix = fwe_utils.CONFIG["answer_prefix"]

    def uncounted(_text: str) -> Any:
        return SimpleNamespace(input_ids=())  # the search counts

    def make(_index: int, size: int, _draw: int) -> Doc:
        text, answers, _ = fwe_utils.generate_input_output(
            length, uncounted, num_words=size, vocab_size=max(20, length // 50)
        )
        return {"input": text[: text.rfind(prefix)].strip(), "gen_prefix": prefix.strip(), "outputs": answers}

    return Source(make, length // 4, 20)


def _questions(read: tuple[list[Doc], list[str]]) -> Source:
    from lm_eval.tasks.ruler import qa_utils

    questions, documents = read

    def make(index: int, size: int, _draw: int) -> Doc:
        gold = len(questions[index]["context"])
        text, answers = qa_utils.generate_input_output(index, max(size, gold), questions, documents)
        return {"input": text, "gen_prefix": "Answer:", "outputs": answers}

    return Source(make, 10, 1, len(documents), len(questions))
