"""The generators: answers that the context holds, sizes as asked, held-out data that shares nothing with training."""

import random
import re

import pytest

from data_prep import questions, sources, wording
from data_prep.draw import Draw, cut_words, token_count
from data_prep.generators import BASIC, GENERATORS, generate, generate_task
from data_prep.tiny_language import build_tokenizer
from elastic.data.shards import SPLITS
from elastic.data.tasks import TASKS

SAME_ON_PURPOSE = ("KINDS",)
VALUE = r"\b(?:\d{7}|[0-9a-f]{8}|[a-z]+-[a-z]+)\b"
HALVES = {
    name: value
    for name, value in {**vars(wording), **vars(questions)}.items()
    if name.isupper() and isinstance(value, tuple) and name not in SAME_ON_PURPOSE
}


def made(name, split="test", count=12, length=200, seed=0, **more):
    return list(generate(name, split, count, length, seed, **more))


def test_every_task_class_has_generators():
    assert {task for task, _ in GENERATORS.values()} == set(TASKS)
    assert [GENERATORS[name][0] for name in BASIC] == list(TASKS)


@pytest.mark.parametrize("name", HALVES)
def test_wording_of_training_is_not_that_of_evaluation(name):
    train, held_out = HALVES[name]
    one, two = (
        {text for item in half for text in ([item] if isinstance(item, str) else item)} for half in (train, held_out)
    )
    assert one and two and not one & two


def test_words_of_the_classes_are_apart():
    for half in (0, 1):
        words = [word for halves in wording.CLASSES.values() for word in halves[half]]
        assert len(words) == len(set(words))  # a word belongs to one class
    for train, held_out in wording.CLASSES.values():
        assert not set(train) & set(held_out)


def paragraphs(texts):
    return {" ".join(part.split()) for text in texts for part in re.split(r"\n\s*\n", text) if len(part.split()) > 12}


def test_splits_share_no_prose_no_file_and_no_document():
    for split in SPLITS:
        assert sum(len(text.split()) for text in sources.prose(split)) > 4000
        assert len(sources.prose(split)) > 5 and len(sources.summaries(split)) > 50
        for other in set(SPLITS) - {split}:
            assert not paragraphs(sources.prose(split)) & paragraphs(sources.prose(other))
            for kind in (sources.code, sources.summaries):
                assert not set(kind(split)) & set(kind(other))


@pytest.mark.parametrize("name", GENERATORS)
def test_no_record_of_two_splits_or_seeds_is_the_same(name):
    records = {
        (split, seed): {(r.context, r.question) for r in made(name, split, 20, 100, seed)}
        for split in SPLITS
        for seed in (0, 1)
    }
    everything = [record for found in records.values() for record in found]
    assert len(everything) == len(set(everything)) >= 6 * 20 - 3


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("split", SPLITS)
def test_records_are_deterministic_and_of_the_asked_size(name, split):
    records = made(name, split, 6, 240, seed=1)
    assert records == made(name, split, 6, 240, seed=1) and records != made(name, split, 6, 240, seed=2)
    for i, record in enumerate(records):
        assert (record.task, record.source) == (GENERATORS[name][0], f"{name}/{split}/{i}")
        assert record.source_name == name
        if name == "code_completion":
            assert 3 * 120 < len(record.context) <= 5 * 240
        else:
            assert 60 <= len(record.context.split()) <= 250


@pytest.mark.parametrize("name", GENERATORS)
def test_lengths_can_be_counted_in_tokens(name):
    measure = token_count(build_tokenizer())
    for record in made(name, "train", 6, 300, measure=measure):
        assert 50 <= measure(record.context) <= 300


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("length", [64, 900])
def test_needles_stand_in_the_context(split, length):
    for record in made("needle_single", split, length=length) + made("needle_multi_key", split, length=length):
        assert record.answer in record.context and "{" not in record.question
    for name in ("needle_multi_value", "needle_multi_query"):
        for record in made(name, split, length=length):
            values = [*re.findall(VALUE, record.answer_prefix), record.answer]
            assert len(values) > 1 and all(value in record.context for value in values)
            places = [record.context.index(value) for value in values]
            assert name == "needle_multi_query" or places == sorted(places)
    assert len({record.question for record in made("needle_single", split)}) > 3


def test_the_asked_key_is_the_one_beside_the_value():
    for record in made("needle_multi_key", "train", 40, 400):
        asked = set(re.findall(r"\w+", record.question)) & {*wording.CITIES[0], *wording.THINGS[0]}
        telling = [s for s in re.split(r"(?<=\.)\s", record.context) if record.answer in s]
        assert any(asked & set(re.findall(r"\w+", sentence)) for sentence in telling), (record.question, telling)
        assert record.answer_prefix in record.context


@pytest.mark.parametrize("split", ["train", "test"])
def test_tracked_variables_follow_from_the_assignments(split):
    """An interpreter of its own: every link passes on what its left side holds; other chains lie between."""
    first = "A-M" if split == "train" else "N-Z"
    for record in made("variable_tracking", split, 20, 500):
        link = next(link for link in wording.LINKS[split != "train"] if link in record.answer)
        passes = dict(
            re.findall(rf"(\d{{5}}|[{first}][A-Z]{{4}}){re.escape(link)}([{first}][A-Z]{{4}})\.", record.context)
        )
        chain = [re.search(r"\b\d{5}\b", record.question)[0]]
        while chain[-1] in passes:
            chain.append(passes[chain[-1]])
        assert len(chain) > 3 and len(passes) >= 2 * (len(chain) - 1)
        assert f"{record.answer_prefix} {record.answer}" == link.join(chain)


@pytest.mark.parametrize("split", ["train", "test"])
def test_chains_of_facts_lead_to_the_answer(split):
    """Every place is reached from exactly one first person; the asked one reaches the answer."""
    half = int(split != "train")
    for record in made("fact_chain", split, 20, 400):
        next_of, place_of = {}, {}
        for statement, _ in wording.RELATIONS[half]:
            text = re.escape(statement).replace(r"\{first\}", r"(\w+)").replace(r"\{second\}", r"(\w+)")
            next_of |= dict(re.findall(text, record.context))
        for statement, _ in wording.ENDS[half]:
            text = re.escape(statement).replace(r"\{name\}", r"(\w+)").replace(r"\{place\}", r"(\w+)")
            place_of |= dict(re.findall(text, record.context))
        who = next(name for name in wording.NAMES[half] if re.search(rf"\b{name}\b", record.question))
        while who in next_of:
            who = next_of[who]
        assert place_of[who] == record.answer and record.answer not in record.answer_prefix
        stated = re.split(r"(?<=\.) ", record.answer_prefix)
        assert len(stated) > 1 and all(fact in record.context for fact in stated)


@pytest.mark.parametrize("split", SPLITS)
def test_copies_and_passages(split):
    for record in made("verbatim_copy", split, 12, 600):
        assert record.context.count(record.answer) >= 1 and len(record.answer.split()) >= 20
        assert record.answer_prefix.strip() in record.context and record.answer_prefix.endswith("\n")
    for record in made("passage_qa", split, 30, 300):
        assert record.answer in " ".join(re.sub(r"\n\n\(\d+\) ", " ", record.context).split())
        assert record.answer_prefix in record.question
        if "____" in record.question:
            sentence = re.search(r'"(.*)"', record.question)[1].replace("____", record.answer)
            assert sentence in re.sub(r"\n\n\(\d+\) ", " ", record.context)


@pytest.mark.parametrize("split", SPLITS)
def test_documents(split):
    documents = {answer for answer, _ in sources.summaries(split)}
    for record in made("summary", split, 10, 300):
        assert record.answer in documents and record.answer not in record.context
    texts = "\n".join(text for _, text in sources.code(split))
    for record in made("code_completion", split, 8, 300):
        assert f"{record.context[-200:]}\n{record.answer}" in texts
        assert record.answer_prefix == "```\n" + record.context.rpartition("\n")[2] + "\n"
    for record in made("continuation", split, 8, 300):
        assert len(record.answer.split()) == 48 and record.context.endswith(record.answer_prefix)


@pytest.mark.parametrize("split", ["train", "test"])
def test_shots_teach_the_label(split):
    for record in made("many_shot", split, 30, 2000):
        half = int(split != "train")
        word = next(w for halves in wording.CLASSES.values() for w in halves[half] if f" {w}" in record.question)
        assert word in record.answer_prefix
        assert f"{record.answer_prefix} {record.answer}" in shots(record)


def shots(record):
    """The examples of a context; those of one style have two lines."""
    lines = record.context.split("\n")
    return (
        ["\n".join(pair) for pair in zip(lines[::2], lines[1::2], strict=True)]
        if "\n" in record.answer_prefix
        else lines
    )


def test_a_task_takes_its_generators_in_turn():
    records = list(generate_task("multihop_qa", "train", 5, 100, 0))
    assert [r.source for r in records] == [
        f"{n}/train/{i // 2}" for i, n in enumerate(["variable_tracking", "fact_chain"] * 2 + ["variable_tracking"])
    ]
    with pytest.raises(ValueError, match="no generator for task 'poetry'"):
        list(generate_task("poetry", "train", 1, 100, 0))
    with pytest.raises(ValueError, match="no generator sudoku; known are needle_single"):
        made("sudoku")
    with pytest.raises(ValueError, match="contexts of 10 to 20 words are too short"):
        made("summary", length=20)


def test_facts_keep_their_order_where_it_counts():
    draw = Draw(random.Random(0), "train", 100)
    lines = draw.hide(["-"] * 10, ["one", "two", "three"], ordered=True)
    assert len(lines) == 13 and [line for line in lines if line != "-"] == ["one", "two", "three"]
    assert cut_words("a  b\nc d", 1, 3) == "b\nc" and cut_words("a b", 5) == ""
