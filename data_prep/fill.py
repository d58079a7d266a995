"""Leftover space in rows is filled with generated records made to fit."""

from dataclasses import replace
from typing import Any

from elastic.data.packing import Sample, tokenise

from .draw import Measure
from .generators import generate
from .mixture_config import Mixture

FULL, ENOUGH = 0.97, 0.985  # of a row: what is wanted, and where filling ends, since some rows come out a bit short
TRIES = 6  # for one place in a row: a record that turns out too long is followed by a shorter one of another generator


def fill_up(
    rows: list[list[Sample]], mixture: Mixture, split: str, part: int, tokenizer: Any, measure: Measure
) -> list[list[Sample]]:
    """The same rows, those less than `ENOUGH` full with more samples of the generators, the one furthest below
    its share first; without a generator whose contexts are short enough they stay as they are.
    """
    names = [name for name, source in mixture.sources.items() if source.path is None]
    used = dict.fromkeys(mixture.sources, 0)
    for row in rows:
        for sample in row:
            used[sample.source] += len(sample.input_ids)
    drawn = 0
    for row in rows if names else []:
        room, tries = mixture.seq_length - sum(len(sample.input_ids) for sample in row), 0
        while room > (1 - ENOUGH) * mixture.seq_length and tries < TRIES:
            order = sorted(names, key=lambda name: used[name] / mixture.share(name))
            name, drawn = order[tries % len(order)], drawn + 1
            made = _draw(mixture, name, split, (part, drawn), int(room * (0.9 - 0.12 * tries)), tokenizer, measure)
            if made is None or len(made.input_ids) > room:
                tries += 1
                continue
            row.append(made)
            used[name] += len(made.input_ids)
            room, tries = room - len(made.input_ids), 0
    return rows


def _draw(
    mixture: Mixture, name: str, split: str, number: tuple[int, int], length: int, tokenizer: Any, measure: Measure
) -> Sample | None:
    """A sample of one generator with a context of about `length` tokens; None where its contexts are longer."""
    source = mixture.sources[name]
    shortest, longest = source.context or mixture.context
    length = min(length, longest)
    if length < shortest:
        return None
    seed = -1 - (mixture.seed * 1_000_003 + number[0]) * 1_000_003 - number[1]  # ordinary parts have seeds from 0 on
    shortest = max(shortest, length * 3 // 4)
    name_of, more = source.generator or name, (mixture.window, source.system)
    made = generate(name_of, split, 1, length, seed, measure, *mixture.folders, shortest, *more)
    return replace(tokenise(next(made), tokenizer), source=name)
