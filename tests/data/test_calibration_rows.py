"""Rows that heads are judged on: batches, two sets without a common row, pieces of a user's texts."""

import pytest

from elastic.data.calibration_rows import JUDGED, TEXTS, RowSet, batches_of, of_folder, text_samples
from elastic.data.packing import IGNORE, Sample
from elastic.data.shards import verify
from elastic.model.loading import load_tokenizer
from tests.helpers.training import build_data


def sample(tokens, source="a"):
    return Sample(list(range(tokens)), tokens - 2, 0, source)


def test_batches_hold_at_most_so_many_tokens():
    rows = batches_of([sample(30), sample(50), sample(20), sample(90), sample(10)], 60)
    sizes = [[len(row["input_ids"]) for row in batch] for batch in rows.batches]
    assert sizes == [[90], [90], [20]], "the longest sample sets the size"
    assert rows.places == [(0, 1), (1, 4), (4, 5)] and len(rows.sources) == 5
    assert [len(batch) for batch in batches_of([sample(30)] * 4, 65).batches] == [1, 1]
    with pytest.raises(ValueError, match="no samples to judge heads by"):
        batches_of([], 60)


def test_the_summary_identifies_the_rows():
    one, two = batches_of([sample(30), sample(20, "b")], 60), batches_of([sample(30), sample(21, "b")], 60)
    assert one.summary() == batches_of([sample(30), sample(20, "b")], 60).summary() != two.summary()
    found = one.summary()
    assert (found["samples"], found["tokens"], found["sources"]) == (2, 50, {"a": 1, "b": 1})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def content(rows: RowSet):
    return [tuple(row["input_ids"]) for batch in rows.batches for row in batch]


def test_rows_of_a_folder(data):
    manifest = verify(data)
    first, second = of_folder(data, manifest, "train", (12, 6), 256, 0)
    assert 12 <= len(first.sources) < 20 and 6 <= len(second.sources) < 12
    assert set(first.sources) == {"single_qa/tiny", "in_context/tiny"}, "one source with two tasks is told apart"
    assert all(sum(len(row["input_ids"]) for row in batch) <= 256 for batch in first.batches)
    again, _ = of_folder(data, manifest, "train", (12, 6), 256, 0)
    assert again.summary() == first.summary()
    other, _ = of_folder(data, manifest, "train", (12, 6), 256, 1)
    assert other.summary() != first.summary()


def test_the_second_set_has_no_row_of_the_first(data):
    manifest = verify(data)
    first, second = of_folder(data, manifest, "validation", (4, 4), 256, 0)
    assert not set(content(first)) & set(content(second))
    del manifest["splits"]["validation"]
    first, second = of_folder(data, manifest, "train", (12, 6), 256, 0)
    assert not set(content(first)) & set(content(second))
    with pytest.raises(ValueError, match=r"has no split 'validation', only train, test"):
        of_folder(data, manifest, "validation", (4, 4), 256, 0)
    with pytest.raises(ValueError, match="none is left to measure what it costs; ask for fewer --samples"):
        of_folder(data, manifest, "test", (1000, 4), 256, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


def test_pieces_of_texts(tmp_path, tokenizer):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.md").write_text(" ".join(f"f{i % 16}" for i in range(1000)))
    (tmp_path / "two.txt").write_text("\ufeff" + " ".join(f"p{i % 16}" for i in range(700)))
    (tmp_path / "three.txt").write_text("f1 f2")
    (tmp_path / "code.py").write_text("f1 " * 4000)
    pieces = text_samples(tmp_path, tokenizer, (256, 300), 5, 0)
    assert [len(piece.input_ids) for piece in pieces] == [256, 300, 256, 300, 256]
    assert {piece.source for piece in pieces} == {TEXTS}
    (row,) = batches_of(pieces[:1], 1).batches[0]
    assert (
        row["labels"][:-JUDGED] == [IGNORE] * (256 - JUDGED) and row["labels"][-JUDGED:] == row["input_ids"][-JUDGED:]
    )
    assert len({tuple(piece.input_ids[:60]) for piece in pieces}) > 1
    assert [p.input_ids for p in text_samples(tmp_path, tokenizer, (256, 300), 5, 0)] == [p.input_ids for p in pieces]
    with pytest.raises(ValueError, match=r"has 5 pieces of 256, 300 tokens, but 9 are needed; ask for fewer"):
        text_samples(tmp_path, tokenizer, (256, 300), 9, 0)
    with pytest.raises(ValueError, match="pieces of 200 tokens leave too little before the 128 judged ones"):
        text_samples(tmp_path, tokenizer, (200,), 1, 0)


def test_folders_without_texts_are_refused(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        text_samples(tmp_path / "absent", tokenizer, (256,), 1, 0)
    with pytest.raises(FileNotFoundError, match=r"holds no .txt or .md file"):
        text_samples(tmp_path, tokenizer, (256,), 1, 0)
    (tmp_path / "a.txt").write_bytes(b"f1 \xff")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 \(byte 3\); convert it or take it out"):
        text_samples(tmp_path, tokenizer, (256,), 1, 0)
