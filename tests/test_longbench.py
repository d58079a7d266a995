"""LongBench-E and LongBench-v2: the official files become documents, each correction on its edge cases."""

import json

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("jieba", reason="the extra `eval` is not installed")
pytest.importorskip("fuzzywuzzy", reason="the extra `eval` is not installed")
pytest.importorskip("rouge", reason="the extra `eval` is not installed")
from elastic.evaluation import longbench
from elastic.evaluation import longbench_metrics as metrics
from elastic.rows import ReadReport

SETS = longbench.tasks(longbench.E)
CLASSES = ["Date", "Date of birth", "Other location", "location"]


def record(**more):
    base = {
        "input": "Question: Who?",
        "context": "Ann keeps the lamp.",
        "answers": ["Ann", "Miss Ann"],
        "length": 5,
        "dataset": "qasper",
        "language": "en",
        "all_classes": None,
        "_id": "a1",
    }
    return {**base, **more}


def question(**more):
    base = {
        "_id": "q1",
        "domain": "Single-Document QA",
        "sub_domain": "Literary",
        "difficulty": "easy",
        "length": "short",
        "question": " Who keeps the lamp? ",
        **{f"choice_{c}": f"{name} " for c, name in zip("ABCD", ("Ann", "Bo", "Cy", "Di"), strict=True)},
        "answer": "B",
        "context": "\nBo keeps the lamp.\n",
    }
    return {**base, **more}


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def prompt(task, doc):
    return longbench.harness_task(task, [doc]).doc_to_text(doc)


def read(task, data, count=None):
    report = ReadReport()
    return longbench.documents(task, data, count, report), report


def test_all_thirteen_sets_with_their_limits():
    limits = {name.partition("/")[2]: longbench.new_tokens(name) for name in SETS}
    assert len(limits) == 13 and longbench.tasks(longbench.V2) == ("longbench2",)
    assert limits == {
        **{"qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32, "2wikimqa": 32, "gov_report": 512, "multi_news": 512},
        **{"trec": 64, "triviaqa": 32, "samsum": 128, "passage_count": 32, "passage_retrieval_en": 32},
        **{"lcc": 64, "repobench-p": 64},
    }
    assert longbench.new_tokens("longbench2") == 128
    bare = {name.partition("/")[2] for name in SETS if not longbench.chat_allowed(name)}
    assert bare == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"} and longbench.chat_allowed("longbench2")
    for task in (*SETS, "longbench2"):
        config = longbench.task_config(task)
        assert config["generation_kwargs"]["do_sample"] is False and config["generation_kwargs"]["until"] == []
        assert longbench.corrections(task)
    with pytest.raises(ValueError, match="unknown task 'longbench_e/lsht'; expected longbench_e "):
        longbench.task_config("longbench_e/lsht")


def test_prompts_differ_from_the_harness_where_the_official_ones_do(tmp_path):
    for task in SETS:
        name = task.partition("/")[2]
        write(tmp_path / f"{name}_e.jsonl", [record()])
        doc = read(task, tmp_path)[0][0]
        ours = prompt(task, doc)
        theirs = longbench._harness_file(f"longbench/{name}_e.yaml")["doc_to_text"]
        theirs = theirs.replace("{{context}}", doc["context"]).replace("{{question}}", doc["question"])
        if name in ("triviaqa", "samsum"):
            assert ours == theirs.replace("\nQuestion: Who?", "\n\nQuestion: Who?") != theirs
        else:
            end = {"passage_count": " ", "passage_retrieval_en": " ", "lcc": "\n", "repobench-p": "\n"}.get(name, "")
            assert ours == theirs + end and "Ann keeps the lamp." in ours


def test_prompt_of_version_two(tmp_path):
    write(tmp_path / "data.jsonl", [question()])
    docs, _ = read("longbench2", tmp_path)
    text = prompt("longbench2", docs[0])
    assert "<text>\nBo keeps the lamp.\n</text>" in text
    assert "question: Who keeps the lamp?\nChoices:\n(A) Ann\n" in text
    assert text.endswith('(D) Di\n\nFormat your response as follows: "The correct answer is (insert answer here)".')
    assert docs[0]["splits"] == {"difficulty": "easy", "length": "short"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The correct answer is (C).", "C"),
        ("**The correct answer is (C)**", "C"),
        ("The correct answer is **C**", "C"),
        ("The correct answer is (**C**) and no other", "C"),
        ("The correct answer is B. No: The correct answer is (C)", "C"),  # brackets first
        ("The correct answer is (A) or The correct answer is (B)", "A"),
        ("The correct answer is D", "D"),
        ("The correct answer is (E)", None),
        ("the correct answer is (C)", None),
        ("(C)", None),
        ("", None),
        ("****", None),
    ],
)
def test_the_letter_of_an_answer(answer, letter):
    assert metrics.letter(answer) == letter
    assert metrics.choice({"answer": "C"}, [answer]) == {"score": float(letter == "C")}


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("Date of birth", "Date of birth", 1.0),  # `Date`, part of the right name, does not count
        ("\n\nDate of birth\nQuestion: what?\nType: location", "Date of birth", 1.0),
        ("Other location", "location", 0.5),  # the right name and one that holds it
        ("Date of birth or location", "Date of birth", 0.5),
        ("location", "Date", 0.0),
        ("", "Date", 0.0),
        ("none of them", "Date", 0.0),
    ],
)
def test_classes_named_by_the_first_line(answer, reference, score):
    doc = {"answers": [reference], "all_classes": CLASSES}
    assert metrics.classification(doc, [answer])["score"] == pytest.approx(score)


def test_the_first_line_is_scored_and_the_best_reference_counts():
    doc = {"answers": ["the red house", "Riga"]}
    assert metrics.qa_f1(doc, ["\nRiga\nPassage: the red house"])["score"] == 1
    assert metrics.qa_f1(doc, ["a red house!"])["score"] == 1  # articles and punctuation do not count
    assert metrics.qa_f1(doc, ["red"])["score"] == pytest.approx(2 / 3)
    assert metrics.rouge(doc, ["\n\nthe red house\nRiga"])["score"] == pytest.approx(1)
    assert metrics.rouge({"answers": ["Bo met Cy. They ate."]}, ["Bo met Cy."])["score"] > 0.5
    for score in (metrics.qa_f1, metrics.rouge):
        assert [score(doc, [text])["score"] for text in ("", "\n\n", " ")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("return x", 1.0),
        ("\n\n# so\n```python\nreturn x\nreturn y", 1.0),  # comments and fences are passed over
        ("// no\nreturn x", 1.0),
        ("    \nreturn x", 0.0),  # a line of blanks is a line
        ("", 0.0),
        ("# only this", 0.0),
        ("return y", 0.88),
    ],
)
def test_code_is_compared_by_its_first_line(answer, score):
    found = metrics.code_similarity({"answers": ["zzzz", "return x"]}, [answer])["score"]
    assert found == pytest.approx(score, abs=0.25 if answer.startswith("  ") else 0.01)
    assert (found == 1) == (score == 1)


def test_uncorrected_sets_are_scored_by_the_harness(tmp_path):
    for name, answers, cases in (
        ("qasper", ["yes", "it is unanswerable"], {"Yes.": 1, "": 0, "unanswerable": 0.5}),
        ("passage_count", ["7"], {"7": 1, "7 or 8": 0.5, "seven": 0, "": 0}),
        ("passage_retrieval_en", ["Paragraph 12"], {"Paragraph 12": 1, "12": 1, "Paragraph 1, 12": 0.5, "": 0}),
        ("gov_report", ["roads are old", "bridges"], {"roads are old": 1, "": 0}),
    ):
        doc = read(f"longbench_e/{name}", write(tmp_path / f"{name}_e.jsonl", [record(answers=answers)]).parent)[0][0]
        task = longbench.harness_task(f"longbench_e/{name}", [doc])
        for answer, score in cases.items():
            assert task.process_results(doc, [answer])["score"] == pytest.approx(score), (name, answer)


@pytest.mark.parametrize(
    ("words", "name"), [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+")]
)
def test_length_buckets(words, name):
    assert longbench.bucket(words) == name


@pytest.mark.parametrize("place", ["hotpotqa_e.jsonl", "data/hotpotqa_e.jsonl", "longbench_e/hotpotqa_e.parquet"])
def test_official_files_are_found_and_bad_rows_named(place, tmp_path):
    good = [record(_id=str(i), length=i * 4000) for i in range(3)]
    bad = [{"context": "x"}, record(answers="Ann"), record(answers=[]), record(length="5"), record(context=7)]
    file = tmp_path / place
    if file.suffix == ".parquet":
        from datasets import Dataset

        file.parent.mkdir()
        Dataset.from_list(good).to_parquet(str(file))
        bad = []
    else:
        write(file, [*good[:2], *bad, good[2]])
        with open(file, "ab") as more:
            more.write('{"context": "café"}\n'.encode("latin-1") + b"{\n3\n")
    docs, report = read("longbench_e/hotpotqa", tmp_path)
    assert [doc["id"] for doc in docs] == ["0", "1", "2"] == [str(doc["index"]) for doc in docs]
    assert [doc["splits"]["length"] for doc in docs] == ["0-4k", "4-8k", "8k+"]
    told = "\n".join(report.bad)
    assert len(report.bad) == len(bad) + (3 if bad else 0) and report.good == 3
    for part in ("no field 'input'", "answers 'Ann'", "answers []", "length '5'", "'context' is a int", "not UTF-8"):
        assert not bad or part in told or part == "no field 'input'"
    assert not bad or (f"{file}:10: not JSON" in told and "row is a int" in told and "no field 'question'" in told)
    assert len(read("longbench_e/hotpotqa", tmp_path, 2)[0]) == 2


def test_the_official_array_of_version_two_is_read(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([question(), question(answer="E"), question(length=None)]))
    docs, report = read("longbench2", tmp_path)
    assert len(docs) == 1 and "answer 'E'; expected A, B, C or D" in report.bad[0]
    assert "item 3: field 'length' is a NoneType" in report.bad[1]


def test_what_cannot_be_had_is_named(tmp_path, monkeypatch):
    with pytest.raises(longbench.MissingDataError, match=r"no trec_e\{.jsonl,.json,.parquet\} in .*empty"):
        read("longbench_e/trec", tmp_path / "empty")
    with pytest.raises(longbench.MissingDataError, match="no data or longbench_v2"):
        read("longbench2", tmp_path)
    write(tmp_path / "trec_e.jsonl", [{}])
    with pytest.raises(ValueError, match="task longbench_e/trec has no usable row; 0 records read, 1 skipped"):
        read("longbench_e/trec", tmp_path)
    (tmp_path / "lcc_e.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read("longbench_e/lcc", tmp_path)
    import datasets

    def absent(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(longbench.MissingDataError, match=r"v2 cannot be had from the hub \(ConnectionError\)"):
        read("longbench2", None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{**record(), "question": "Q?"}])
    assert read("longbench_e/trec", None)[0][0]["question"] == "Question: Who?"
    monkeypatch.setattr(longbench, "CONFIGS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no task file .*longbench_e.yaml; install from a clone"):
        longbench.tasks(longbench.E)
