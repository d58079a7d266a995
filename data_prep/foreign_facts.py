"""Foreign kinds that ask for a fact in a text: pass keys, needles, JSON objects, several needles."""

import json
import uuid

from .foreign_draw import ForeignDraw, Made, joined
from .foreign_names import WORDS
from .foreign_wording import FILLER, JSON_LEADS, JSON_QUESTIONS, NEEDLE, PASS_KEY, SEVERAL, Several


def pass_key(draw: ForeignDraw) -> Made:
    """A pass key of digits or of several words, at a random depth of a paragraph that comes again and again."""
    phrase, filler = draw.pick(PASS_KEY), draw.pick(FILLER)
    place = draw.values("place", 1)[0]
    words = draw.values("word", draw.rng.randint(3, 6))
    digits = str(draw.rng.randrange(10**4, 10**8))
    value = draw.rng.choice([digits, " ".join(words), f"{words[0]} {digits[:3]} {words[1]}"])
    fact = phrase.fact.format(value=value, place=place)
    lines = draw.repeated(lambda: filler, draw.room_beside(fact))
    return Made("\n".join(draw.hide(lines, [fact])), phrase.question, value, phrase.prefix)


def needle(draw: ForeignDraw) -> Made:
    """A fact between sentences of library prose, beside up to two of the same form about others."""
    facts, question, answer, prefix = draw.told(draw.pick(NEEDLE), draw.rng.randrange(3))
    lines = draw.prose(draw.room_beside(*facts))
    return Made(joined(draw.hide(lines, facts)), question, answer, prefix)


def json_object(draw: ForeignDraw) -> Made:
    """An object of random keys, the value of one asked for: a number, which is written alike in the object and out of
    it.
    """
    lead, question, prefix = draw.pick(JSON_LEADS), draw.pick(JSON_QUESTIONS), draw.rng.choice(("", "{"))
    form, whole = draw.rng.choice(("uuid", "hex", "words")), draw.rng.random() < 0.5
    indent, room = draw.rng.choice((None, 2)), draw.length - draw.measure(lead) - 4
    entries: dict[str, float] = {}
    while True:
        key, value = _identifier(draw, form), draw.rng.randrange(10**5, 10**6) / (1 if whole else 10**3)
        value = int(value) if whole else value
        room -= draw.measure(json.dumps({key: value}, indent=indent)[1:-1].rstrip() + ",")
        if room < 0 and entries:
            break
        if key not in entries:
            entries[key] = value
    asked = draw.rng.choice(list(entries))
    context, key = lead + json.dumps(entries, indent=indent), json.dumps(asked)
    return Made(context, question.format(key=key), str(entries[asked]), f"{prefix}{key}:")


def several_needles(draw: ForeignDraw) -> Made:
    """Facts of one form about several people: all asked for in their order, or one, or what follows from one."""
    wording = draw.pick(SEVERAL)
    if wording.follow:
        return _two_steps(draw, wording)
    everything = "{who}" not in wording.question
    count = draw.rng.randint(2, 3) if everything else draw.rng.randint(3, 6)
    people, values = draw.people(count), draw.values(wording.sort, count)
    facts = [wording.fact.format(who=who, value=value) for who, value in zip(people, values, strict=True)]
    lines = draw.hide(draw.prose(draw.room_beside(*facts)), facts, ordered=True)
    asked = draw.rng.randrange(count)
    answer = ", ".join(values) if everything else values[asked]
    about = {"who": people[asked]}
    return Made(joined(lines), wording.question.format(**about), answer, wording.prefix.format(**about))


def _two_steps(draw: ForeignDraw, wording: Several) -> Made:
    """A person leads to a thing or a place, which leads to the value; one or two other pairs do as well."""
    count = draw.rng.randint(2, 3)
    people, values = draw.people(count), draw.values(wording.sort, count)
    links = draw.values(wording.link, count)
    facts = [wording.fact.format(who=who, link=link) for who, link in zip(people, links, strict=True)]
    facts += [wording.follow.format(link=link, value=value) for link, value in zip(links, values, strict=True)]
    lines = draw.hide(draw.prose(draw.room_beside(*facts)), facts)
    about = {"who": people[0]}
    return Made(joined(lines), wording.question.format(**about), values[0], wording.prefix.format(**about))


def _identifier(draw: ForeignDraw, form: str) -> str:
    if form == "uuid":
        return str(uuid.UUID(int=draw.rng.getrandbits(128), version=4))
    if form == "hex":
        return f"{draw.rng.getrandbits(32):08x}"
    return "_".join([*draw.several(WORDS, 2), str(draw.rng.randrange(10, 100))])
