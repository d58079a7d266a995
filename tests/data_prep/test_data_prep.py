"""The offline mixture: five task classes, records to shards on a word-level tokenizer."""

import json
import re
from collections import Counter

import pytest

from data_prep import build_mixture, generators, inspect_shards, tiny_language, tokenize_and_pack
from data_prep.tiny_language import build_tokenizer
from elastic.data.records import Record, read_records, write_records
from elastic.data.shards import SPLITS, open_corpus, verify
from elastic.data.tasks import TASKS


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    out = tmp_path_factory.mktemp("mixture") / "records"
    build_mixture.build_mixture(out, per_task=6, words=120, seed=0, held_out=3)
    return out


def test_mixture_has_every_task_in_every_split(records):
    recipe = json.loads((records / "mixture.json").read_text())
    assert recipe["records"] == {s: dict.fromkeys(TASKS, 6 if s == "train" else 3) for s in SPLITS}
    assert recipe["generators"] == list(generators.GENERATORS)
    for split in SPLITS:
        for task in TASKS:
            assert len(list(read_records(records / split / f"{task}.jsonl"))) == recipe["records"][split][task]


def test_rebuilding_replaces_a_mixture_and_is_bit_equal(records, tmp_path):
    build_mixture.build_mixture(tmp_path / "again", 6, 120, held_out=3)
    for file in records.rglob("*.json*"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(records)).read_bytes()
    build_mixture.build_mixture(tmp_path / "again", 2, 120, tasks=["code"])
    assert [path.name for path in (tmp_path / "again" / "train").iterdir()] == ["code.jsonl"]
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_generators_can_be_chosen_and_folders_given(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(" ".join(f"Sentence {j} of essay {i} is here." for j in range(60)))
    chosen = ["needle_single", "needle_multi_key"]
    counts = build_mixture.build_mixture(tmp_path / "out", 8, 100, held_out=4, chosen=chosen, text=tmp_path / "text")
    assert counts == {split: {"single_qa": 8 if split == "train" else 4} for split in SPLITS}
    found = [record for split in SPLITS for record in read_records(tmp_path / "out" / split / "single_qa.jsonl")]
    assert {record.source_name for record in found} == set(chosen)
    essays = {split: set() for split in SPLITS}
    for record in found:
        essays[record.source.split("/")[1]] |= set(re.findall(r"essay (\d+)", record.context))
    assert all(essays.values()) and not (essays["train"] & (essays["validation"] | essays["test"]))
    (tmp_path / "text" / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 \(byte 3\); convert it or take it out"):
        build_mixture.build_mixture(tmp_path / "more", 2, 101, chosen=chosen, text=tmp_path / "text" / "..")
    with pytest.raises(FileNotFoundError, match=r"found no prose for the train split in .*empty"):
        (tmp_path / "empty").mkdir()
        build_mixture.build_mixture(tmp_path / "more", 2, 100, chosen=chosen, text=tmp_path / "empty")


def test_from_records_to_shards_and_back_to_text(records, tokenizer, tmp_path):
    manifest, report = tokenize_and_pack.prepare(records, tokenizer, tmp_path / "packed", 512)
    again, _ = tokenize_and_pack.prepare(records, tokenizer, tmp_path / "again", 512)
    assert manifest == again == verify(tmp_path / "packed")
    assert report.good == 5 * (6 + 3 + 3) and not report.bad
    assert manifest["mixture"]["seed"] == 0 and set(manifest["versions"]) == {"transformers", "tokenizers", "datasets"}
    for split in SPLITS:
        assert list(manifest["splits"][split]) == sorted(TASKS)
        for task, entry in manifest["splits"][split].items():
            assert entry["tasks"] == {task: entry["samples"]}
            names = Counter(record.source_name for record in read_records(records / split / f"{task}.jsonl"))
            assert entry["sources"] == names and set(names) <= set(generators.generators_of(task))
            assert len(open_corpus(tmp_path / "packed", split, task)) == entry["rows"]
    shown = "\n".join(inspect_shards.describe(tmp_path / "packed", "test", tokenizer, 1))
    assert all(f"--- {task}: {task}, " in shown for task in TASKS) and "% full" in shown
    with pytest.raises(ValueError, match="has no split 'dev'; it has train, validation, test"):
        list(inspect_shards.describe(tmp_path / "packed", "dev", tokenizer, 1))


def test_records_that_do_not_fit_are_counted_and_named(tokenizer, tmp_path):
    (tmp_path / "records" / "train").mkdir(parents=True)
    file = tmp_path / "records" / "train" / "own.jsonl"
    write_records(file, [Record("code", "f0 " * n, "count", "1", f"r{n}") for n in (3, 300, 5)])
    manifest, report = tokenize_and_pack.prepare(tmp_path / "records", tokenizer, tmp_path / "packed", 64)
    assert manifest["splits"]["train"]["own"]["samples"] == report.good == 2 and manifest["mixture"] is None
    assert report.bad == [f"{file}: good record 2 (r300) has 305 tokens, more than the 64 of a row"]
    with pytest.raises(ValueError, match=r"own.jsonl holds no usable record; 0 records read, 3 skipped"):
        tokenize_and_pack.prepare(tmp_path / "records", tokenizer, tmp_path / "short", 4)
    assert not (tmp_path / "short").exists()


def test_files_that_are_not_packed_are_counted_and_named(tokenizer, tmp_path):
    """Another ending, none, a folder, another split; JSON arrays and names in capitals are read."""
    records = tmp_path / "records"
    made = [Record("code", f"f{n} f1", "count", "1", f"r{n}") for n in range(4)]
    for split in ("train", "valid", "validation"):
        (records / split).mkdir(parents=True)
    write_records(records / "train" / "own.JSONL", made)
    rows = [json.loads(line) for line in (records / "train" / "own.JSONL").read_text().splitlines()]
    (records / "train" / "array.json").write_text(json.dumps(rows))
    (records / "train" / "folder").mkdir()
    for name in ("train/zipped.jsonl.gz", "train/bare", "valid/own.jsonl", "own.jsonl", "train/.hidden"):
        (records / name).write_text("x")
    manifest, report = tokenize_and_pack.prepare(records, tokenizer, tmp_path / "packed", 64)
    assert {name: entry["samples"] for name, entry in manifest["splits"]["train"].items()} == {"own": 4, "array": 4}
    assert report.good == 8 and report.bad == [
        f"{records / 'own.jsonl'}: not read, expected the folders train, validation, test",
        f"{records / 'valid'}: not read, expected the folders train, validation, test",
        *(
            f"{records / 'train' / name}: not read, expected files ending in .jsonl, .json, .parquet"
            for name in ("bare", "folder", "zipped.jsonl.gz")
        ),
    ]
    for name in ("own.JSONL", "array.json"):
        (records / "train" / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"(?s)no records in .*\(0 records read, 5 skipped\n.*zipped.jsonl.gz"):
        tokenize_and_pack.prepare(records, tokenizer, tmp_path / "packed", 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"language": "klingon"}, "unknown language 'klingon'; expected one of text, tiny"),
        ({"tasks": ["code", "poetry"]}, "language 'text' has no task poetry; it has single_qa, multihop_qa"),
        (
            {"language": "tiny", "tasks": ["summarization"]},
            "language 'tiny' has no task summarization; it has single_qa",
        ),
        ({"chosen": ["sudoku"]}, "no generator sudoku; known are needle_single, "),
        ({"chosen": ["many_shot"], "tasks": ["code"]}, "none of the chosen generators makes code; it has code_compl"),
        ({"language": "tiny", "chosen": ["many_shot"]}, "belong to language 'text', not 'tiny'"),
        ({"tasks": []}, r"has no task \(none asked for\)"),
        ({"per_task": 0}, "per_task=0 and held_out=8: a mixture needs at least one record of each task"),
        ({"held_out": 0}, "held_out=0: a mixture needs at least one record"),
        ({"words": 20}, "contexts of 10 to 20 words are too short for the text generators; use 64 or more"),
        ({"words": 20, "language": "tiny"}, "contexts of 20 words are too short for the tiny language; use "),
    ],
)
def test_a_mixture_that_cannot_be_built_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_mixture.build_mixture(**{"out": tmp_path / "records", "per_task": 2, "words": 100, **arguments})
    assert not (tmp_path / "records").exists()


def test_foreign_folders_and_missing_records_are_refused(records, tokenizer, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(
        ValueError, match=r"exists and holds no mixture.json, so it is not a mixture that may be replaced"
    ):
        build_mixture.build_mixture(tmp_path, 2, 100)
    with pytest.raises(
        FileNotFoundError, match=r"no records in .*train,validation,test.*; write them with .elastic data_prep"
    ):
        tokenize_and_pack.prepare(tmp_path / "absent", tokenizer, tmp_path / "packed", 64)
    with pytest.raises(ValueError, match="seq_length=0 is below 1"):
        tokenize_and_pack.prepare(records, tokenizer, tmp_path / "packed", 0)
    build_mixture.build_mixture(tmp_path / "lacking", 2, 100)
    (tmp_path / "lacking" / "test" / "code.jsonl").unlink()
    with pytest.raises(ValueError, match="lacking/test lacks code, which other splits have; add the files"):
        tokenize_and_pack.prepare(tmp_path / "lacking", tokenizer, tmp_path / "packed", 512)


def test_commands_speak_plainly(tmp_path, capsys):
    out = str(tmp_path / "records")
    assert build_mixture.main(["--out", out, "--per-task", "2", "--language", "tiny", "--words", "64"]) == 0
    assert "train: " + ", ".join(f"{task} 2" for task in tiny_language.TASKS) in capsys.readouterr().out
    for module in (build_mixture, tokenize_and_pack, inspect_shards):
        with pytest.raises(SystemExit) as stopped:
            module.main(["--help"])
        assert stopped.value.code == 0 and f"python -m {module.__name__}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        build_mixture.main(["--out", out, "--tasks", "poetry"])
    assert stopped.value.code == 2 and "has no task poetry" in capsys.readouterr().err
