"""The tiny language and the backbone shipped for it: sizes, splits, and what the model can do, measured here."""

import json

import pytest
import torch

from data_prep import make_tiny
from data_prep.tiny_language import (
    KEYS,
    MARGIN,
    TASKS,
    VOCABULARY,
    build_records,
    build_tokenizer,
)
from elastic.data.packing import tokenise
from elastic.data.prompts import encode_prompt
from elastic.data.tasks import ROBUST, SENSITIVE
from elastic.model.loading import architecture, load_backbone, load_tokenizer

FOLDER = make_tiny.ASSET
SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)
    return load_backbone("tiny")


def content(records):
    return {(r.prompt, r.answer) for r in records}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_records_are_deterministic_for_a_seed(task, split):
    assert build_records(task, split, 5, 60, 3) == build_records(task, split, 5, 60, 3)
    assert build_records(task, split, 5, 60, 3) != build_records(task, split, 5, 60, 4)
    assert build_records(task, split, 5, 60, 3) == build_records(task, split, 9, 60, 3)[:5]


@pytest.mark.parametrize("task", TASKS)
def test_splits_are_disjoint_whatever_the_seeds(task):
    train = content(build_records(task, "train", 400, 48, 0)) | content(build_records(task, "train", 400, 48, 1))
    validation = content(build_records(task, "validation", 100, 48, 0))
    test = content(build_records(task, "test", 100, 48, 1))
    assert not train & test and not train & validation and not validation & test


@pytest.mark.parametrize("task", TASKS)
def test_records_keep_to_their_length_and_vocabulary(task):
    for record in build_records(task, "train", 40, 100, 0):
        assert record.task == task and 50 <= len(record.context.split()) <= 100
        assert set(f"{record.prompt} {record.answer}".split()) <= set(VOCABULARY)


def test_needles_lie_outside_any_window_of_32_tokens_and_answer_the_question():
    for record in build_records("single_qa", "test", 60, 200, 0):
        words, key = record.context.split(), record.question.split()[-1]
        place = words.index(key)
        assert record.answer.split() == words[place + 1 : place + 5]
        assert sum(word in KEYS for word in words) == 1
        assert len(words) - (place + 5) >= MARGIN


@pytest.mark.parametrize("task", sorted(set(TASKS) & set(ROBUST)))
def test_local_answers_go_on_with_the_text(task):
    for record in build_records(task, "test", 30, 60, 0):
        words, answer = record.context.split(), record.answer.split()
        text = words[: len(words) - (task == "in_context")] + answer
        period = next(p for p in range(1, 11) if text[p:] == text[:-p])
        assert len(answer) == 8 and record.question.split()[-1] == words[-1] and period <= 10


def test_the_tasks_cover_both_classes():
    assert set(SENSITIVE) & set(TASKS) and len(set(ROBUST) & set(TASKS)) == 2


@pytest.mark.parametrize(
    ("task", "split", "words", "message"),
    [
        ("poetry", "train", 100, "no task 'poetry'; it has single_qa"),
        ("single_qa", "dev", 100, "no split 'dev'; it has train, validation, test"),
        ("single_qa", "train", 47, "47 words are too short for the tiny language; use 48 or more"),
    ],
)
def test_bad_requests_are_refused(task, split, words, message):
    with pytest.raises(ValueError, match=message):
        build_records(task, split, 1, words, 0)


def test_the_asset_is_small_and_whole():
    names = {path.name for path in FOLDER.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "training.json",
    } == names
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1.1e6


def test_the_tokenizer_round_trips_and_is_the_language_s(shipped):
    tokenizer = load_tokenizer("tiny")
    text = " ".join(VOCABULARY[4:])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab() == {word: i for i, word in enumerate(VOCABULARY)}
    assert architecture(shipped[0])["vocab_size"] == len(VOCABULARY) == len(tokenizer)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")


def test_the_chat_template_frames_turns_as_in_training(shipped):
    tokenizer = shipped[1]
    turns = [
        {"role": "user", "content": "f1 f2"},
        {"role": "assistant", "content": "3 4"},
        {"role": "user", "content": "find k1"},
    ]
    assert tokenizer.decode(encode_prompt(turns, tokenizer).ids).split() == (
        ["<user>", "f1", "f2", "<assistant>", "3", "4", "<eos>", "<user>", "find", "k1", "<assistant>"]
    )
    sample = tokenise(build_records("single_qa", "test", 1, 60, 0)[0], tokenizer)
    words = tokenizer.convert_ids_to_tokens(sample.input_ids)
    assert words[0] == "<user>" and words[sample.prompt_length - 1] == "<assistant>" and words[-1] == "<eos>"


def test_needles_are_found_with_full_attention_and_lost_in_a_window(shipped):
    assert make_tiny.accuracy(*shipped, "single_qa", 240, None, count=32) >= 0.85
    assert make_tiny.accuracy(*shipped, "single_qa", 240, make_tiny.WINDOW, count=32) <= 0.2


@pytest.mark.parametrize("task", sorted(set(TASKS) & set(ROBUST)))
def test_local_tasks_need_no_more_than_a_window(shipped, task):
    full = make_tiny.accuracy(*shipped, task, 240, None, count=32)
    assert full >= 0.85
    assert make_tiny.accuracy(*shipped, task, 240, make_tiny.WINDOW, count=32) >= full - 0.1


def test_the_model_generates_what_the_needle_says(shipped):
    model, tokenizer = shipped
    record = next(r for r in build_records("single_qa", "test", 4, 200, 1))
    ids = torch.tensor([encode_prompt([{"role": "user", "content": record.prompt}], tokenizer).ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]).split() == [*record.answer.split(), "<eos>"]


def test_the_training_record_agrees_with_the_shipped_weights(shipped):
    training = json.loads((FOLDER / "training.json").read_text())
    assert (training["sink"], training["window"]) == (make_tiny.SINK, make_tiny.WINDOW)
    for name, window in (("full", None), ("streaming", make_tiny.WINDOW)):
        measured = make_tiny.accuracy(*shipped, "single_qa", 112, window)
        assert abs(measured - training["accuracy"][name]["single_qa/112"]) <= 2 / 64  # rounding on another machine


def test_the_training_script_writes_a_loadable_backbone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_tiny, "CURRICULUM", ((1.0, 48, 8),))
    monkeypatch.setattr(make_tiny, "LENGTHS", (48,))
    assert make_tiny.main(["--out", str(tmp_path / "tiny"), "--steps", "2", "--seed", "5"]) == 0
    training = json.loads((tmp_path / "tiny" / "training.json").read_text())
    assert (training["steps"], training["seed"]) == (2, 5) and training["accuracy"] == json.loads(
        capsys.readouterr().out
    )
    model, _ = load_backbone(str(tmp_path / "tiny"))
    assert architecture(model) == architecture(load_backbone("tiny")[0])
