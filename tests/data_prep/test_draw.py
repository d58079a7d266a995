"""Drawing without replacement: no sentence, file or document twice in a record, and too little text is refused. Windows
of a billion words turn the overlap rule off, so that the drawing alone is tested.
"""

import random
import re
from collections import Counter
from itertools import islice

import pytest

from data_prep import build_mixture, sources, wording
from data_prep.draw import Draw, longest_end, longest_start, word_count
from data_prep.generators import generate
from elastic.data.shards import SPLITS

WORDS = [*wording.ADJECTIVES[0]]
HEADS = r"^# (?:file:|path:|====|---) (\S+\.py)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty documents of an opening paragraph and thirty numbered sentences; forty source files of a hundred lines."""
    root, rng = tmp_path_factory.mktemp("own"), random.Random(0)
    for i in range(40):
        told = [" ".join([f"Note {i}.{j}", *rng.sample(WORDS, rng.randint(5, 12))]) + "." for j in range(30)]
        (root / f"{i}.txt").write_text(f"Essay {i} is about {' '.join(rng.sample(WORDS, 6))}.\n\n{' '.join(told)}")
        lines = [f"{' '.join(rng.sample(WORDS, 4))} = {i} + {j}" for j in range(100)]
        (root / f"p{i}").mkdir()
        (root / f"p{i}" / "m.py").write_text("\n".join(lines))
    return root


def capacity(folder, split):
    """Words of all sentences of a split."""
    return sum(word_count(text) for text in sources.prose(split, folder))


@pytest.mark.parametrize("split", SPLITS)
def test_a_record_reads_every_sentence_once_before_it_is_refused(folder, split):
    """All of the split's text can be drawn, in any number of pieces, and not a word more."""
    for pieces in (1, 7):
        whole = capacity(folder, split)
        draw = Draw(random.Random(pieces), split, whole, text=folder)
        taken = [line for _ in range(pieces) for line in draw.sentences(whole // pieces)]
        notes = re.findall(r"Note \d+\.\d+ ", " ".join(taken))
        assert len(taken) == len(set(taken)) and len(notes) == len(set(notes))
        assert 0.75 * whole <= sum(map(word_count, taken)) <= whole
        with pytest.raises(ValueError, match=rf"passages of prose \({whole} words\) for the {split} split, too little"):
            draw.sentences(whole)
    assert draw.used <= {s for text in sources.prose(split, folder) for s in sources.sentences(text)}


def test_a_text_used_up_is_begun_again_where_that_is_wanted(folder):
    whole = capacity(folder, "test")
    taken = Draw(random.Random(0), "test", whole, text=folder).sentences(3 * whole, again=True)
    assert 2.4 * whole <= sum(map(word_count, taken)) <= 3 * whole
    first = taken[: taken.index(next(s for i, s in enumerate(taken) if s in taken[:i]), 0)]
    assert len(first) == len(set(first))
    for name in ("needle_single", "fact_chain"):
        for record in generate(name, "test", 3, 2 * whole, 0, text=folder, shortest=2 * whole):
            assert word_count(record.context) > 1.5 * whole


def test_sentences_longer_than_the_room_are_cut_and_not_taken_again(folder):
    draw = Draw(random.Random(0), "validation", 100, text=folder)
    pieces = [" ".join(draw.sentences(2)) for _ in range(40)]
    assert all(word_count(piece) == 2 for piece in pieces) and len(pieces) == len(set(pieces)) == len(draw.used)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["continuation", "passage_qa", "verbatim_copy", "needle_single"])
def test_no_passage_comes_twice(folder, name, split):
    """Numbered notes, some of which are cut in two by the end of the context."""
    for record in generate(name, split, 20, capacity(folder, split) // 2, 0, text=folder, window=10**9):
        notes = re.findall(r"Note \d+\.\d+ ", record.context)
        assert len(notes) == len(set(notes))
        if name == "continuation":
            assert not set(notes) & set(re.findall(r"Note \d+\.\d+ ", record.answer))


@pytest.mark.parametrize("split", SPLITS)
def test_no_document_and_no_file_comes_twice(folder, split):
    for record in generate("summary", split, 20, 300, 0, text=folder, window=10**9):
        essays = re.findall(r"Essay (\d+) ", f"{record.context}\n{record.answer}")
        assert len(essays) == len(set(essays))
    length = (
        sum(len(text) for _, text in sources.code(split, folder)) // 5
    )  # the generator takes a word for 5 characters
    for record in generate("code_completion", split, 20, length * 4 // 5, 0, code=folder, window=10**9):
        names = re.findall(HEADS, record.context, re.M)
        assert len(names) == len(set(names)) > 0 and record.answer not in record.context


def test_the_library_has_no_file_twice_in_a_context_and_none_in_the_answer():
    seen = []
    for record in generate("code_completion", "test", 12, 6000, 0, window=10**9):
        names = re.findall(HEADS, record.context, re.M)
        assert len(names) == len(set(names))
        seen += names
    assert len(seen) > 12
    for record in generate("summary", "test", 20, 1500, 0, window=10**9):
        assert record.answer not in " ".join(record.context.split())


@pytest.mark.parametrize("split", SPLITS)
def test_no_summary_is_in_its_document(split):
    assert all(answer not in " ".join(document.split()) for answer, document in sources.summaries(split))


def test_a_word_of_the_shots_comes_again_after_all_others():
    for record in generate("many_shot", "test", 20, 1500, 0):
        known = {word for halves in wording.CLASSES.values() for word in halves[1]}
        shown = [word for word in re.findall(r"\w+", record.context) if word in known]
        count = len(set(shown))
        assert len(shown) >= 3 * count
        for start in range(0, len(shown) - count, count):
            assert len(set(shown[start : start + count])) == count
        assert {*re.findall(r"\w+", record.question)} & {*shown[-2 * count :]}


@pytest.mark.parametrize(
    ("name", "what", "option"),
    [
        ("continuation", "passages of prose", "text"),
        ("passage_qa", "passages of prose", "text"),
        ("verbatim_copy", "passages of prose", "text"),
        ("summary", "documents with an opening paragraph", "text"),
        ("code_completion", "other source files", "code"),
    ],
)
def test_too_little_text_is_refused_with_what_is_there(folder, name, what, option):
    with pytest.raises(ValueError) as refused:
        list(generate(name, "test", 20, 100_000, 0, text=folder, code=folder, shortest=90_000))
    message = str(refused.value)
    begins = (
        rf"{folder} has [1-9]\d* {what} \(\d{{3,}} words\) for the test split, too little for a context of 9\d{{4}} "
    )
    assert re.match(begins, message)
    assert "without repetition; name a folder with more" in message
    assert f"(`{option}:` in a mixture, --{option}), or ask for shorter contexts (`context:`, --words)" in message


def test_the_command_says_that_the_text_is_too_little(folder, tmp_path, capsys):
    words = ["--out", str(tmp_path / "out"), "--per-task", "4", "--words", "50000", "--generators", "continuation"]
    with pytest.raises(SystemExit) as stopped:
        build_mixture.main([*words, "--text", str(folder)])
    told = " ".join(capsys.readouterr().err.split())
    assert stopped.value.code == 2 and "too little for a context of" in told and not (tmp_path / "out").exists()


def test_draws_are_a_function_of_the_seed(folder):
    one, two, other = (Draw(random.Random(seed), "train", 500, text=folder) for seed in (3, 3, 4))
    first = [one.sentences(100) for _ in range(3)]
    assert first == [two.sentences(100) for _ in range(3)] != [other.sentences(100) for _ in range(3)]
    decks = [list(islice(draw.rounds(WORDS), 3 * len(WORDS))) for draw in (one, two)]
    assert decks[0] == decks[1] and sorted(decks[0]) == sorted(3 * WORDS)
    pairs = [(word, "some text") for word in WORDS]
    deck = one.deck("odd words", "text", pairs[:4], pairs[4:])
    found = [next(deck)[0] for _ in WORDS]
    assert sorted(found[:4]) == sorted(WORDS[:4]) and sorted(found) == sorted(WORDS)
    with pytest.raises(
        ValueError, match=r"16 odd words \(32 words\) for the train split, too little for a context of 500"
    ):
        next(deck)


def test_every_order_is_as_likely():
    draw, found = Draw(random.Random(0), "train", 100), Counter()
    for _ in range(6000):
        found[tuple(draw.shuffled("abc"))] += 1
    assert len(found) == 6 and all(abs(count - 1000) < 5 * 1000**0.5 for count in found.values())


def test_starts_and_ends_keep_the_white_space():
    assert longest_start("a  b\nc", 2, word_count) == "a  b" and longest_end("a  b\nc", 2, word_count) == "b\nc"
    assert longest_start("a b", 9, word_count) == longest_end("a b", 9, word_count) == "a b"
    assert longest_start("abc d", 1, len) == "abc" and longest_end("a bcd", 1, len) == "bcd"
