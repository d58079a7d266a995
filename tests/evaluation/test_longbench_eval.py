"""`elastic eval` on LongBench-E and LongBench-v2 from official files, end to end on the tiny backbone; the same result
after a kill, a full disk or damage.
"""

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from elastic import cli
from elastic.config import ElasticConfig
from elastic.model.attach import attach
from elastic.model.loading import load_backbone

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("rouge", reason="the extra `eval` is not installed")
from elastic.evaluation import longbench, runner
from elastic.evaluation.routed_lm import RoutedLM
from tests.evaluation.test_longbench import CLASSES, of_set, prompt, question, read, record, write
from tests.helpers.forked import forked


def official_folder(folder):
    """A tiny LongBench-E (12 sets, three lengths, an unusable row) and LongBench-v2 in the official format."""
    for name in longbench.SETS:
        if name != "multi_news":
            answers = {"passage_retrieval_en": ["Paragraph 2"], "trec": ["location"]}.get(name, ["f1", "f2 f3"])
            rows = [record(_id=f"{name}-{i}", length=3000 * (i + 1), answers=answers) for i in range(3)]
            rows = [{**row, "context": f"f{i} f4 " * (10 + i), "all_classes": CLASSES} for i, row in enumerate(rows)]
            write(folder / f"{name}_e.jsonl", [*rows, record(answers=None)] if name == "qasper" else rows)
    rows = [question(_id=str(i), difficulty=d, length=w) for i, (d, w) in enumerate(SPLITS)]
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


SPLITS = (("easy", "short"), ("hard", "medium"), ("hard", "long"), ("easy", "long"))


@pytest.fixture
def short_answers(monkeypatch):
    """Three tokens an answer, to be quick."""
    shorten(monkeypatch)


def shorten(monkeypatch):
    for task in (*longbench.TASKS[longbench.E], longbench.V2):
        config = dict(longbench.task_config(task))
        config["generation_kwargs"] = {**config["generation_kwargs"], "max_gen_toks": 3}
        monkeypatch.setitem(SHORT, task, config)
    monkeypatch.setattr(longbench, "task_config", SHORT.__getitem__)


SHORT: dict = {}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_command_runs_both_benchmarks_from_official_files(tmp_path, short_answers, capsys):
    data, out = official_folder(tmp_path / "data"), tmp_path / "out"
    command = ["eval", "--tasks", "longbench_e", "longbench2", "--data", str(data), "--backbone", "tiny", "--chat"]
    sizes = ["--sink", "4", "--window", "16", "--block", "4"]
    assert cli.main([*command, *sizes, "--methods", "dense", "streaming", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    for part in (
        "Not in the means of longbench_e: longbench_multi_news_e (has no file <set>_e with .jsonl",
        "Not a usable document: ",
        "qasper_e.jsonl:4: answers None; expected a list of texts",
        "Corrected: longbench_triviaqa_e: a blank line before the question",
        "longbench_e: mean of tasks",
        "longbench_e: mean of samples",
    ):
        assert part in told
    rows = json.loads((out / "summary.json").read_text())
    assert len(rows) == 2 * 13 and {row["task"] for row in rows} == {
        *(of_set(name) for name in longbench.SETS if name != "multi_news"),
        "longbench2",
    }
    for row in rows:
        groups = row["groups"]
        assert row["msr"] == (row["method"] == "streaming") and sum(g["n"] for g in groups.values()) >= row["n"]
        named = {"easy": 2, "hard": 2, "short": 1, "medium": 1, "long": 2}
        wanted = named if row["task"] == "longbench2" else {"0-4k": 1, "4-8k": 1, "8k+": 1}
        assert {name: group["n"] for name, group in groups.items()} == wanted
    for name in ("dense.longbench_trec_e", "dense.longbench_hotpotqa_e", "streaming.longbench2"):
        origin, *samples = lines(out / "samples" / f"{name}.jsonl")
        assert origin["chat_template"] == ("trec" not in name) and origin["seed"] == 0 and origin["versions"]["lm_eval"]
        assert origin["documents"]["sha256"] and origin["documents"]["metrics"]["rouge"]
        assert any("middle" in line for line in origin["protocol"])
        assert set(samples[0]) >= {"id", "prediction", "references", "score", "msr", "esr_all", "tokens", "groups"}
    assert "0-4k" in (out / "summary.txt").read_text() and (out / "score_by_group.png").stat().st_size > 5000
    before = {file: file.stat().st_mtime_ns for file in (out / "samples").iterdir()}
    write(data / "lcc_e.jsonl", [record()])  # another file: its results alone are made again
    assert cli.main([*command, *sizes, "--methods", "dense", "streaming", "--out", str(out)]) == 0
    again = {file.name for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert again == {"dense.longbench_lcc_e.jsonl", "streaming.longbench_lcc_e.jsonl"}


def test_a_prompt_one_token_over_the_limit_loses_its_middle(tmp_path, capsys):
    _, tokenizer = load_backbone("tiny")
    room = 1024 - 32
    doc = {"context": "", "question": "Question: Who?"}
    own = len(tokenizer(prompt(of_set("hotpotqa"), {**doc, "answers": ["a"]}))["input_ids"])
    contexts = [" ".join(["f1"] * (room - own + more)) for more in (0, 1, 40)]
    write(
        tmp_path / "hotpotqa_e.jsonl",
        [record(context=c, _id=str(i), input=doc["question"]) for i, c in enumerate(contexts)],
    )
    command = [
        "eval",
        "--tasks",
        of_set("hotpotqa"),
        "--data",
        str(tmp_path),
        "--backbone",
        "tiny",
        "--methods",
        "dense",
    ]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    _, *samples = lines(tmp_path / "out" / "samples" / "dense.longbench_hotpotqa_e.jsonl")
    assert [(s["id"], s["tokens"], s["cut"]) for s in samples] == [("0", room, 0), ("1", room, 1), ("2", room, 40)]


def test_without_any_data_the_command_says_what_it_needs(tmp_path, capsys):
    assert cli.main(["eval", "--tasks", "longbench2", "--data", str(tmp_path), "--backbone", "tiny"]) == 2
    assert "no task of longbench2 can run here: longbench2 (has no file data or" in capsys.readouterr().err


def small_run(data, out):
    """Two methods on two sets, on the tiny backbone."""
    tasks = [of_set("hotpotqa"), of_set("trec")]
    sizes = ["--sink", "4", "--window", "16", "--block", "4"]
    command = ["eval", "--tasks", *tasks, "--data", str(data), "--backbone", "tiny", *sizes]
    return cli.main([*command, "--methods", "dense", "streaming", "--out", str(out)])


def scores(out):
    """What a run found, without the times."""
    kept = ("id", "prediction", "references", "score", "msr", "esr_last", "esr_all", "tokens", "cut", "groups")
    return {
        file.name: [{key: sample[key] for key in kept} for sample in lines(file)[1:]]
        for file in sorted((out / "samples").glob("*.jsonl"))
    }


def killed_in_the_third_result(data, out):
    """`small_run`, killed with its third result in the scratch file."""
    replace, written = os.replace, iter(range(2))

    def third(source, target):
        os.kill(os.getpid(), signal.SIGKILL) if next(written, None) is None else replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr(os, "replace", third)
        raise SystemExit(small_run(data, out))


def test_a_killed_evaluation_goes_on_to_the_same_result(tmp_path, short_answers, monkeypatch):
    data, out = official_folder(tmp_path / "data"), tmp_path / "out"
    assert small_run(data, tmp_path / "whole") == 0
    process = forked(killed_in_the_third_result, data, out)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    kept = scores(out)
    assert len(kept) == 2 and not (out / "summary.json").exists()
    made, evaluate = [], runner._evaluate
    monkeypatch.setattr(runner, "_evaluate", lambda *given: made.append(given[1].name) or evaluate(*given))
    assert small_run(data, out) == 0
    assert len(made) == 2 and scores(out) == scores(tmp_path / "whole") and kept.items() <= scores(out).items()
    assert not [file for file in (out / "samples").iterdir() if file.name.startswith(".")]


def test_a_full_disk_ends_an_evaluation_plainly_and_keeps_what_is_finished(
    tmp_path, short_answers, monkeypatch, capsys
):
    data, out = official_folder(tmp_path / "data"), tmp_path / "out"
    written = iter(range(3))
    write_text = Path.write_text

    def full(file, *arguments, **more):
        if file.suffix == ".writing" and next(written, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        return write_text(file, *arguments, **more)

    monkeypatch.setattr(Path, "write_text", full)
    assert small_run(data, out) == 2
    assert "elastic eval: error: [Errno 28] No space left on device" in capsys.readouterr().err
    kept = scores(out)
    assert len(kept) == 3 and len(list((out / "samples").iterdir())) == 3
    monkeypatch.setattr(Path, "write_text", write_text)
    assert small_run(data, out) == 0 and kept.items() <= scores(out).items() and len(scores(out)) == 4


def test_a_damaged_result_file_is_made_again(tmp_path, short_answers):
    """As a power failure leaves it: cut, or empty."""
    data, out = official_folder(tmp_path / "data"), tmp_path / "out"
    assert small_run(data, out) == 0
    wanted = scores(out)
    first, second = sorted((out / "samples").glob("dense.*.jsonl"))
    whole = first.read_text()
    for damaged in (whole[:-40], "".join(whole.splitlines(keepends=True)[:-1]), ""):
        first.write_text(damaged)
        second.write_bytes(b"\xff\xfe")
        assert small_run(data, out) == 0 and scores(out) == wanted


def test_dense_answers_and_scores_are_those_of_the_plain_harness(tmp_path):
    """Uncorrected sets on route 0, and the harness' own model on the stock backbone."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    data = official_folder(tmp_path)
    model, tokenizer = load_backbone("tiny")
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    other, _ = load_backbone("tiny")
    ours = RoutedLM(attach(other, ElasticConfig()).eval(), tokenizer, 0, batch_size=2)
    manager = TaskManager(include_defaults=False)
    for name in ("qasper", "hotpotqa", "passage_retrieval_en"):
        assert name == "passage_retrieval_en" or not (longbench.CONFIGS / f"{of_set(name)}.yaml").is_file()
        docs, _ = read(of_set(name), data)
        found = []
        for lm in (plain, ours):
            task = longbench.harness_task(of_set(name), docs)
            results = lm_eval.simple_evaluate(
                model=lm, tasks=[task], bootstrap_iters=0, task_manager=manager, log_samples=True
            )
            (samples,) = results["samples"].values()
            found.append([(sample["resps"][0][0], sample["score"]) for sample in samples])
        assert found[0] == found[1] and len(found[0]) == 3


def test_thinking_is_off_where_the_template_knows_it():
    model, tokenizer = load_backbone("tiny")
    lm = RoutedLM(attach(model, ElasticConfig()).eval(), tokenizer, 0)
    template = tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[0].content }}{% if enable_thinking is false %} (no thinking){% endif %}"
    assert lm.apply_chat_template([{"role": "user", "content": "f1"}]) == "f1 (no thinking)"
    tokenizer.chat_template = template
    assert "f1" in lm.apply_chat_template([{"role": "user", "content": "f1"}])
