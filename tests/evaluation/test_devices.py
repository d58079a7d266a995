"""`elastic eval --devices 2`: two processes share the samples of every task; the results are those of one."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from elastic import cli
from elastic.model.loading import load_backbone
from elastic.training.launch import Processes, launch
from tests.helpers.forked import forked_program, forked_ranks, run_command
from tests.helpers.processes import gone

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("wonderwords", reason="the extra `eval` is not installed")
TIMES = ("prefill_seconds", "task_seconds")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """The tiny one, said to read 2,048 tokens."""
    folder = tmp_path_factory.mktemp("backbone")
    model, tokenizer = load_backbone("tiny")
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def evaluated(folder: Path, backbone: Path, processes: int) -> tuple[list, list[str], str]:
    """Every line of the result files without the times, the files' names, and the table."""
    given = ["--backbone", str(backbone), "--tasks", "ruler_fwe", "ruler_vt", "--lengths", "1024", "--limit", "3"]
    given += ["--methods", "dense", "streaming", "--batch-size", "2", "--sink", "4", "--window", "16", "--block", "4"]
    environment = {"ELASTIC_CACHE": str(backbone / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    given += ["--devices", str(processes), "--out", "out"]
    log = folder / "log"
    log.unlink(missing_ok=True)
    codes = forked_ranks(processes, run_command, ["eval", *given], folder, log, **environment)
    assert codes == [0] * processes, log.read_text()[-3000:]
    files = sorted((folder / "out" / "samples").glob("*.jsonl"))
    lines = [[json.loads(line) for line in file.read_text().splitlines()] for file in files]
    kept = [[{k: v for k, v in line.items() if k not in TIMES} for line in file] for file in lines]
    return kept, [file.name for file in files], log.read_text()


def test_two_processes_find_what_one_finds(backbone, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, names, _ = evaluated(tmp_path / "one", backbone, 1)
    two, same, shown = evaluated(tmp_path / "two", backbone, 2)
    assert names == same and len(names) == 4 and [len(file) for file in two] == [4] * 4  # a head and three samples
    for mine, theirs in zip(one, two, strict=True):
        assert mine == theirs  # predictions, scores, routes, tokens, in the order of the data
    assert shown.count("Written:") == 1 and shown.count("mean of tasks") == 1
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "two" / "out" / "samples").iterdir()}
    evaluated(tmp_path / "two", backbone, 2)
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "two" / "out" / "samples").iterdir()}


@pytest.mark.parametrize(("ends", "code"), [("SIGTERM", 130), ("a folder in the way", 2)])
def test_where_the_first_process_ends_the_others_end_without_a_word(ends, code, backbone, tmp_path):
    samples = tmp_path / "out" / "samples"
    given = ["--backbone", str(backbone), "--tasks", "ruler_fwe", "--lengths", "1024", "--limit", "8", "--batch-size"]
    given += ["2", "--methods", "dense", "streaming", "random:0.5", "--out", "out", "--devices", "2"]
    environment = {"ELASTIC_CACHE": str(backbone / "cache"), "MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    if code == 2:
        (samples / "streaming.ruler_fwe.1024.jsonl").mkdir(parents=True)
    started = forked_program(["eval", *given], tmp_path, tmp_path / "log", **environment)
    started.start()
    until = time.monotonic() + 120
    while not (samples / "dense.ruler_fwe.1024.jsonl").is_file():
        assert started.is_alive() and time.monotonic() < until, (tmp_path / "log").read_text()
        time.sleep(0.05)
    if code == 130:
        os.kill(started.pid, getattr(signal, ends))
    try:
        started.join(60)
    finally:
        left = not gone(started.pid)
    said = (tmp_path / "log").read_text()
    assert not left and started.exitcode == code, said[-3000:]
    assert "Traceback" not in said and said.count("elastic eval: ") == 1, said[-3000:]


def test_one_process_is_alone():
    import torch

    alone = Processes(torch.device("cpu"))
    assert (alone.rank, alone.count, alone.share("abc")) == (0, 1, ["a", "b", "c"])
    assert alone.agree(lambda: 7) == 7 and alone.gather(lambda: [1, 2]) == [1, 2]
    alone.rank, alone.count = 1, 3
    assert alone.share("abcdefg") == ["b", "e"]


@pytest.mark.parametrize(("device", "devices"), [("cuda:1", 2), ("cpu", 0)])
def test_devices_that_do_not_fit(device, devices):
    with pytest.raises(ValueError, match=f"--devices {devices} --device {device}: expected one device or more"):
        launch(device, devices)


def test_more_gpus_than_there_are(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cli.main(["eval", "--devices", "4", "--device", "cuda", "--out", str(tmp_path)]) == 2
    assert "--devices 4: this machine has 1 GPUs" in capsys.readouterr().err
