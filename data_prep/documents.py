"""Generators that draw on local documents and source files: verbatim copies, questions about passages, summaries,
continuations, code, and many-shot classification.
"""

import re

from . import questions, sources, wording
from .draw import Draw, Parts, cut_words, longest_end, longest_start, tail, word_count


def verbatim_copy(draw: Draw) -> Parts:
    """One of several marked passages, word for word; up to a quarter of the length."""
    style = draw.pick(wording.SECTION_MARKS)
    size = max(12, min(512, draw.length // 4))
    wanted = _passage(draw, draw.rng.randint(size // 2, size))
    marks = iter(draw.rng.sample(range(100, 10_000), 2000))

    def headed(text: str) -> tuple[str, str]:
        mark = f"{draw.rng.choice('KLMNPQRST')}{next(marks)}"
        return mark, f"{style.format(mark=mark)}\n{text}"

    mark, section = headed(wanted)
    question = draw.pick(questions.COPY_QUESTIONS).format(mark=mark)
    room = draw.room_beside(section, question)
    sections: list[str] = []
    while room > size // 2:
        _, other = headed(_passage(draw, min(room - 6, draw.rng.randint(size // 2, size))))
        room -= draw.measure(f"\n\n{other}")
        sections.append(other)
    return Parts("\n\n".join(draw.hide(sections, [section])), question, wanted, f"{style.format(mark=mark)}\n")


def passage_qa(draw: Draw) -> Parts:
    """Numbered passages; the answer is a word that a quotation lacks, or how a sentence continues. It begins with the
    quotation up to there.
    """
    while True:
        wanted = draw.rng.choice(sources.sentences(draw.rng.choice(sources.prose(draw.split, draw.text))))
        words = wanted.split()
        if 9 <= len(words) <= 40 and draw.measure(wanted) <= max(30, draw.length // 3):
            break
    longest = max(range(3, len(words)), key=lambda i: len(re.sub(r"\W", "", words[i])))
    gap = re.match(r"\w+(?:[-'.]\w+)*", words[longest])
    if draw.rng.random() < 0.5 and gap is not None and len(gap[0]) > 4:
        quotation = " ".join([*words[:longest], "____" + words[longest][gap.end() :], *words[longest + 1 :]])
        question, answer = draw.pick(questions.GAPS).format(sentence=quotation), gap[0]
        prefix = " ".join(words[:longest])
    else:
        prefix = " ".join(words[:6])
        question, answer = draw.pick(questions.REST).format(start=prefix), " ".join(words[6:12])
    draw.used.add(wanted)
    others = draw.sentences(draw.room_beside(wanted, question))
    lines = draw.hide([line for line in others if line.split()[:6] != words[:6]], [wanted])
    per_passage = max(3, draw.rng.randint(4, 9))
    passages = [" ".join(lines[i : i + per_passage]) for i in range(0, len(lines), per_passage)]
    return Parts("\n\n".join(f"({i}) {text}" for i, text in enumerate(passages, 1)), question, answer, prefix)


def continuation(draw: Draw) -> Parts:
    """What follows in a document: lives on its subject and style, not on single details. The answer begins with the
    last words of the context.
    """
    size = min(192, max(48, draw.length // 8))  # words, as far as the length allows
    text = " ".join(draw.sentences(draw.length + 2 * size))
    answer = cut_words(text, -size)
    context = cut_words(text, 0, -size)
    last_words = cut_words(context, -8)
    return Parts(longest_end(context, draw.length, draw.measure), draw.pick(questions.CONTINUE), answer, last_words)


def summary(draw: Draw) -> Parts:
    """The opening paragraph of a document, which is taken out of it; shorter documents follow others, which do not hold
    that paragraph either: docstrings of a class include those of its methods.
    """
    pairs = sources.summaries(draw.split, draw.text)
    answer, document = draw.rng.choice(pairs)
    question = draw.pick(questions.SUMMARISE)
    document = longest_start(document, draw.room_beside(question), draw.measure)
    room = draw.room_beside(document, question)
    others = draw.deck("documents with an opening paragraph", "text", pairs)
    before: list[str] = []
    while room > draw.length // 5:
        other = "\n\n".join(next(others))
        if answer in " ".join(other.split()):
            continue
        other = longest_start(other, room, draw.measure)
        room -= draw.measure(f"\n\n{other}")
        before.append(other)
    parts = [*before, document]
    if len(parts) > 1:
        parts = [f"Document {i}\n{text}" for i, text in enumerate(parts, 1)]
    return Parts("\n\n".join(parts), question, answer, draw.pick(wording.SUMMARY_ANSWERS))


def code_completion(draw: Draw) -> Parts:
    """The next lines of a source file, with other files of the tree before it; its own package first. The answer begins
    with the last line of the context.
    """
    files = sources.code(draw.split, draw.code)
    head = draw.pick(wording.FILE_HEADS)
    while True:
        name, text = draw.rng.choice(files)
        lines = text.split("\n")
        count = draw.rng.randint(4, 12)
        cut = draw.rng.randrange(40, len(lines) - count)
        answer = "\n".join(lines[cut : cut + count])
        if len(answer.split()) >= 8:
            break
    before = f"{head.format(name=name)}\n" + "\n".join(lines[:cut])
    room = 5 * draw.length  # characters of code, about as many tokens as prose of that many words has
    package = name.split("/")[0]
    near = [file for file in files if file[0].split("/")[0] == package and file[0] != name]
    far = [file for file in files if file[0].split("/")[0] != package]
    others = draw.deck("other source files", "code", near, far)
    while len(before) < room:
        other, code = next(others)
        before = f"{head.format(name=other)}\n{code}\n\n\n{before}"
    question = draw.pick(questions.COMPLETE)
    context = tail(before, room)
    while draw.measure is not word_count and (found := draw.measure(context)) > draw.length:
        context = tail(context, int(len(context) * 0.99 * draw.length / found))
    return Parts(context, question, answer, f"```\n{lines[cut - 1]}\n")


def many_shot(draw: Draw) -> Parts:
    """Classification of words by many examples; now and then the classes have arbitrary names. The answer ends one
    example more. There are few words, so that they come again, but only after all others: the latest examples hold
    every word.
    """
    classes = draw.rng.sample(list(wording.CLASSES), draw.rng.randint(3, len(wording.CLASSES)))
    labels = dict(zip(classes, classes, strict=True))
    if draw.rng.random() < 0.4:
        labels = dict(zip(classes, draw.rng.sample(draw.half(wording.LABELS), len(classes)), strict=True))
    style = draw.rng.randrange(len(draw.half(questions.SHOTS)))
    words = [(word, labels[name]) for name in classes for word in draw.half(wording.CLASSES[name])]
    rounds = draw.rounds(words)

    def shot() -> str:
        word, label = next(rounds)
        return draw.half(questions.SHOTS)[style].format(word=word, label=label)

    word, label = draw.rng.choice(words)
    question = draw.half(questions.SHOT_QUESTIONS)[style].format(word=word)
    prefix = draw.half(questions.SHOTS)[style].format(word=word, label="").rstrip()
    return Parts("\n".join(draw.repeated(shot, draw.room_beside(question))), question, label, prefix)


def _passage(draw: Draw, room: int) -> str:
    """One run of sentences of prose that fits."""
    return longest_start(" ".join(draw.sentences(max(12, room))), max(12, room), draw.measure)
