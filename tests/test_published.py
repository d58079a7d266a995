"""Published data sets in their own format: records with task and prompt, repeats and lengths filtered, damage named."""

import json

import pytest

from data_prep import published
from elastic.records import read_records

ROWS = {
    "musique": {
        "id": "2hop__1",
        "paragraphs": [
            {"idx": 0, "title": "Mill", "paragraph_text": "The mill was built by Ann.", "is_supporting": True},
            {"idx": 1, "title": "Ann", "paragraph_text": "Ann was born in Riga.", "is_supporting": True},
        ],
        "question": "Where was the builder of the mill born?",
        "question_decomposition": [],
        "answer": "Riga",
        "answer_aliases": [],
        "answerable": True,
    },
    "govreport": {"report": "A long report on roads.", "summary": "Roads are old."},
    "xsum": {"document": "A bridge was closed today.", "summary": "A bridge is closed.", "id": "17"},
}
TASKS = {"musique": "multihop_qa", "govreport": "summarization", "xsum": "summarization"}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ROWS)
def test_local_files_become_records(name, tmp_path, capsys):
    row = ROWS[name]
    other = {**row, "answerable": False, "question": "?"} if name == "musique" else {**row, "summary": ""}
    file = write(tmp_path / "raw.jsonl", [row, row, other])
    out = tmp_path / "out" / f"{name}.jsonl"
    arguments = [name, "--path", str(file), "--out", str(out), "--backbone", "tiny", "--shortest", "1"]
    assert published.main(arguments) == 0
    record = next(read_records(out))
    assert record.task == TASKS[name] and record.source_name == name and record.answer in ("Riga", row.get("summary"))
    told = capsys.readouterr().out
    assert "1 records" in told and "1 repeated" in told and ("not answerable" in told or "'answer' is empty" in told)


def test_lengths_are_filtered_and_parquet_folders_are_read(tmp_path):
    from datasets import Dataset

    rows = [{"report": "word " * n, "summary": f"s{n}"} for n in (5, 50, 500)]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "part.parquet"))
    left = published.Left()
    found = published.convert(
        "govreport", published.rows_of("govreport", tmp_path, "train"), lambda t: len(t.split()), 20, 100, left
    )
    assert [record.answer for record in found] == ["s50"] and left.reasons == {"length": 2}


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "latin.jsonl").write_bytes('{"report": "café", "summary": "s"}\n'.encode("latin-1"))
    for file in ("cut.parquet", "latin.jsonl"):
        with pytest.raises(SystemExit) as stopped:
            published.main(["govreport", "--path", str(tmp_path / file), "--out", str(tmp_path / "o.jsonl")])
        assert stopped.value.code == 2 and f"{file} cannot be read" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("*o.jsonl*"))
    for name, message in (("colt", "'colt' is not converted yet"), ("poems", "'poems' is unknown")):
        with pytest.raises(ValueError, match=message):
            list(published.convert(name, iter([]), len, 0, 1, published.Left()))
    with pytest.raises(FileNotFoundError, match="nothing to read at"):
        list(published.rows_of("xsum", tmp_path / "absent", "train"))
