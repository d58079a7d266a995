"""The overlap rule: by hand, against brute force, in generators, and for records from files."""

import random
from dataclasses import replace

import pytest

from data_prep import build_mixture, generators, pack_mixture
from data_prep.draw import Parts, token_count, word_count
from data_prep.generators import GENERATORS, generate
from data_prep.mixture_config import Mixture, Source
from data_prep.overlap import GRAM, SHARE, WINDOW, overlap, overlap_fault
from data_prep.tiny_language import build_tokenizer
from elastic.data.records import Record, write_records
from elastic.data.tasks import ROBUST, SENSITIVE, TASKS

ANSWER = " ".join(f"a{i}" for i in range(20))  # 13 runs of eight words


def filler(count, seed=0):
    """Words that no answer has."""
    return " ".join(f"w{number}" for number in random.Random(seed).choices(range(1000), k=count))


@pytest.mark.parametrize(
    ("context", "share"),
    [
        (filler(60), 0),
        (f"{filler(50)} {ANSWER}", 0),  # in the window
        (f"{ANSWER} {filler(50)}", 1),
        (f"{ANSWER} {filler(20)}", 1),  # the window begins after it
        (f"{ANSWER} {filler(19)}", 12 / 13),  # its last word is in the window
        (f"{filler(30)} {ANSWER[:20]} x {filler(20)}", 0),  # seven words
        (f"{filler(30)} {ANSWER[:23]} x {filler(20)}", 1 / 13),  # eight words
        (f"{filler(30)} {ANSWER.replace(' a3 ', ' A3 ')} {filler(20)}", 9 / 13),  # capitals count
        (f"{filler(30)}\n{ANSWER.replace(' ', '  ')}\n\n{filler(20)}", 1),  # white space does not
        (ANSWER, 0),
    ],
)
def test_the_share_by_hand(context, share):
    assert overlap(context, ANSWER, 20, word_count) == pytest.approx(share)


def brute(context, answer, window):
    """The definition, by text and positions."""
    words, answered = context.split(), answer.split()
    before = " " + " ".join(words[: max(0, len(words) - window)]) + " "
    runs = [" " + " ".join(answered[i : i + 8]) + " " for i in range(len(answered) - 7)]
    return sum(run in before for run in runs) / len(runs)


@pytest.mark.parametrize("window", [0, 1, 30, 400])
def test_the_share_is_that_of_the_definition(window):
    rng, shares = random.Random(window), set()
    for _ in range(50):
        words = [f"w{rng.randrange(40)}" for _ in range(rng.randint(1, 120))]
        start = rng.randrange(len(words))
        answer = [*words[start : start + rng.randint(1, 30)], *filler(rng.randint(7, 30)).split()]
        context, answer = " ".join(words), " ".join(rng.sample(answer, len(answer)) if rng.random() < 0.2 else answer)
        shares.add(found := overlap(context, answer, window, word_count))
        assert found == brute(context, answer, window)
    assert len(shares) > 3 or window == 400


def test_the_window_is_counted_in_the_unit_of_the_measure():
    """One token for each character: a window of 20 holds three words of five letters and their spaces."""
    context = f"{ANSWER} {' '.join(['wwwww'] * 3)}"
    assert overlap(context, ANSWER, 17, len) == 1 and overlap(context, ANSWER, 21, len) == 12 / 13
    tokenizer = token_count(build_tokenizer())
    assert overlap(context, ANSWER, 3, tokenizer) == 1 and overlap(context, ANSWER, 4, tokenizer) == 12 / 13


@pytest.mark.parametrize("task", TASKS)
def test_only_robust_tasks_and_answers_of_eight_words_are_refused(task):
    far = f"{ANSWER} {filler(600)}"
    fault = overlap_fault(Record(task, far, "?", ANSWER), WINDOW, word_count)
    assert (fault is None) == (task in SENSITIVE)
    assert task in SENSITIVE or fault == (
        "100% of the answer's runs of 8 words appear in the context before the window of 512; "
        f"answers of {task} may share 2% with it"
    )
    short = " ".join(ANSWER.split()[: GRAM - 1])
    assert overlap(far, short, WINDOW, word_count) is None
    assert overlap_fault(Record(task, far, "?", short), WINDOW, word_count) is None
    assert overlap_fault(Record(task, far, "?", ANSWER), 600 + 20, word_count) is None


def test_two_percent_may_be_shared():
    long = " ".join(f"a{i}" for i in range(107))  # 100 runs
    for words, refused in ((9, False), (10, True)):  # two and three of them
        context = f"{' '.join(long.split()[:words])} {filler(20)}"
        assert overlap(context, long, 20, word_count) == (words - 7) / 100 and SHARE == 0.02
        assert bool(overlap_fault(Record("code", context, "?", long), 20, word_count)) == refused


@pytest.mark.parametrize("name", [name for name, (task, _) in GENERATORS.items() if task in ROBUST])
@pytest.mark.parametrize("split", ["train", "test"])
def test_generated_robust_answers_do_not_appear_before_the_window(name, split):
    """With a small window, so that the rule has much to refuse; drawn again, the records are still deterministic."""
    records = list(generate(name, split, 40, 800, 0, window=64))
    for record in records:
        assert (overlap(record.context, record.answer, 64, word_count) or 0) <= SHARE
        assert len(record.answer.split()) < GRAM or brute(record.context, record.answer, 64) <= SHARE
    assert [record.source for record in records] == [f"{name}/{split}/{i}" for i in range(40)]
    assert records == list(generate(name, split, 40, 800, 0, window=64))


def test_a_generator_draws_again_until_the_rule_accepts(monkeypatch):
    """Every third draw is good; lengths stay those of the first draw, so that long records do not become rarer."""
    drawn = []

    def make(draw):
        drawn.append(draw.length)
        return Parts(f"{ANSWER if len(drawn) % 3 else 'x'} {filler(draw.length)}", "?", ANSWER)

    monkeypatch.setitem(generators.GENERATORS, "often", ("code", make))
    records = list(generate("often", "train", 4, 100, 0, window=50))
    assert [word_count(record.context) for record in records] == [length + 1 for length in drawn[::3]]
    assert drawn[::3] == drawn[1::3] == drawn[2::3] and len(drawn) == 12
    monkeypatch.setitem(generators.GENERATORS, "never", ("code", lambda _: Parts(f"{ANSWER} x", "?", ANSWER)))
    with pytest.raises(ValueError, match=r"200 draws of never/test/0 in a row repeat text, at last: 100%"):
        list(generate("never", "test", 1, 100, 0, window=0))


@pytest.fixture
def own(tmp_path):
    """A mixture of ten records from a file: every other one repeats its answer in the first half of its context."""
    records = [
        Record("code", f"{ANSWER if i % 2 else filler(20, i)} {filler(100, i)}", "Go on.", ANSWER, f"own/{i}")
        for i in range(10)
    ]
    write_records(tmp_path / "own.jsonl", records)
    sources = {"own": Source(1.0, str(tmp_path / "own.jsonl"))}
    return Mixture("tiny", 512, {"train": 2000}, sources, (64, 400), part_tokens=2000, window=100)


def test_records_from_files_are_counted_named_and_skipped(own, tmp_path):
    entry = pack_mixture.pack_mixture(own, tmp_path / "data", 1)["splits"]["train"]["part-00000"]
    refused = [line for line in entry["skipped"] if "runs of 8 words" in line]
    assert entry["samples"] == len(refused) == 5
    for i, line in zip(range(1, 10, 2), refused, strict=True):
        assert line.startswith(
            f"{tmp_path / 'own.jsonl'}: good record {i + 1} of the part (own/{i}): 100% of the answer"
        )
    wide = replace(own, window=120)
    whole = pack_mixture.pack_mixture(wide, tmp_path / "wide", 1)
    assert whole["splits"]["train"]["part-00000"]["samples"] == 10 and whole["mixture"]["window"] == 120


def test_a_file_whose_records_are_all_refused_says_so(own, tmp_path):
    bad = Record("summarization", f"{ANSWER} {filler(200)}", "?", ANSWER, "bad/1")
    write_records(tmp_path / "own.jsonl", [bad, bad])
    with pytest.raises(ValueError, match=r"own.jsonl holds no usable record; 0 records read, 2 skipped\n.*100% of the"):
        pack_mixture.pack_mixture(own, tmp_path / "data", 1)


def test_the_window_is_a_setting(own, tmp_path):
    with pytest.raises(ValueError, match="window=-1 is negative; expected a length in tokens, 0 for none"):
        replace(own, window=-1)
    with pytest.raises(ValueError, match="window=-1 is negative"):
        build_mixture.build_mixture(tmp_path / "out", 2, 100, window=-1)
    with pytest.raises(ValueError, match="a window and folders belong to language 'text', not 'tiny'"):
        build_mixture.build_mixture(tmp_path / "out", 2, 100, language="tiny", window=100)
    build_mixture.build_mixture(tmp_path / "out", 1, 100, held_out=1, chosen=["many_shot"], window=7)
    assert '"window": 7' in (tmp_path / "out" / "mixture.json").read_text()
