"""Published data sets in their own format: records with task and prompt, repeats and lengths filtered, damage named."""

import json

import pytest

from data_prep import formats, published
from elastic.data import file_rows
from elastic.data.records import read_records

CHATQA2 = {
    "paragraph_id": "n7",
    "sub-paragraphs": "<|begin_of_text|>Miss Delmer keeps the lamp of Hill Light.\n\nIt burns oil.",
    "question": "Who keeps the lamp?",
    "answer": ["Miss Delmer", "Delmer"],
    "word count": 11,
}
ROWS = {
    "chatqa2": CHATQA2,
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
    "colt": {
        "namespace": "shop.cart.total",
        "function_name": "total",
        "code_file_path": "shop/cart.py",
        "prefix": "from shop.item import price\n\ndef total(items):\n    ",
        "middle": "return sum(price(i) for i in items)",
        "suffix": "\n\nVAT = 0.2\n",
        "cross_file_dependency": [
            {"code_file_path": "shop/item.py", "abstraction": "def price(item): ..."},
            {"code_file_path": "shop/none.py", "abstraction": " "},
        ],
        "similar_functions": [{"code_file_path": "shop/stock.py", "code_block": "return sum(weight(i) for i in xs)"}],
    },
    "govreport": {"report": "A long report on roads.", "summary": "Roads are old."},
    "xsum": {"document": "A bridge was closed today.", "summary": "A bridge is closed.", "id": "17"},
}
TASKS = {
    "chatqa2": "single_qa",
    "musique": "multihop_qa",
    "colt": "code",
    "govreport": "summarization",
    "xsum": "summarization",
}
ANSWERS = {"chatqa2": "Miss Delmer", "musique": "Riga", "colt": "return sum(price(i) for i in items)"}
EMPTY = {"chatqa2": {"answer": [" "]}, "musique": {"answerable": False, "question": "?"}, "colt": {"middle": ""}}


def write(file, found):
    if file.suffix == ".json":
        file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    elif file.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(found).to_parquet(str(file))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return file


def run(name, file, out, *more, shortest="1"):
    return published.main(
        [name, "--path", str(file), "--out", str(out), "--backbone", "tiny", "--shortest", shortest, *more]
    )


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", ROWS)
def test_local_files_become_records(name, ending, tmp_path, capsys):
    row = ROWS[name]
    file = write(tmp_path / f"raw{ending}", [row, row, {**row, **EMPTY.get(name, {"summary": ""})}])
    out = tmp_path / "out" / f"{name}.jsonl"
    assert run(name, file, out) == 0
    record = next(read_records(out))
    assert record.task == TASKS[name] and record.source_name == name
    assert record.answer == ANSWERS.get(name, row.get("summary"))
    told = capsys.readouterr().out
    assert "1 records" in told and "1 repeated" in told and ("not answerable" in told or "'answer' is empty" in told)
    assert "first:" in told and str(file) in told


def test_prompts_of_chatqa2():
    record = formats.chatqa2(CHATQA2)
    assert record.prompt.startswith("Miss Delmer keeps") and record.prompt.endswith("\n\nWho keeps the lamp?")
    whole = {
        **CHATQA2,
        "sub-paragraphs": "",
        "question": "User: Read this.\n\nArticle:\nUser: a word.\n\nSummarize the article.\n\nAssistant:",
        "answer": "A word.",
    }
    record = formats.chatqa2(whole)
    assert record.prompt == "Read this.\n\nArticle:\nUser: a word.\n\nSummarize the article."
    assert (record.task, record.answer, record.source) == ("summarization", "A word.", "chatqa2/n7")
    assert formats.chatqa2({**CHATQA2, "sub-paragraphs": ["One.", "Two."]}).context == "One.\n\nTwo."


def test_prompts_of_colt():
    record = formats.colt(ROWS["colt"])
    places = [record.prompt.index(part) for part in ("def price(item)", "weight(i)", "VAT = 0.2", "def total(items)")]
    assert places == sorted(places) and "shop/none.py" not in record.prompt
    assert "return sum(price" not in record.prompt and record.source == "colt/shop.cart.total"


def test_columns_of_any_file_can_be_named(tmp_path, capsys):
    file = write(tmp_path / "own.parquet", [{"text": "Ann has a cat.", "ask": "Who?", "reply": "Ann"}])
    more = ("--fields", "context=text,question=ask,answer=reply", "--task", "single_qa")
    assert run("mine", file, tmp_path / "a.jsonl", *more) == 0
    record = next(read_records(tmp_path / "a.jsonl"))
    assert (record.prompt, record.answer, record.source) == ("Ann has a cat.\n\nWho?", "Ann", "mine")
    assert run("xsum", write(tmp_path / "x.jsonl", [ROWS["xsum"]]), tmp_path / "b.jsonl", "--task", "in_context") == 0
    assert next(read_records(tmp_path / "b.jsonl")).task == "in_context"
    for fields, message in (
        ("context=text,answer=gone", "1 without 'gone' (first:"),
        ("context", "--fields context is not understood; expected context=COLUMN"),
        ("context=text", "--fields names context; expected context=COLUMN"),
        ("context=text,answer=reply,note=ask", "--fields names context, answer, note; expected"),
    ):
        with pytest.raises(SystemExit):
            run("mine", file, tmp_path / "c.jsonl", "--fields", fields, "--task", "code")
        assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ValueError, match="needs --task; expected"):
        published.converter("mine", "context=text,answer=reply", None)


def test_lengths_are_filtered_and_folders_are_read(tmp_path):
    write(tmp_path / "a.parquet", [{"report": "word " * n, "summary": f"s{n}"} for n in (5, 50)])
    write(tmp_path / "b.json", [{"report": "word " * n, "summary": f"s{n}"} for n in (60, 500)])
    left = published.Left()
    found = published.convert(
        formats.govreport,
        published.rows_of("govreport", tmp_path, "train", left),
        lambda t: len(t.split()),
        20,
        100,
        left,
    )
    assert [record.answer for record in found] == ["s50", "s60"] and left.reasons == {"too short or too long": 2}
    with pytest.raises(ValueError, match="lengths from 5 to 2"):
        list(published.convert(formats.xsum, iter([]), len, 5, 2, left))


@pytest.mark.parametrize("piece", [1, 5, 64, 1 << 20])
def test_arrays_are_read_in_pieces(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(file_rows, "PIECE", piece)
    wanted = [{"n": i, "text": '"], [{' * (i % 40), "list": [1, {"deep": "é"}]} for i in range(60)]
    for text in (json.dumps(wanted), "\ufeff \n" + json.dumps(wanted, indent=2, ensure_ascii=False) + "\n"):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        found = list(file_rows.read_rows(tmp_path / "a.json", file_rows.ReadReport(), every=2, first=1))
        assert [row for _, row in found] == wanted[1::2] and found[0][0].endswith("a.json: item 2")
    (tmp_path / "a.json").write_text("[ ]")
    assert list(file_rows.read_rows(tmp_path / "a.json", file_rows.ReadReport())) == []
    (tmp_path / "a.json").write_text('{"n": 1}\n{"n": 2}\n')
    assert [row for _, row in file_rows.read_rows(tmp_path / "a.json", file_rows.ReadReport())] == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_arrays_one_after_the_other_are_all_read(piece, tmp_path, monkeypatch):
    monkeypatch.setattr(file_rows, "PIECE", piece)
    (tmp_path / "a.json").write_text('[{"n": 1}, {"n": 2}]\n[]\n\n[{"n": 3}][{"n": 4}] \n')
    found = list(file_rows.read_rows(tmp_path / "a.json", file_rows.ReadReport()))
    assert [row["n"] for _, row in found] == [1, 2, 3, 4] and found[-1][0].endswith("a.json: item 4")


@pytest.mark.parametrize(
    "text",
    [
        *('[{"a": 1} {"a": 2}]', '[{"a": 1}, {"a": ', '[{"a": 1}', '[{"a": 1}, x]', '[{"a": 1}, "' + "x" * 99 + '"]'),
        *('[{"a": 1}] {"a": 2}', '[{"a": 1}]\n]', '[{"a": 1}]\n['),  # after the end of the array
    ],
)
def test_damaged_arrays_are_named_with_the_place(text, tmp_path, monkeypatch):
    monkeypatch.setattr(file_rows, "LONGEST", 50)
    monkeypatch.setattr(file_rows, "PIECE", 16)
    (tmp_path / "a.json").write_text(text)
    found = []
    with pytest.raises(ValueError, match=r"a.json is a damaged JSON array after item 1 .*fetch it again"):
        found += file_rows.read_rows(tmp_path / "a.json", file_rows.ReadReport())


def test_bad_lines_are_skipped_and_named(tmp_path, capsys):
    good = json.dumps(ROWS["xsum"]).encode()
    latin = '{"document": "café", "summary": "s", "id": "2"}'.encode("latin-1")
    lines = [good, latin, b'{"document": ', b"[" * 50_000, b"7", b'{"document": 3, "summary": "s", "id": "3"}', b"{}"]
    (tmp_path / "raw.jsonl").write_bytes(b"\n".join(lines))
    assert run("xsum", tmp_path / "raw.jsonl", tmp_path / "o.jsonl") == 0
    told = capsys.readouterr().out
    assert "1 records" in told and "3 unreadable" in told
    for part in ("raw.jsonl:2: not UTF-8 (byte 17)", "raw.jsonl:3: not JSON", "raw.jsonl:4: nested too deeply"):
        assert part in told
    assert "1 field 'context' is a int, expected text" in told and "1 without 'document' (first: " in told
    assert "subscriptable" in told  # the number in line 5 is not a row


def test_what_cannot_be_read_is_named_and_leaves_what_was_there(tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    out.write_text("earlier")
    write(tmp_path / "whole.parquet", [ROWS["govreport"]] * 50)
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-300])
    (tmp_path / "latin.jsonl").write_bytes('{"report": "café", "summary": "s"}\n'.encode("latin-1"))
    (tmp_path / "latin.json").write_bytes('[{"report": "café", "summary": "s"}]\n'.encode("latin-1"))
    (tmp_path / "rows.csv").write_text("report,summary\n")
    for file, message in (
        ("cut.parquet", "cut.parquet cannot be read as parquet"),
        ("latin.jsonl", "no record came out of"),
        ("latin.jsonl", "latin.jsonl:1: not UTF-8 (byte 15); convert"),
        ("latin.json", "latin.json is not UTF-8 after item 0"),
        ("rows.csv", "has the ending '.csv'; expected .jsonl, .json, .parquet"),
        ("absent", "nothing to read at"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run("govreport", tmp_path / file, out)
        assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())
        assert out.read_text() == "earlier" and not list(tmp_path.glob(".o.jsonl*"))
    with pytest.raises(SystemExit):
        run("govreport", tmp_path / "whole.parquet", out, shortest="8192")
    assert "--shortest 8192" in (told := capsys.readouterr().err) and "50 too short or too long" in told
    with pytest.raises(ValueError, match="'poems' is unknown; expected one of chatqa2, musique"):
        published.converter("poems", None, None)


def test_the_hub_is_asked_for_every_part_and_what_it_lacks_is_named(monkeypatch):
    import datasets

    asked = []

    def hub(repository, part, split, streaming):
        asked.append((repository, part, split, streaming))
        if part == "NarrativeQA_131072":
            raise OSError("no route")
        return iter([CHATQA2])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    found = []
    with pytest.raises(ConnectionError, match=r"NarrativeQA_131072 cannot be had from the hub \(OSError: no route\)"):
        for where, _ in published.rows_of("chatqa2", None, "train", published.Left()):
            found.append(where)
    assert found == ["nvidia/ChatQA2-Long-SFT-data long_sft: row 1"]
    assert asked[0] == ("nvidia/ChatQA2-Long-SFT-data", "long_sft", "train", True)
    with pytest.raises(ValueError, match=r"no place on the hub; fetch CoLT-132K.zip at .* with --path"):
        next(published.rows_of("colt", None, "train", published.Left()))


def test_what_a_folder_holds_beside_readable_files_is_named(tmp_path, capsys):
    """Names in capitals are known; other endings, compressed files and folders are told, hidden files are not."""
    raw = tmp_path / "raw"
    (raw / "more").mkdir(parents=True)
    write(raw / "a.jsonl", [ROWS["xsum"]]).rename(raw / "A.JSONL")
    for name in ("b.jsonl.gz", "notes", "more/c.jsonl", ".hidden"):
        (raw / name).write_text("x")
    assert run("xsum", raw, tmp_path / "o.jsonl") == 0
    told = capsys.readouterr().out
    assert "1 records" in told and "3 unreadable" in told
    for name in ("b.jsonl.gz", "notes", "more"):
        assert f"{raw / name}: not read, expected files ending in .jsonl, .json, .parquet" in told
    assert ".hidden" not in told
    (raw / "A.JSONL").unlink()
    with pytest.raises(SystemExit):
        run("xsum", raw, tmp_path / "o.jsonl")
    assert f"nothing to read at {raw}" in capsys.readouterr().err


def test_null_in_an_optional_column_is_none(tmp_path):
    """As parquet has it where other rows have a value."""
    own = published.converter("mine", "context=text,question=ask,answer=reply", "code")
    assert own({"text": "a", "ask": None, "reply": "b"}).prompt == "a"
    assert formats.musique({**ROWS["musique"], "answerable": None}).answer
    row = ROWS["colt"]
    lacking = [{**found, "abstraction": None} for found in row["cross_file_dependency"]]
    record = formats.colt({**row, "suffix": None, "cross_file_dependency": lacking})
    assert "End of file" not in record.prompt and "weight(i)" in record.prompt
