"""Ctrl-C and SIGTERM: one line that says how to resume, exit code 130, and no process left; run as users run it, each
kind of command once from its first import on.
"""

import os
import signal
import subprocess
import sys
import time

import pytest

from elastic import cli
from elastic.commands import catalogue, doctor
from tests.helpers.forked import forked_program
from tests.helpers.processes import gone
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


def begin(arguments, shows, folder, whole=False):
    """The command in a session of its own, as of a terminal, in the middle of its work; whole, with its imports."""
    (folder / "mixture.yaml").write_text(MIXTURE)
    log = folder / "log"
    if whole:
        argv, environment = [sys.executable, "-m", "elastic", *arguments], command_environment(PYTHONUNBUFFERED="1")
        with open(log, "wb") as stream:
            started = subprocess.Popen(
                argv, cwd=folder, env=environment, stdout=stream, stderr=stream, start_new_session=True
            )
    else:
        log.touch()
        started = forked_program(arguments, folder, log, PYTHONUNBUFFERED="1")
        started.start()
    until = time.monotonic() + 120
    while not ((folder / shows).is_file() if shows else "records:" in log.read_text()):
        assert running(started) and time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    time.sleep(1.0)
    return started


def running(started):
    return started.poll() is None if isinstance(started, subprocess.Popen) else started.is_alive()


def ended(started):
    """The exit code."""
    if isinstance(started, subprocess.Popen):
        return started.wait(60)
    started.join(60)
    return started.exitcode


CASES = [
    *((which, how) for which in ("fit", "pack_mixture 3") for how in ("ctrl-c", "SIGINT", "SIGTERM")),
    *(("fit on two", "ctrl-c"), ("fit on two", "SIGTERM"), ("pack_mixture 1", "SIGTERM"), ("build_mixture", "ctrl-c")),
]

WHOLE = [("fit", "ctrl-c"), ("pack_mixture 3", "ctrl-c"), ("pack_mixture 1", "SIGTERM"), ("build_mixture", "ctrl-c")]


@pytest.mark.parametrize(("which", "how"), CASES, ids=map(" ".join, CASES))
def test_a_stopped_command_says_how_to_resume_and_leaves_no_process(which, how, data, tmp_path):
    """Ctrl-C in a terminal reaches all processes of the command, SIGINT and SIGTERM from elsewhere the first alone."""
    arguments, shows = long_commands(data)[which]
    started = begin(arguments, shows, tmp_path, (which, how) in WHOLE)
    if how == "ctrl-c":
        os.killpg(started.pid, signal.SIGINT)
    else:
        os.kill(started.pid, getattr(signal, how))
    try:
        code = ended(started)
    finally:
        left = not gone(started.pid)
    said = (tmp_path / "log").read_text()
    assert not left and code == 130, said[-3000:]
    assert "Traceback" not in said and said.count(": stopped; ") == 1, said[-3000:]
    way = {"fit": "to resume, repeat it with --ckpt_path last", "pack": "to resume, repeat it; finished shards stay"}
    assert f"elastic {arguments[0]}: stopped; {way.get(which[:4].strip(), 'repeated, it')}" in said.splitlines()[-1]


@pytest.mark.parametrize("launcher", ["Lightning", "torchrun"])
def test_a_rank_that_another_started_ends_after_it(launcher, monkeypatch, capsys):
    """Lightning kills rank 0 within seconds of the end of any other, also before it has said how to resume."""

    def stopped(_):
        raise KeyboardInterrupt

    asked = [1, 7, 7, 7, 7]  # the parent at each look: process 7, until it has ended
    monkeypatch.setattr(doctor, "main", stopped)
    monkeypatch.setattr(cli.os, "getppid", asked.pop)
    monkeypatch.setenv("LOCAL_RANK", "1")
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cli.main(["doctor"]) == 130 and len(asked) == {"Lightning": 0, "torchrun": 3}[launcher]
    assert capsys.readouterr().err == ""


def test_workers_end_when_their_parent_is_killed(data, tmp_path):
    arguments, shows = long_commands(data)["pack_mixture 3"]
    started = begin(arguments, shows, tmp_path)
    started.kill()
    ended(started)
    assert gone(started.pid)


@pytest.mark.parametrize("job", [None, "7"])
@pytest.mark.parametrize("name", [*catalogue.TRAINING, *catalogue.COMMANDS])
def test_every_command_ends_with_one_line(name, job, monkeypatch, capsys):
    """Also in a job of SLURM, whose signal is Lightning's in `fit` alone."""

    def stop(*_):
        if job and name == "fit":
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr(cli, "_run", stop)
    monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([name]) == 130
    error = capsys.readouterr().err
    assert error.startswith(f"elastic {name}: stopped; ") and error.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["fit", "test", "calibrate", "demo"])
def test_what_lightning_ends_after_sigterm_is_stopped(name, monkeypatch, capsys):
    """Its exception alone is exit code 0, as if all had been done."""
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from elastic.commands import calibrate, demo, training

    def stop(*_):
        raise SIGTERMException

    for module, function in ((training, "run"), (calibrate, "main"), (demo, "main")):
        monkeypatch.setattr(module, function, stop)
    assert cli.main([name]) == 130
    assert capsys.readouterr().err.startswith(f"elastic {name}: stopped; ")


def test_what_a_library_makes_of_ctrl_c_is_stopped(monkeypatch, capsys):
    """In the middle of an import transformers calls it a missing package; commands then complain about that."""
    from elastic.commands import generate
    from elastic.console import Parser, complain

    def load():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error

    def told(how):
        try:
            load()
        except RuntimeError:
            try:
                raise ValueError("needs another package")
            except ValueError as error:
                return how(error)

    for how in (lambda error: complain("generate", error), lambda error: Parser(prog="x").error(str(error))):
        monkeypatch.setattr(generate, "main", lambda _, how=how: told(how))
        assert cli.main(["generate"]) == 130
        error = capsys.readouterr().err
        assert error.startswith("elastic generate: stopped; ") and error.count("\n") == 1
    monkeypatch.setattr(generate, "main", lambda _: load())
    assert cli.main(["generate"]) == 130


def test_open_bars_end_before_the_last_line(monkeypatch, capsys):
    """Collected later, a bar would draw itself once more, after it."""
    from tqdm import tqdm

    bars = []

    def stop(*_):
        bars.append(tqdm(total=3, desc="step"))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stop)
    assert cli.main(["eval"]) == 130
    bars.clear()
    assert capsys.readouterr().err.splitlines()[-1].startswith("elastic eval: stopped; to resume, repeat it")

    def fail(*_):
        bars.append(tqdm(total=3, desc="step"))
        raise OSError("no")

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["eval"]) == 2
    bars.clear()
    assert capsys.readouterr().err.splitlines()[-1] == "elastic eval: error: no"


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_one_process_of_a_run_speaks(rank, lines, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setattr(cli, "_run", stop)
    monkeypatch.setattr(cli, "PATIENCE", 0)
    assert cli.main(["fit"]) == 130
    assert capsys.readouterr().err.count("\n") == lines
