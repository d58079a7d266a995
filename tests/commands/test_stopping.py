"""Ctrl-C and SIGTERM: one line that says how to resume, exit code 130, and no process left; run as users run it."""

import os
import signal
import subprocess
import sys
import time

import pytest

from elastic import cli
from elastic.commands import catalogue
from tests.helpers.training import build_data, command_environment

MIXTURE = """
backbone: tiny
seq_length: 512
tokens: {train: 60_000_000, validation: 4_000, test: 4_000}
sources: {needle_single: {weight: 1}, fact_chain: {weight: 1}}
context: [64, 400]
part_tokens: 20_000_000
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def long_commands(data):
    """Arguments of commands that take hours, and the file that shows that they are in the middle of it."""
    settings = (f"--data.data_dir={data}", "--trainer.default_root_dir=run", "--resume_checkpoint.every_n_steps=1")
    steps = ("--trainer.max_steps=100000", "--ckpt_path=last")
    packing = ("data_prep", "pack_mixture", "mixture.yaml", "--out", "packed", "--workers")
    return {
        "fit": (("fit", "-c", "debug", *settings, *steps), "run/last.ckpt"),
        "fit on two": (("fit", "-c", "debug", *settings, *steps, "--trainer.devices=2"), "run/last.ckpt"),
        "pack_mixture 1": ((*packing, "1"), ".packed.parts/recipe.json"),
        "pack_mixture 3": ((*packing, "3"), ".packed.parts/recipe.json"),
        "build_mixture": (
            ("data_prep", "build_mixture", "--language", "tiny", "--per-task", "10000000", "--out", "records"),
            "",
        ),
    }


def begin(arguments, shows, folder):
    """The command in a session of its own, as of a terminal, in the middle of its work."""
    (folder / "mixture.yaml").write_text(MIXTURE)
    argv, log = [sys.executable, "-m", "elastic", *arguments], folder / "log"
    with open(log, "wb") as stream:
        environment = command_environment(PYTHONUNBUFFERED="1")
        started = subprocess.Popen(
            argv, cwd=folder, env=environment, stdout=stream, stderr=stream, start_new_session=True
        )
    until = time.monotonic() + 120
    while not (folder / shows).is_file() if shows else time.monotonic() < until - 114:
        assert started.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    time.sleep(1.0)
    return started


def gone(session, seconds=20):
    """Whether all processes of a session have ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    os.killpg(session, signal.SIGKILL)
    return False


CASES = [
    *((which, how) for which in ("fit", "pack_mixture 3") for how in ("ctrl-c", "SIGINT", "SIGTERM")),
    *(("fit on two", "ctrl-c"), ("fit on two", "SIGTERM"), ("pack_mixture 1", "SIGTERM"), ("build_mixture", "ctrl-c")),
]


@pytest.mark.parametrize(("which", "how"), CASES, ids=map(" ".join, CASES))
def test_a_stopped_command_says_how_to_resume_and_leaves_no_process(which, how, data, tmp_path):
    """Ctrl-C in a terminal reaches all processes of the command, SIGINT and SIGTERM from elsewhere the first alone."""
    arguments, shows = long_commands(data)[which]
    started = begin(arguments, shows, tmp_path)
    if how == "ctrl-c":
        os.killpg(started.pid, signal.SIGINT)
    else:
        started.send_signal(getattr(signal, how))
    try:
        code = started.wait(60)
    finally:
        left = not gone(started.pid)
    said = (tmp_path / "log").read_text()
    assert not left and code == 130, said[-3000:]
    assert "Traceback" not in said and said.count(": stopped; ") == 1, said[-3000:]
    way = {"fit": "to resume, repeat it with --ckpt_path last", "pack": "to resume, repeat it; finished shards stay"}
    assert f"elastic {arguments[0]}: stopped; {way.get(which[:4].strip(), 'repeated, it')}" in said.splitlines()[-1]


def test_workers_end_when_their_parent_is_killed(data, tmp_path):
    arguments, shows = long_commands(data)["pack_mixture 3"]
    started = begin(arguments, shows, tmp_path)
    started.kill()
    started.wait(60)
    assert gone(started.pid)


@pytest.mark.parametrize("name", [*catalogue.TRAINING, *catalogue.COMMANDS])
def test_every_command_ends_with_one_line(name, monkeypatch, capsys):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(cli, "_run", stop)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([name]) == 130
    error = capsys.readouterr().err
    assert error.startswith(f"elastic {name}: stopped; ") and error.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_one_process_of_a_run_speaks(rank, lines, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(cli, "_run", stop)
    assert cli.main(["fit"]) == 130
    assert capsys.readouterr().err.count("\n") == lines
