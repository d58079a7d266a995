"""Foreign kinds whose text has a shape of its own: plays, a last paragraph, chats of several turns."""

from itertools import pairwise

from .foreign_draw import ForeignDraw, Made, joined
from .foreign_names import FIRST
from .foreign_play_wording import BODIES, DIRECTIONS, EVENTS, OPENINGS, PLAY
from .foreign_scenes_wording import CHAT, CLOSINGS, FAREWELLS, LAST_PARAGRAPH, REPLIES, REQUESTS

CLOSING = 800  # characters of the last paragraph, about 200 tokens: with the question it is within a window of 512


def play(draw: ForeignDraw) -> Made:
    """Speakers with lines. Who owns what or lives where is told in a line; who says it is a person with one line."""
    phrase = draw.pick(PLAY)
    others = draw.rng.randrange(3)
    events = draw.several(EVENTS, 1 + others)
    facts, question, answer, prefix = draw.told(phrase, others, event=events[0])
    if "{event}" in phrase.fact:  # others announce something else
        facts = [fact.replace(events[0], event) for fact, event in zip(facts, events, strict=True)]
    used = {name for fact in facts for name in fact.replace(":", "").split()}
    cast = [name for name in draw.several(FIRST, 8) if name not in used][:4]

    def line() -> str:
        opening, body = draw.pick(OPENINGS), draw.pick(BODIES)
        return f"{draw.rng.choice(cast)}: {opening} {body[0].upper() + body[1:] if opening[-1] in '.!' else body}"

    if not phrase.fact.startswith("{value}:"):
        facts = [f"{draw.rng.choice(cast)}: {fact}" for fact in facts]
    lines = draw.repeated(
        lambda: draw.pick(DIRECTIONS) if draw.rng.random() < 0.1 else line(), draw.room_beside(*facts)
    )
    return Made("\n".join(draw.hide(lines, facts)), question, answer, prefix)


def last_paragraph(draw: ForeignDraw) -> Made:
    """A fact in the last paragraph; facts of the same form about others may be anywhere before it."""
    facts, question, answer, prefix = draw.told(draw.pick(LAST_PARAGRAPH), draw.rng.randrange(3))
    opening = draw.pick(CLOSINGS)
    sentences = draw.prose(draw.room_beside(*facts, opening))
    closing: list[str] = []
    left = CLOSING - len(facts[0]) - len(opening)
    while len(sentences) > 1 and len(sentences[-1]) <= left:
        closing.insert(0, sentences.pop().strip())
        left -= len(closing[0]) + 1
    body = joined(draw.hide(sentences, facts[1:]))
    end = " ".join([opening, *draw.hide(closing, facts[:1])])
    return Made(f"{body}\n\n{end}", question, answer, prefix)


def chat(draw: ForeignDraw) -> Made:
    """The fact in the user's first message, the question in the last, and long readings between them."""
    (fact,), question, answer, prefix = draw.told(draw.pick(CHAT), 0)
    farewell, reply = draw.pick(FAREWELLS), draw.pick(REPLIES)
    count = draw.rng.randint(1, 3) if draw.length < 1500 else draw.rng.randint(3, 5)
    requests = draw.several(REQUESTS, count)
    sentences = draw.prose(draw.room_beside(fact, farewell, reply, *requests))
    edges = [len(sentences) * i // count for i in range(count + 1)]
    readings = [joined(sentences[a:b]) for a, b in pairwise(edges)]
    return Made(farewell, question, answer, prefix, ((fact, reply), *zip(requests, readings, strict=True)))
