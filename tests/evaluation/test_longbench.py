"""LongBench-E and LongBench-v2: the official files become documents, each correction on its edge cases."""

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("rouge", reason="the extra `eval` is not installed")
from elastic.data.file_rows import ReadReport
from elastic.evaluation import longbench
from elastic.evaluation import longbench_metrics as metrics
from elastic.evaluation.longbench_rows import bucket

ROOT = Path(__file__).parents[2]
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


def of_set(name):
    return f"longbench_{name}_e"


def harness_file(name):
    from lm_eval.tasks import __file__ as folder
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(Path(folder).parent / name, resolve_func=False)  # its functions import what is not installed


def test_all_thirteen_sets_with_their_limits():
    bench = {name: longbench.LongBench(name, None) for name in longbench.TASKS}
    limits = {name: longbench.task_config(of_set(name))["generation_kwargs"]["max_gen_toks"] for name in longbench.SETS}
    assert limits == {
        **{"qasper": 128, "multifieldqa_en": 64, "hotpotqa": 32, "2wikimqa": 32, "gov_report": 512, "multi_news": 512},
        **{"trec": 64, "triviaqa": 32, "samsum": 128, "passage_count": 32, "passage_retrieval_en": 32},
        **{"lcc": 64, "repobench-p": 64},
    }
    assert len(bench[longbench.E].tasks()) == 13 and bench[longbench.V2].tasks() == ("longbench2",)
    assert longbench.task_config("longbench2")["generation_kwargs"]["max_gen_toks"] == 128
    bare = {name for name in longbench.SETS if not bench[longbench.E].takes_chat(of_set(name))}
    assert bare == {"trec", "triviaqa", "samsum", "lcc", "repobench-p"} and bench[longbench.V2].takes_chat("longbench2")
    for family in bench.values():
        for task in family.tasks():
            options = longbench.task_config(task)["generation_kwargs"]
            assert options["do_sample"] is False and options["until"] == []
    said = "\n".join(bench[longbench.E].corrections)
    assert "all 13 sets" in said and "longbench_lcc_e: the prompt ends in a line feed" in said and "middle" in said
    assert any("log-likelihoods" in line for line in bench[longbench.V2].corrections)


def test_prompts_differ_from_the_harness_where_the_official_ones_do(tmp_path):
    for name in longbench.SETS:
        task = of_set(name)
        write(tmp_path / f"{name}_e.jsonl", [record(all_classes=CLASSES, answers=["Paragraph 2"])])
        doc = read(task, tmp_path)[0][0]
        ours = prompt(task, doc)
        theirs = harness_file(f"longbench/{name}_e.yaml")["doc_to_text"]
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
    assert docs[0]["groups"] == ["easy", "short"] and docs[0]["references"] == ["B"]


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


# What fuzzywuzzy 0.18 says over difflib, and rapidfuzz 3.14 where that is something else.
RATIOS = [
    ("return x", "return x", 100),
    ("", "", 100),
    ("", "return x", 0),
    ("return x", "", 0),
    ("x", "y", 0),
    ("return y", "return x", 88),  # 87.5 is rounded to the even number
    ("    if x:", "    if not x:", 82),
    ("import os, sys", "import sys, os", 79),
    ("for name in sorted(found):", "found = sorted(names)", 55),  # 60
    ("abcabba", "cbabac", 46),  # 62
    ("00011111", "11110001", 50),  # 62
    ("a" * 201 + "b", "b" + "a" * 201, 0),  # 100; difflib leaves out what is frequent in a long text
]


@pytest.mark.parametrize(("line", "reference", "percent"), RATIOS)
def test_the_ratio_of_code_lines_is_that_of_the_official_metric(line, reference, percent):
    assert metrics.ratio(line, reference) == percent


def made_up(random, vocabulary, most):
    return " ".join(random.choice(vocabulary) for _ in range(random.randint(0, most)))


def test_metrics_are_those_of_the_harness_on_made_up_answers():
    """Where somebody has installed what the harness needs; this package does not ask for it."""
    for name in ("jieba", "fuzzywuzzy"):
        pytest.importorskip(name, reason=f"{name} is not installed, beside which the harness' metrics run")
    from fuzzywuzzy import fuzz
    from lm_eval.tasks.longbench import metrics as harness

    random = Random(0)
    code = [line for file in sorted(ROOT.glob("elastic/evaluation/*.py")) for line in file.read_text().split("\n")]
    words = re.findall(r"\S+", "the a An red house of Riga , . yes! no 7 12 Paragraph 3 Date of birth It's x-y.")
    for _ in range(1000):
        line, other = random.choice(code), random.choice(code)
        changed = other.replace(random.choice(other or " "), random.choice("xyz "))
        for mine, reference in ((line, other), (changed, other)):
            assert metrics.ratio(mine, reference) == fuzz.ratio(mine, reference), (mine, reference)
        classes = random.sample([*CLASSES, "birth", "Other"], random.randint(1, 6))
        answers = [made_up(random, words, 8) for _ in range(random.randint(1, 3))]
        doc = {"answers": random.choice([answers, [random.choice(CLASSES)]]), "all_classes": classes}
        answer = "\n" * random.randint(0, 2) + made_up(random, words, 10) + random.choice(["", "\nAnd more"])
        for name, ours in metrics.OF_HARNESS.items():
            if name == "get_retrieval_with_score":
                doc = {**doc, "answers": [f"Paragraph {random.randint(1, 12)}"]}
            assert ours(doc, [answer])["score"] == getattr(harness, name)(doc, [answer])["score"], (name, answer, doc)
        theirs = harness.get_classification_score(doc, [metrics.first_line(answer)])["classification_score"]
        assert metrics.classification(doc, [answer])["score"] == theirs, (answer, doc)


def test_no_task_imports_what_is_under_another_kind_of_licence():
    """In a process of its own, where fuzzywuzzy and jieba cannot be imported."""
    script = """
import sys
sys.modules.update(fuzzywuzzy=None, jieba=None)
from elastic.evaluation import longbench
for name in longbench.TASKS:
    for task in longbench.TASKS[name]:
        assert callable(longbench.task_config(task)["process_results"]), task
assert "lm_eval.tasks.longbench.metrics" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_uncorrected_sets_are_scored_by_the_whole_answer(tmp_path):
    for name, answers, cases in (
        ("qasper", ["yes", "it is unanswerable"], {"Yes.": 1, "": 0, "unanswerable": 0.5}),
        ("passage_count", ["7"], {"7": 1, "7 or 8": 0.5, "seven": 0, "": 0}),
        ("passage_retrieval_en", ["Paragraph 12"], {"Paragraph 12": 1, "12": 1, "Paragraph 1, 12": 0.5, "": 0}),
        ("gov_report", ["roads are old", "bridges"], {"roads are old": 1, "": 0}),
    ):
        doc = read(of_set(name), write(tmp_path / f"{name}_e.jsonl", [record(answers=answers)]).parent)[0][0]
        task = longbench.harness_task(of_set(name), [doc])
        for answer, score in cases.items():
            assert task.process_results(doc, [answer])["score"] == pytest.approx(score), (name, answer)


@pytest.mark.parametrize(
    ("words", "name"), [(0, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+")]
)
def test_length_buckets(words, name):
    assert bucket(words) == name


@pytest.mark.parametrize("place", ["hotpotqa_e.jsonl", "data/hotpotqa_e.jsonl", "LongBench/hotpotqa_e.parquet"])
def test_official_files_are_found_and_bad_rows_named(place, tmp_path):
    good = [record(_id=str(i), length=i * 4000) for i in range(3)]
    bad = [{"context": "x"}, record(answers="Ann"), record(answers=[]), record(length="five"), record(context=7)]
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
    docs, report = read(of_set("hotpotqa"), tmp_path)
    assert [doc["id"] for doc in docs] == ["0", "1", "2"] == [str(doc["index"]) for doc in docs]
    assert [doc["groups"] for doc in docs] == [["0-4k"], ["4-8k"], ["8k+"]]
    told = "\n".join(report.bad)
    assert len(report.bad) == len(bad) + (3 if bad else 0) and report.good == 3
    for part in ("no field 'input'", "answers 'Ann'", "answers []", "length 'five'", "'context' is a int", "not UTF-8"):
        assert not bad or part in told or part == "no field 'input'"
    assert not bad or (f"{file}:10: not JSON" in told and "row is a int" in told and "no field 'question'" in told)
    assert len(read(of_set("hotpotqa"), tmp_path, 2)[0]) == 2


def test_habits_of_copies_of_the_files(tmp_path):
    """Lengths as text, null classes, empty answers, ids and rows that come twice: read, or named."""
    rows = [
        record(_id="a", length="4000"),
        record(_id="a", context="Another context of the same id."),
        record(_id="a", length=4000),  # the first one again
        record(_id="b", answers=["", "Ann"]),
        record(_id=7, question="Who?", all_classes=[]),
        *(record(_id="c", answers=answers) for answers in ([], [""], [" ", "\n"], [None], None)),
        *(record(_id="d", length=length) for length in ("", "-5", "4e3", "\u0665", True, 4000.5, None)),
        record(_id="e", all_classes="Date"),
        record(_id="f", all_classes=[None]),
    ]
    docs, report = read(of_set("qasper"), write(tmp_path / "qasper_e.jsonl", rows).parent)
    assert [(doc["id"], doc["index"]) for doc in docs] == [("a", 0), ("a", 1), ("b", 2), ("7", 3)]
    assert docs[0]["groups"] == ["4-8k"] and {tuple(doc["all_classes"]) for doc in docs} == {()}
    assert report.bad[0].endswith(f"qasper_e.jsonl:3: the same document as {tmp_path / 'qasper_e.jsonl'}:1")
    assert len(report.bad) == 15 and sum("answers" in line for line in report.bad) == 5
    assert sum("expected a number of words" in line for line in report.bad) == 7
    assert metrics.OF_HARNESS["get_qa_f1_with_score"](docs[2], ["Ann"])["score"] == 1
    assert metrics.code_similarity(docs[2], [""])["score"] == 1  # an empty line is that reference, as officially


def test_sets_that_need_classes_or_paragraphs_name_rows_without(tmp_path):
    rows = [record(all_classes=given, answers=["Date"]) for given in (CLASSES, None, [])]
    docs, report = read(of_set("trec"), write(tmp_path / "trec_e.jsonl", rows).parent)
    assert len(docs) == 1 and "all_classes None; expected" in report.bad[0] and "all_classes []" in report.bad[1]
    rows = [record(answers=given) for given in (["Paragraph 3"], ["", "Paragraph 4"], ["third"])]
    docs, report = read(of_set("passage_retrieval_en"), write(tmp_path / "passage_retrieval_en_e.jsonl", rows).parent)
    score = metrics.OF_HARNESS["get_retrieval_with_score"]
    assert [score(doc, ["Paragraph 4"])["score"] for doc in docs] == [0, 1]
    assert len(report.bad) == 1 and "answers ['third']; expected 'Paragraph <number>'" in report.bad[0]


def test_the_official_array_of_version_two_is_read(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([question(), question(answer="E"), question(length=None)]))
    docs, report = read("longbench2", tmp_path)
    assert len(docs) == 1 and "answer 'E'; expected A, B, C or D" in report.bad[0]
    assert "item 3: field 'group 2' is a NoneType" in report.bad[1]


def test_what_cannot_be_had_is_named(tmp_path, monkeypatch):
    from datasets import Dataset

    bench = longbench.LongBench(longbench.E, tmp_path)
    write(tmp_path / "trec_e.jsonl", [{}])
    assert len(bench.left_out()) == 12 and of_set("trec") not in bench.left_out()
    assert bench.left_out()[of_set("lcc")] == f"has no file <set>_e with .jsonl, .json, .parquet in {tmp_path}"
    with pytest.raises(ValueError, match=r"has no file data or longbench_v2 or longbench2 with \.jsonl"):
        read("longbench2", tmp_path)
    with pytest.raises(ValueError, match="task longbench_trec_e has no usable row; 0 records read, 1 skipped"):
        read(of_set("trec"), tmp_path)
    file = tmp_path / "lcc_e.parquet"
    Dataset.from_list([record()] * 50).to_parquet(str(file))
    whole = file.read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-1], b"PAR1 and no more", b""):  # as a broken download leaves it
        file.write_bytes(part)
        with pytest.raises(ValueError, match="cannot be read as parquet"):
            read(of_set("lcc"), tmp_path)
    monkeypatch.setattr(longbench, "PACKAGES", ("rouge", "no_such_package"))
    reason = longbench.LongBench(longbench.V2, tmp_path).left_out()["longbench2"]
    assert reason == "needs no_such_package: pip install 'elastic-attention[eval]'"
    monkeypatch.setattr(longbench, "CONFIGS", tmp_path)
    longbench.task_config.cache_clear()
    with pytest.raises(ValueError, match=r"no task files in .*; install from a clone"):
        longbench.task_config(of_set("qasper"))


def test_the_hub_is_asked_once_where_it_cannot_be_reached(monkeypatch):
    import datasets

    longbench._hub_rows.cache_clear()
    asked = []

    def hub(*names, split):
        asked.append((*names, split))
        if names == ("Xnhyacinth/LongBench", "trec_e"):
            return [{**record(all_classes=CLASSES), "question": "Q?"}]
        raise ConnectionError("no route") if len(asked) > 2 else ValueError("no such set")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert read(of_set("trec"), None)[0][0]["question"] == "Question: Who?"
    with pytest.raises(ValueError, match=r"cannot be had .* \(Xnhyacinth/LongBench lcc_e: ValueError\); name"):
        read(of_set("lcc"), None)
    left_out = longbench.LongBench(longbench.E, None).left_out()
    assert len(left_out) == 13 and "qasper_e: ConnectionError" in left_out[of_set("trec")] and len(asked) == 3
    assert asked[0] == ("Xnhyacinth/LongBench", "trec_e", "test")
    longbench._hub_rows.cache_clear()
