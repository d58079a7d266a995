"""Random uses of an attached model as plain data: `Case`, and the case of every number."""

import random
from dataclasses import dataclass
from typing import Any

from tests.helpers.models import KV_HEADS, LAYERS

CACHES = {"none": 1, "dynamic": 3, "static": 2, "static by name": 1, "full": 2, "elastic": 4}
MASKS = {"int": 6, "bool": 2, "float": 1, "wide": 1, "dict": 1, "first": 2, "4d": 0.3, "new": 0.3}
SIZES = ((4, 16, 4), (0, 8, 4), (8, 8, 8), (4, 4, 4))  # sink, window, block
Step = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One use of a model.

    Attributes:
        number: of the case; seeds tokens and routers.
        lengths: tokens of each row's prompt.
        padding: left, right, or packed into one row.
        mask: how the batch's mask is passed; `none` where nothing is padded.
        positions: whether `position_ids` are passed.
        cache: what keeps keys and values.
        sizes, granule: of the sparse pattern.
        kind: of the routers.
        bias, dense_decode, chunk_tokens: settings of the model.
        route: `own`, or what `override_routes` is given,
        forced: in these steps, from and up to, counted from 0.
        user: whether `user_spans` say that the first third of a prompt is not the user's.
        steps: what happens, in order: a method of `tests.robustness.run_case.Run` and its arguments.
    """

    number: int
    lengths: tuple[int, ...]
    padding: str
    mask: str
    positions: bool
    cache: str
    sizes: tuple[int, int, int]
    granule: str
    kind: str
    bias: float
    dense_decode: bool
    chunk_tokens: int
    route: Any
    forced: tuple[int, int]
    user: bool
    steps: tuple[Step, ...]


def case_of(number: int) -> Case:
    """The case of a number, the same for every family. What transformers itself lacks or reads otherwise is left out:
    masks of generations that are not [B, S], steps without positions among those of
    `generate`, which passes them.
    """
    draw = random.Random(number)
    rows = draw.choice((1, 1, 2, 3))
    lengths = tuple(draw.choice((1, 3, 9, 17, 30, draw.randint(2, 60))) for _ in range(rows))
    cache = _one_of(draw, CACHES)
    steps = _steps(draw, rows, cache)
    generates = any(step[0] == "generate" for step in steps)
    mask = _one_of(draw, MASKS) if len(set(lengths)) > 1 or draw.random() < 0.5 else "none"
    pattern = tuple(tuple(draw.randint(0, 1) for _ in range(KV_HEADS)) for _ in range(LAYERS))
    return Case(
        number,
        lengths,
        padding=_one_of(draw, {"left": 8, "right": 1, "packed": 1}),
        mask="int" if generates and mask in ("4d", "dict", "new", "wide") else mask,
        positions=generates or draw.random() < 0.6,
        cache=cache,
        sizes=draw.choice(SIZES),
        granule=draw.choice(("token", "token", "block")),
        kind=draw.choice(("paper", "paper", "level", "level", "reach")),
        bias=draw.choice((0.0, 0.0, 0.0, 0.2, -0.2)),
        dense_decode=cache != "elastic" and draw.random() < 0.15,
        chunk_tokens=draw.choice((16384, 7, 1)),
        route=draw.choice(("own", "own", "own", 0, 1, pattern)),
        forced=draw.choice(((0, 99), (0, 99), (0, 1), (1, 99), (1, 2))),
        user=draw.random() < 0.2,
        steps=steps,
    )


def _one_of(draw: random.Random, weights: dict[str, Any]) -> str:
    return draw.choices(list(weights), list(weights.values()))[0]


def _steps(draw: random.Random, rows: int, cache: str) -> tuple[Step, ...]:
    """A prompt, and up to five more steps; none that transformers does not have for the cache."""
    static = cache.startswith("static")
    if cache == "static by name":  # it has room for one call
        return (_generation(draw, 0, rows, static),)
    names = ["read", "tokens", "tokens", "generate", "reorder", "copy"]
    names += [] if static else ["repeat", "select", "crop"]
    found: list[Step] = [("read", 0) if draw.random() < 0.7 else _generation(draw, 0, rows, static)]
    for _ in range(draw.randint(1, 5)):
        if found[-1][-1] == "beams":
            break
        name = draw.choice(names)
        if name == "reorder":
            found.append((name, tuple(draw.randrange(rows) for _ in range(rows))))
        elif name == "repeat":
            found.append((name, 2))
            rows *= 2
        elif name == "select":
            found.append((name, tuple(draw.sample(range(rows), draw.randint(1, rows)))))
            rows = len(found[-1][1])
        elif name == "generate":
            found.append(_generation(draw, draw.randint(1, 12), rows, static))
        elif name == "copy":
            found.append((name,))
        else:
            found.append((name, draw.choice((1, 2, 5, 20))))
    return tuple(found)


def _generation(draw: random.Random, turn: int, rows: int, static: bool) -> Step:
    """`generate` after so many tokens of a turn: so many tokens, this way."""
    alone = () if static or rows > 1 else ("lookup", "assistant") * 2
    how = draw.choice(("greedy",) * 4 + ("beams",) * 2 + ("chunks",) * (draw.random() < 0.5) + alone)
    return "generate", turn, draw.choice((1, 2, 6)), how
