"""Several `elastic eval` commands at a time: one folder of results, one cache of samples, one ranking of heads."""

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from elastic.files import alone, write_atomic

PROCESSES, TIMES = 4, 25


def together(work, *given):
    """Run `work(number, *given)` in several processes at once; their exit codes."""
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=work, args=(number, *given)) for number in range(PROCESSES)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    return [process.exitcode for process in running]


def writer(number, file):
    for _ in range(TIMES):
        with alone(file.parent / ".lock"):
            write_atomic(file, f"{number}" * (100_000 * (number + 1)))
        text = file.read_text()
        assert len(text) == 100_000 * (int(text[0]) + 1) and len(set(text)) == 1


def test_readers_see_a_whole_file_while_several_write_it(tmp_path):
    file = tmp_path / "new" / "result.jsonl"
    assert together(writer, file) == [0] * PROCESSES
    assert {path.name for path in file.parent.iterdir()} <= {"result.jsonl", ".lock"}


def sampler(number, ruler, request, made):
    generate = ruler._generate

    def noted(*given):
        (made / str(number)).touch()
        return generate(*given)

    ruler._generate = noted
    assert len(ruler.documents(request)) == 3


def test_samples_are_made_by_one_of_several_processes(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    pytest.importorskip("wonderwords", reason="the extra `eval` is not installed")
    from elastic.evaluation.benchmark import Request
    from elastic.evaluation.ruler import Ruler
    from elastic.model.loading import load_tokenizer

    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "made").mkdir()
    request = Request("ruler_vt", 1024, 3, load_tokenizer("tiny"), 0, False)
    assert together(sampler, Ruler(), request, tmp_path / "made") == [0] * PROCESSES
    assert len(list((tmp_path / "made").iterdir())) == 1


def evaluator(number, plan, methods, out):
    from elastic.evaluation import runner
    from elastic.evaluation.summary import write_summary

    runner.load_model = lambda *_: (None, None)
    runner._evaluate = lambda plan, method, cells, *_: [
        [{**MEASURED, "score": float(method.name == "dense")} for _ in range(plan.samples)] for _ in cells
    ]
    write_summary(runner.run(plan, methods[number % 2 :][:1], out), out)


MEASURED = {"msr": 0.5, "esr_last": 0.25, "esr_all": 0.25, "prefill_seconds": 0.1, "tokens": 900}


def test_commands_that_share_a_folder_are_summed_up_by_a_last_one(tmp_path, monkeypatch):
    """A process per method, each method twice; then all of them at another batch size and device number."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    from dataclasses import replace

    from elastic.config import SparseConfig
    from elastic.evaluation import runner
    from elastic.evaluation.ruler import Ruler
    from elastic.evaluation.summary import write_summary
    from elastic.routing.methods import parse_method

    family, methods = Ruler(), [parse_method("dense"), parse_method("streaming")]
    sparse = SparseConfig(sink=4, window=16, block=4, stride=4)
    asked = tuple((family, task) for task in ("ruler_vt", "ruler_fwe"))
    plan = runner.EvaluationPlan("tiny", "cuda:1", "bfloat16", asked, (1024, 2048), 5, 16, False, sparse, 0)
    assert together(evaluator, plan, methods, tmp_path) == [0] * PROCESSES
    monkeypatch.setattr(runner, "_evaluate", lambda *_: pytest.fail("a finished result was made again"))
    rows = runner.run(replace(plan, device="cuda", batch_size=100), methods, tmp_path)
    assert [row["score"] for row in rows] == [1.0] * 4 + [0.0] * 4
    write_summary(rows, tmp_path)
    assert len(json.loads((tmp_path / "summary.json").read_text())) == 8
    assert not list(tmp_path.rglob("*.writing"))
    monkeypatch.setattr(runner, "load_model", lambda *_: (None, None))
    with pytest.raises(pytest.fail.Exception):  # another seed asks for other samples
        runner.run(replace(plan, seed=1), methods, tmp_path)


def dying(_, lock):
    with alone(lock):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_does_not_keep_the_others_out(tmp_path):
    assert together(dying, tmp_path / ".lock") == [-signal.SIGKILL] * PROCESSES
    with alone(tmp_path / ".lock"):
        write_atomic(tmp_path / "result", "whole")
    assert (tmp_path / "result").read_text() == "whole"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "result"
    write_atomic(file, "before")

    def full(path, *_, **__):
        path.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomic(file, "after")
    assert file.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["result"]
