"""Generators whose answer hides in a long text: needles, tracked variables, chains of facts. After the task families of
RULER (arXiv 2404.06654), with wording of our own.
"""

from collections.abc import Sequence
from itertools import pairwise

from . import questions, wording
from .draw import Draw, Parts


def single(draw: Draw) -> Parts:
    """One value of one key."""
    kind, key = _kind(draw), _keys(draw, 1)[0]
    value = _value(draw, kind)
    fact = _fact(draw, kind, key, value)
    question = draw.pick(questions.NEEDLE_QUESTIONS).format(kind=kind, key=key)
    return Parts(_hidden(draw, [fact], question), question, value, _before(fact, value))


def multi_key(draw: Draw) -> Parts:
    """One value is asked for among those of many keys; now and then the whole text consists of such facts."""
    kind = _kind(draw)
    everything = draw.length >= 100 and draw.rng.random() < 0.1
    keys = _keys(draw, 2 + min(2, draw.length // 60))
    facts = {key: (value := _value(draw, kind), _fact(draw, kind, key, value)) for key in keys}
    value, fact = facts[keys[0]]
    question = draw.pick(questions.NEEDLE_QUESTIONS).format(kind=kind, key=keys[0])
    if not everything:
        hidden = _hidden(draw, [fact for _, fact in facts.values()], question)
        return Parts(hidden, question, value, _before(fact, value))
    others = iter(range(1, 10**9))  # numbered keys, so that a text of any length has no key twice

    def another() -> str:
        name = f"{_keys(draw, 1)[0]} {next(others)}"
        return _fact(draw, kind, name, _value(draw, kind))

    lines = draw.repeated(another, draw.room_beside(fact, question))
    return Parts("\n".join(draw.hide(lines, [fact])), question, value, _before(fact, value))


def multi_value(draw: Draw) -> Parts:
    """Several values of one key, all asked for in the order of the text. The answer begins with all but the last: which
    of several a model names first says little about what it found.
    """
    kind, (key, other) = _kind(draw), _keys(draw, 2)
    values = _values(draw, kind, draw.rng.randint(2, 2 + min(1, draw.length // 100)))
    facts = [_fact(draw, kind, key, value) for value in values]
    question = draw.pick(questions.MANY_VALUES).format(kind=kind, key=key)
    prefix = draw.pick(wording.MANY_VALUES_ANSWERS).format(kind=kind, key=key, given=", ".join(values[:-1]))
    decoy = _fact(draw, kind, other, _value(draw, kind, values))
    place = draw.rng.randrange(len(facts) + 1)
    facts = [*facts[:place], decoy, *facts[place:]]
    return Parts(_hidden(draw, facts, question, ordered=True), question, values[-1], prefix)


def multi_query(draw: Draw) -> Parts:
    """The values of several keys out of more. The answer begins with all but the last."""
    kind = _kind(draw)
    keys = _keys(draw, 4 + min(4, draw.length // 100))
    values = dict(zip(keys, _values(draw, kind, len(keys)), strict=True))
    asked = keys[: draw.rng.randint(2, 3 + min(1, draw.length // 200))]
    question = draw.pick(questions.MANY_KEYS).format(kind=kind, keys=", ".join(asked))
    facts = {key: _fact(draw, kind, key, value) for key, value in values.items()}
    prefix = _before(" ".join(facts[key] for key in asked), values[asked[-1]])
    return Parts(_hidden(draw, list(facts.values()), question), question, values[asked[-1]], prefix)


def variable_tracking(draw: Draw) -> Parts:
    """All variables that a value was passed on to, from one to the next; other chains lie between. The answer is the
    chain, written as the text writes its links.
    """
    hops = draw.rng.randint(2, 3 + min(2, draw.length // 200))
    chains = draw.rng.randint(2, 2 + min(3, draw.length // 250))
    names = _variables(draw, chains * (hops + 1))
    lines: list[tuple[int, int, str]] = []
    values = [str(number) for number in draw.rng.sample(range(10_000, 99_999), chains)]
    link = draw.pick(wording.LINKS)
    example = [str(draw.rng.randint(1000, 9999)), *_variables(draw, 3)]
    for chain in range(chains):
        own = [values[chain], *names[chain * (hops + 1) : (chain + 1) * (hops + 1)]]
        steps = [f"{a}{link}{b}." for a, b in pairwise(own)]
        places = sorted(draw.rng.sample(range(10**6), len(steps)))
        lines += [(place, chain, step) for place, step in zip(places, steps, strict=True)]
    facts = [step for _, _, step in sorted(lines)]
    question = draw.pick(questions.TRACK).format(value=values[0], chain=link.join(example))
    prefix = f"{values[0]}{link}".rstrip()
    return Parts(_hidden(draw, facts, question, ordered=True), question, link.join(names[: hops + 1]), prefix)


def fact_chain(draw: Draw) -> Parts:
    """Two to four facts that only together answer the question, among as many about others. The answer begins with all
    of them but the place that was asked for: a small model does not combine them by itself.
    """
    hops = draw.rng.randint(1, 1 + min(2, draw.length // 150))
    chains = 2 + min(2, draw.length // 200)
    relations = draw.rng.sample(draw.half(wording.RELATIONS), hops)
    statement, asked = draw.rng.choice(draw.half(wording.ENDS))
    people = draw.rng.sample(draw.half(wording.NAMES), chains * (hops + 1))
    places = draw.rng.sample(draw.half(wording.PLACES), chains)

    def told(chain: int) -> list[str]:
        own = people[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        steps = zip(relations, own, own[1:], strict=False)
        facts = [relation.format(first=first, second=second) for (relation, _), first, second in steps]
        return [*facts, statement.format(name=own[-1], place=places[chain])]

    who = people[0]
    for _, phrase in relations:
        who = phrase.format(name=who)
    question = asked.format(who=who)
    facts = [fact for chain in range(chains) for fact in told(chain)]
    return Parts(_hidden(draw, facts, question), question, places[0], _before(" ".join(told(0)), places[0]))


def _hidden(draw: Draw, facts: list[str], question: str, ordered: bool = False) -> str:
    """The facts between sentences of prose, or now and then in a text that repeats itself. Sentences come again only
    after all of the split's: no answer lies in them, and contexts longer than the text are wanted.
    """
    room = draw.room_beside(*facts, question)
    if draw.rng.random() < 0.25:
        noise = draw.pick(wording.NOISE)
        lines = draw.repeated(lambda: noise, room)
    else:
        lines = draw.sentences(room, again=True)
    return " ".join(draw.hide(lines, facts, ordered))


def _fact(draw: Draw, kind: str, key: str, value: str) -> str:
    return draw.pick(wording.NEEDLES).format(kind=kind, key=key, value=value)


def _before(text: str, word: str) -> str:
    """The text before the last occurrence of a word."""
    return text[: text.rindex(word)].rstrip()


def _kind(draw: Draw) -> str:
    return draw.rng.choices(("number", "code", "word"), (6, 2, 1))[0]


def _value(draw: Draw, kind: str, taken: Sequence[str] = ()) -> str:
    """A number of seven digits, a code of eight hexadecimal ones, or two joined words; none of those taken."""
    if kind == "number":
        value = str(draw.rng.randint(1_000_000, 9_999_999))
    elif kind == "code":
        value = f"{draw.rng.getrandbits(32):08x}"
    else:
        value = f"{draw.pick(wording.THINGS)}-{draw.pick(wording.THINGS)}"
    return _value(draw, kind, taken) if value in taken else value


def _values(draw: Draw, kind: str, count: int) -> list[str]:
    """Different values: two keys with the same one would have two right places."""
    values: list[str] = []
    while len(values) < count:
        values.append(_value(draw, kind, values))
    return values


def _keys(draw: Draw, count: int) -> list[str]:
    """Different keys: cities, or things with an adjective."""
    cities = draw.half(wording.CITIES)
    if count <= len(cities) // 2 and draw.rng.random() < 0.4:
        return draw.rng.sample(cities, count)
    pairs = [f"the {a} {t}" for a in draw.half(wording.ADJECTIVES) for t in draw.half(wording.THINGS)]
    return draw.rng.sample(pairs, count)


def _variables(draw: Draw, count: int) -> list[str]:
    """Different names of five capital letters; the split's half decides the first one."""
    first = draw.half(("ABCDEFGHIJKLM", "NOPQRSTUVWXYZ"))
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join([draw.rng.choice(first), *draw.rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=4)])] = None
    return list(names)
