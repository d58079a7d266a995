"""The table of generators: records of every task class from local text. Held-out wording, names and texts never occur
in training, and a record's `source` begins with the name of its generator.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic.data.records import Record
from elastic.data.tasks import TASKS

from . import documents, needles
from .draw import Draw, Measure, Parts, word_count
from .foreign import FOREIGN, generate_foreign
from .overlap import WINDOW, overlap_fault

SHORTEST = 64
TRIES = 200  # for one record, until the overlap rule accepts it
GENERATORS: dict[str, tuple[str, Callable[[Draw], Parts]]] = {
    "needle_single": ("single_qa", needles.single),
    "needle_multi_key": ("single_qa", needles.multi_key),
    "needle_multi_value": ("single_qa", needles.multi_value),
    "needle_multi_query": ("single_qa", needles.multi_query),
    "verbatim_copy": ("single_qa", documents.verbatim_copy),
    "passage_qa": ("single_qa", documents.passage_qa),
    "variable_tracking": ("multihop_qa", needles.variable_tracking),
    "fact_chain": ("multihop_qa", needles.fact_chain),
    "continuation": ("summarization", documents.continuation),
    "summary": ("summarization", documents.summary),
    "code_completion": ("code", documents.code_completion),
    "many_shot": ("in_context", documents.many_shot),
}
BASIC = ("needle_single", "fact_chain", "continuation", "code_completion", "many_shot")  # one for each task class


def generators_of(task: str, chosen: Sequence[str] | None = None) -> list[str]:
    """Names of the generators of a task class, all or those chosen.

    Raises:
        ValueError: an unknown generator, or one of the foreign evaluation set.
    """
    evaluation = [name for name in chosen or () if name in FOREIGN]
    if evaluation:
        raise ValueError(
            f"{', '.join(evaluation)}: for evaluation alone, so never among records to train on; `elastic data_prep "
            "pack_mixture` packs them from a mixture without a train split, such as mixture/foreign"
        )
    unknown = [name for name in chosen or () if name not in GENERATORS]
    if unknown:
        raise ValueError(f"no generator {', '.join(unknown)}; known are {', '.join(GENERATORS)}")
    return [name for name, (of, _) in GENERATORS.items() if of == task and (chosen is None or name in chosen)]


def generate(
    name: str,
    split: str,
    count: int,
    length: int,
    seed: int,
    measure: Measure = word_count,
    text: Path | None = None,
    code: Path | None = None,
    shortest: int | None = None,
    window: int = WINDOW,
    system: str | None = None,
) -> Iterator[Record]:
    """`count` records of one generator, or of one foreign kind, with contexts of about `shortest` to `length`;
    deterministic.

    Args:
        seed: records of other seeds, splits and generators are other draws.
        shortest: shortest context; default half of the longest.
        length: longest context, in words, or in tokens where `measure` is `draw.token_count(tokenizer)`.
        text, code: folders of documents and of source files to use instead of what Python itself carries.
        window: end of the context that robust answers may share text with, in the same unit; see overlap.py. Foreign
            kinds have none.
        system: system prompt of a foreign kind: none, short or long; None: in turn.

    Raises:
        ValueError: an unknown generator, contexts too short, a negative window, or text that is too little or
            repeats itself; a system prompt for a generator that has none, or the split train for a foreign kind.
        FileNotFoundError: folders without text for this split.
    """
    if name in FOREIGN:
        yield from generate_foreign(name, split, count, length, seed, measure, text, code, shortest, system)
        return
    generators_of("", [name])
    if system is not None:
        raise ValueError(f"system={system!r} for {name}; only foreign kinds have system prompts to choose from")
    shortest = length // 2 if shortest is None else shortest
    if length < SHORTEST or not 32 <= shortest <= length:
        raise ValueError(
            f"contexts of {shortest} to {length} words are too short for the text generators; use {SHORTEST} or more"
        )
    if window < 0:
        raise ValueError(f"window={window} is negative; expected a length, 0 for none")
    task, make = GENERATORS[name]
    rng = random.Random(f"{name}/{split}/{seed}")
    for i in range(count):
        wanted, source = rng.randint(shortest, length), f"{name}/{split}/{i}"
        for _ in range(TRIES):
            parts = make(Draw(rng, split, wanted, measure, text, code))
            record = Record(task, **parts._asdict(), source=source)
            if (fault := overlap_fault(record, window, measure)) is None:
                break
        else:
            raise ValueError(
                f"{TRIES} draws of {source} in a row repeat text, at last: {fault}; name folders whose files repeat "
                "each other less (`text:` and `code:` in a mixture, --text, --code), or raise the window"
            )
        yield record


def generate_task(
    task: str, split: str, count: int, length: int, seed: int, chosen: Sequence[str] | None = None, **more: Any
) -> Iterator[Record]:
    """`count` records of a task class, its generators (or those chosen) in turn; the rest as for `generate`."""
    if task not in TASKS:
        raise ValueError(f"no generator for task {task!r}; known tasks are {', '.join(TASKS)}")
    names = generators_of(task, chosen)
    if not names:
        raise ValueError(f"none of the chosen generators makes {task}; it has {', '.join(generators_of(task))}")
    counts = [count // len(names) + (i < count % len(names)) for i in range(len(names))]
    streams = [generate(name, split, n, length, seed, **more) for name, n in zip(names, counts, strict=True)]
    for i in range(count):
        yield next(streams[i % len(streams)])
