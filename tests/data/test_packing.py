"""Records, tokenisation, packing, collation: nothing lost, nothing repeated, labels exactly on answers."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tiny_language import build_tokenizer
from elastic.data.file_rows import ReadReport
from elastic.data.packing import IGNORE, Sample, collate, pack, tokenise
from elastic.data.records import Record, read_records, write_records
from elastic.data.tasks import ROBUST, SENSITIVE, TASKS, task_index

GOOD = {"task": "code", "context": "some context", "question": "next?", "answer": "yes", "source": "here"}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
samples = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, len(TASKS) - 1)), min_size=1, max_size=40
)


def build(shapes):
    """Samples whose tokens are unique over the whole list."""
    made, next_token = [], 0
    for prompt, answer, task in shapes:
        made.append(Sample(list(range(next_token, next_token + prompt + answer)), prompt, task))
        next_token += prompt + answer
    return made


def unpack(row):
    """The samples of a row, read back by its boundaries."""
    bounds = row["cu_seq_lens"]
    for n, (begin, end) in enumerate(pairwise(bounds)):
        (start, stop), labels = row["prompt_spans"][n], row["labels"][begin:end]
        assert start == begin and begin < stop < end
        assert labels == [IGNORE] * (stop - start) + row["input_ids"][stop:end]
        yield Sample(row["input_ids"][begin:end], stop - start, row["task_id"][n])


@given(samples, st.integers(1, 50))
def test_packing_keeps_every_sample_once_and_whole(shapes, buffer):
    given_samples = build(shapes)
    rows = list(pack(given_samples, 32, buffer))
    found = [sample for row in rows for sample in unpack(row)]
    assert Counter(map(repr, found)) == Counter(map(repr, given_samples))
    for row in rows:
        assert row["cu_seq_lens"][0] == 0 and row["cu_seq_lens"][-1] == len(row["input_ids"]) <= 32
        assert len(row["task_id"]) == len(row["prompt_spans"]) == len(row["cu_seq_lens"]) - 1
    assert rows == list(pack(given_samples, 32, buffer))
    if buffer >= len(shapes):  # at most one row of a buffer can be half empty
        assert sum(2 * len(row["input_ids"]) <= 32 for row in rows) <= 1


@given(samples, st.integers(1, 4))
def test_collate_joins_rows_without_mixing_samples(shapes, count):
    rows = list(pack(build(shapes), 32))[:count]
    batch = collate(rows)
    assert batch["input_ids"].tolist() == [[token for row in rows for token in row["input_ids"]]]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape
    assert batch["cu_seq_lens"].dtype == torch.int32 and batch["prompt_spans"].dtype == torch.int64
    bounds = batch["cu_seq_lens"].tolist()
    assert bounds[0] == 0 and bounds[-1] == batch["input_ids"].shape[1]
    for n, (begin, end) in enumerate(pairwise(bounds)):
        assert batch["position_ids"][0, begin:end].tolist() == list(range(end - begin))
        start, stop = batch["prompt_spans"][n].tolist()
        assert start == begin
        assert (batch["labels"][0, start:stop] == IGNORE).all()
        assert torch.equal(batch["labels"][0, stop:end], batch["input_ids"][0, stop:end])
    assert batch["task_id"].tolist() == [task for row in rows for task in row["task_id"]]


def test_tokenise_labels_the_answer_and_the_end_of_sequence():
    tokenizer = build_tokenizer()
    sample = tokenise(Record("single_qa", "f0 key k1 1 2", "find k1", "1 2"), tokenizer)
    prompt, answer = sample.input_ids[: sample.prompt_length], sample.input_ids[sample.prompt_length :]
    assert tokenizer.decode(prompt) == "<user> f0 key k1 1 2 find k1 <assistant>"
    assert tokenizer.decode(answer) == "1 2 <eos>"
    assert sample.task_id == task_index("single_qa")


def test_a_given_beginning_of_the_answer_is_neither_prompt_nor_label():
    tokenizer = build_tokenizer()
    record = Record("single_qa", "f0 key k1 1 2", "find k1", "1 2", answer_prefix="key k1")
    sample, bare = tokenise(record, tokenizer), tokenise(replace(record, answer_prefix=""), tokenizer)
    assert sample.input_ids[: sample.prompt_length] == bare.input_ids[: bare.prompt_length]  # all that routers see
    parts = sample.input_ids[sample.prompt_length : sample.answer_start], sample.input_ids[sample.answer_start :]
    assert [tokenizer.decode(part) for part in parts] == ["key k1", "1 2"]  # the sentence may continue: no end
    batch = collate(list(pack([sample], 64)))
    assert batch["prompt_spans"].tolist() == [[0, sample.prompt_length]]
    assert batch["labels"][0].tolist() == [-100] * sample.answer_start + parts[1]


def test_the_answer_is_set_off_from_its_beginning_once():
    class Letters:
        chat_template, eos_token_id, is_fast = "", 0, True

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"]

        def __call__(self, text, **_):
            return {
                "input_ids": [ord(letter) for letter in text],
                "offset_mapping": [(i, i + 1) for i in range(len(text))],
            }

    def spelled(prefix):
        sample = tokenise(Record("code", "c", "", "a", answer_prefix=prefix), Letters())
        return "".join(map(chr, sample.input_ids[1:]))

    assert [spelled(prefix) for prefix in ("", "x:", "x:\n")] == ["a\0", "x: a", "x:\na"]


def test_every_task_is_sensitive_or_robust():
    assert sorted((*SENSITIVE, *ROBUST)) == sorted(TASKS) and [task_index(t) for t in TASKS] == list(range(len(TASKS)))


@settings(deadline=None)
@given(st.lists(st.builds(Record, st.sampled_from(TASKS), TEXT.filter(str.strip), TEXT, TEXT.filter(str.strip), TEXT)))
def test_records_survive_the_disk(tmp_path_factory, records):
    file = tmp_path_factory.getbasetemp() / "records.jsonl"
    write_records(file, [Record(**GOOD), *records])
    assert list(read_records(file))[1:] == records


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=6))
def test_no_line_stops_the_reader(tmp_path_factory, junk):
    file = tmp_path_factory.getbasetemp() / "junk.jsonl"
    lines = [line.replace(b"\n", b" ") for line in junk]
    file.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *lines, json.dumps(GOOD).encode()]))
    report = ReadReport()
    assert len(list(read_records(file, report))) == report.good == 2
    assert len(report.bad) == sum(bool(line.strip()) for line in lines)


def test_parquet_is_read_like_jsonl(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "records.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD, {**GOOD, "task": "poetry"}, GOOD]), file)
    report = ReadReport()
    assert list(read_records(file, report)) == [Record(**GOOD)] * 2
    assert len(report.bad) == 1 and f"{file}: row 2: unknown task 'poetry'" in report.bad[0]


@pytest.mark.parametrize("name", ["source", "answer_prefix", "system", "turns"])
def test_null_in_an_optional_field_is_its_default(name, tmp_path):
    import pyarrow
    import pyarrow.parquet

    values = [["a", "b"]] if name == "turns" else "x"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**GOOD, name: values}, GOOD]), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({**GOOD, name: value}) for value in (values, None)))
    without = {key: value for key, value in GOOD.items() if key != name}
    for file in ("a.parquet", "a.jsonl"):
        report = ReadReport()
        found = list(read_records(tmp_path / file, report))
        assert report.bad == [] and found[0] != found[1]
        assert file == "a.parquet" or found[1] == Record(**without)


def encoded(**changes):
    return json.dumps({**GOOD, **changes}).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (encoded()[:-9], "not JSON"),
        (b"\xff\xfe" + encoded(), "not UTF-8 (byte 0); convert the file to UTF-8"),
        (encoded(context="caf\u00e9").replace(b"\\u00e9", b"\xe9"), "not UTF-8"),
        (b"[1, 2]", "a record is a list, expected an object"),
        (b"3", "a record is a int, expected an object"),
        (encoded(task="poetry"), "unknown task 'poetry'; known tasks are single_qa, multihop_qa"),
        (encoded(context=" \n"), "field 'context' is empty; a record needs a context and an answer"),
        (encoded(answer=""), "field 'answer' is empty"),
        (encoded(answer=None), "field 'answer' is a NoneType, expected text"),
        (encoded(question=["a"]), "field 'question' is a list, expected text"),
        (encoded(context="half \ud83d"), "field 'context' has half a surrogate pair at character 5"),
        (
            encoded(label="x"),
            "unknown ['label']; expected ['task', 'context', 'question', 'answer', 'source', 'answer_prefix', "
            "'system', 'turns']",
        ),
        (json.dumps({"task": "code", "context": "x"}).encode(), "missing ['question', 'answer']"),
        (b"[" * 100_000, "nested too deeply for a record"),
    ],
)
def test_bad_records_are_named_and_skipped(tmp_path, line, reason):
    file, report = tmp_path / "records.jsonl", ReadReport()
    file.write_bytes(b"\n".join([encoded(), line, b"", encoded()]) + b"\n")
    assert list(read_records(file, report)) == [Record(**GOOD)] * 2
    assert report.good == 2 and len(report.bad) == 1
    assert report.bad[0].startswith(f"{file}:2: ") and reason in report.bad[0]
    assert "2 records read, 1 skipped" in str(report)


def test_unusable_record_files_are_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no record file at .*absent.jsonl; .elastic data_prep build_mixture. writes"
    ):
        list(read_records(tmp_path / "absent.jsonl"))
    for name, content, message in (
        ("a.csv", b"x", r"has the ending '.csv'; expected .jsonl, .json, .parquet"),
        ("a.parquet", b"PAR1 no", r"cannot be read as parquet .*; write or fetch it again"),
        ("empty.jsonl", b"", r"empty.jsonl holds no usable record; 0 records read, 0 skipped"),
        (
            "bad.jsonl",
            b"{\n{\n",
            r"bad.jsonl holds no usable record; 0 records read, 2 skipped\n.*bad.jsonl:1: not JSON",
        ),
        ("wide.jsonl", json.dumps(GOOD).encode("utf-16"), r"holds no usable record; 0 records read, .*not UTF-8"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            list(read_records(tmp_path / name))


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(
        ValueError, match="a sample has 40 tokens but rows hold 32; raise --seq-length or build shorter"
    ):
        list(pack([Sample(list(range(40)), 3, 0)], 32))
    for prompt in (0, 3):
        with pytest.raises(ValueError, match=f"a sample of 3 tokens has a prompt of {prompt} and 0 given"):
            Sample([1, 2, 3], prompt, 0)
    with pytest.raises(ValueError, match="a prompt of 1 and 2 given ones after it; it needs at least one prompt token"):
        Sample([1, 2, 3], 1, 0, prefix_length=2)
    with pytest.raises(ValueError, match="no rows to collate"):
        collate([])
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="lacks a chat template or an end-of-sequence token; use an instruction-tuned"):
        tokenise(Record(**GOOD), tokenizer)
