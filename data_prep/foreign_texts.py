"""Foreign kinds whose answers are real text: what follows in prose and code, and the lost opening of a passage."""

import re
from itertools import pairwise

from . import sources
from .draw import longest_end, longest_start
from .foreign_draw import ForeignDraw, Made
from .foreign_instructions import CODE, CONTINUE, FILE, ITEM, LOST_OPENING

SHORT, LONG = 100, 190  # words or tokens of an answer
OPENING = (8, 60)  # words of a lost opening


def continuation(draw: ForeignDraw) -> Made:
    """A passage cut at the end of a sentence, after passages on other subjects; its next sentences are the answer."""
    passage = draw.rng.choice(sources.prose(draw.split, draw.text))
    cuts = [match.end() for match in re.finditer(r"[.!?]\s+", passage)]
    cuts = [cut for cut in cuts if len(passage[:cut].split()) >= 40 and len(passage[cut:].split()) >= SHORT]
    cut = draw.rng.choice(cuts) if cuts else len(passage) // 2
    answer = _opening(draw, passage[cut:].strip())
    own = _closing(draw, passage[:cut].rstrip(), draw.rng.randint(draw.length // 4, draw.length))
    return Made(_after_others(draw, own, passage), draw.pick(CONTINUE), answer)


def lost_opening(draw: ForeignDraw) -> Made:
    """Numbered passages; one, the rest of a docstring or document, lacks its first paragraph, which is the answer."""
    pairs = [
        pair for pair in sources.summaries(draw.split, draw.text) if OPENING[0] <= len(pair[0].split()) <= OPENING[1]
    ]
    answer, document = draw.rng.choice(pairs)
    heading = draw.pick(ITEM)
    own = longest_start(document, draw.length // 2, draw.measure)
    room = draw.room_beside(own, *[heading] * (2 + draw.length // 400))
    count = max(1, room // 600 + draw.rng.randrange(2))
    sentences = draw.prose(room)
    edges = [len(sentences) * i // count for i in range(count + 1)]
    items = [" ".join(part.strip() for part in sentences[a:b]) for a, b in pairwise(edges)]
    place = draw.rng.randrange(count + 1)
    items.insert(place, own)
    context = "\n\n".join(f"{heading.format(number=i)}\n{item}" for i, item in enumerate(items, 1))
    return Made(context, draw.pick(LOST_OPENING).format(number=place + 1), answer)


def code(draw: ForeignDraw) -> Made:
    """A source file cut after a line, after other files; its next lines are the answer."""
    files = draw.rng.sample(sources.code(draw.split, draw.code), len(sources.code(draw.split, draw.code)))
    (name, text), *others = files
    lines, heading = text.split("\n"), draw.pick(FILE)
    cut = draw.rng.randrange(30, len(lines) - 20)
    answer: list[str] = []
    for line in lines[cut:]:
        if draw.measure("\n".join([*answer, line])) > LONG - 40:
            break
        answer.append(line)
    own = _last_lines(draw, lines[:cut], draw.room_beside(heading, name))
    whole = [f"{heading.format(name=name)}{own}"]
    for other, content in others:
        room = draw.length - draw.measure("\n\n".join(whole)) - draw.measure(heading.format(name=other)) - 4
        if room < 60:
            break
        whole.insert(0, f"{heading.format(name=other)}{_first_lines(draw, content.split(chr(10)), room)}")
    return Made("\n\n".join(whole), draw.pick(CODE).format(name=name), "\n".join(answer).strip("\n"))


def _after_others(draw: ForeignDraw, own: str, passage: str) -> str:
    room = draw.length - draw.measure(own) - 2
    return own if room < 40 else f"{draw.text_of(room, without=passage)}\n\n{own}"


def _opening(draw: ForeignDraw, text: str) -> str:
    """The first sentences of a text, of `SHORT` to `LONG` words or tokens where its sentences allow it."""
    ends = [match.start() + 1 for match in re.finditer(r"[.!?]\s+", text)]
    fitting = [end for end in ends[:40] if SHORT <= draw.measure(text[:end]) <= LONG]
    return text[: fitting[0]] if fitting else longest_start(text, LONG, draw.measure)


def _closing(draw: ForeignDraw, text: str, room: int) -> str:
    """The last paragraphs of a text, at most `room`, or words where the last paragraph is longer."""
    parts = re.split(r"\n\s*\n", text)
    while len(parts) > 1 and draw.measure("\n\n".join(parts)) > room:
        parts = parts[1:]
    return longest_end("\n\n".join(parts), room, draw.measure)


def _last_lines(draw: ForeignDraw, lines: list[str], room: int) -> str:
    first = len(lines)
    while first and (room := room - draw.measure(f"{lines[first - 1]}\n")) >= 0:
        first -= 1
    return "\n".join(lines[first:])


def _first_lines(draw: ForeignDraw, lines: list[str], room: int) -> str:
    last = 0
    while last < len(lines) and (room := room - draw.measure(f"{lines[last]}\n")) >= 0:
        last += 1
    return "\n".join(lines[:last])
