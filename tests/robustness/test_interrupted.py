"""Ctrl-C and SIGKILL at random moments of the long commands: after the first one line that says how to resume, exit
code 130 and no process left; after either, the same command again ends with the bytes of an undisturbed run.

`ELASTIC_MOMENTS=50 python -m pytest -n 0 -s tests/robustness/test_interrupted.py` tries that many moments of each
command; `KILL_SEED` draws others.
"""

import io
import multiprocessing
import os
import random
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from elastic import cli
from elastic.commands import catalogue
from tests.helpers.forked import forked, say_to
from tests.helpers.processes import gone
from tests.helpers.training import build_data

MOMENTS = int(os.environ.get("ELASTIC_MOMENTS", "2"))
SEED = int(os.environ.get("KILL_SEED", "0"))
MIXTURE = """
backbone: tiny
seq_length: 128
tokens: {train: 12000, test: 2000}
sources:
  near: {path: "records/{split}/single_qa.jsonl"}
  pattern: {path: "records/{split}/in_context.jsonl"}
context: [64, 100]
part_tokens: 500
"""
FIT = (
    "--trainer.max_steps=12 --trainer.val_check_interval=5 --trainer.limit_val_batches=2 --model.optimiser.lr=0.01 "
    "--trainer.default_root_dir=out --resume_checkpoint.every_n_steps=3 --elastic_checkpoint.every_n_steps=4"
)
ROWS = "--sink 4 --window 16 --block 4 --samples 18 --lengths 60,100 --batch-tokens 300"


@dataclass(frozen=True)
class Command:
    """A command line, and the folders or files that it writes."""

    line: str
    written: tuple[str, ...]

    @property
    def words(self):
        return self.line.split()

    @property
    def way(self):
        name = self.words[0]
        return catalogue.RESUMED.get(name) or catalogue.RESUMED.get(" ".join(self.words[:2])) or "repeated, it begins"


COMMANDS = {
    "build_mixture": Command("data_prep build_mixture --language tiny --per-task 600 --words 200 --out out", ("out",)),
    "tokenize_and_pack": Command(
        "data_prep tokenize_and_pack --records records --backbone tiny --seq-length 128 --out out", ("out",)
    ),
    "pack_mixture": Command("data_prep pack_mixture mixture.yaml --out out --workers 2", ("out",)),
    "fit": Command(
        f"fit -c debug --data.data_dir=data {FIT} --ckpt_path=last",
        ("out/last.ckpt", "out/checkpoint/router.safetensors"),
    ),
    "calibrate": Command(f"calibrate --backbone tiny {ROWS} --out out.json", ("out.json",)),
    "eval": Command(
        "eval --backbone tiny --tasks ruler_fwe ruler_vt --lengths 768 --limit 2 --batch-size 2 --out out "
        "--methods dense streaming --sink 4 --window 16 --block 4",
        ("out/samples", "out/summary.json"),
    ),
}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with what the commands read."""
    folder = tmp_path_factory.mktemp("given")
    build_data(folder, per_task=150)
    (folder / "mixture.yaml").write_text(MIXTURE)
    return folder


def fresh(given, folder):
    folder.mkdir()
    for path in given.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def begin(command, folder):
    """The command in a session of its own, as of a terminal, just begun."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    process = forked(work, command.words, folder)
    process.start()
    while not log.exists() and process.is_alive():
        time.sleep(0.01)
    return process


def work(words, folder):
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as without this server
    os.chdir(folder)
    say_to(folder / "log")
    code = cli.main(words)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows is multiprocessing's
    raise SystemExit(code)


def ended(process, folder):
    """The exit code; no process is left in its session."""
    process.join(120)
    left = not gone(process.pid)  # ends it
    assert not left, f"a process is left\n{(folder / 'log').read_text()[-3000:]}"
    return process.exitcode


def complete(process, command, folder):
    """What the command has written, by name."""
    assert ended(process, folder) == 0, (folder / "log").read_text()[-3000:]
    files = [path for name in command.written for path in [folder / name, *(folder / name).rglob("*")]]
    found = {str(path.relative_to(folder)): path for path in files if path.is_file()}
    assert found
    return {name: READERS.get(path.suffix, Path.read_bytes)(path) for name, path in found.items()}


def trained(path):
    """Step, weights and optimiser of a run, in bytes; what Lightning adds says how often the run was begun."""
    found = torch.load(path, weights_only=True)
    torch.save({key: found[key] for key in ("global_step", "state_dict", "optimizer_states")}, whole := io.BytesIO())
    return whole.getvalue()


def untimed(path):
    """Figures without those that measure time."""
    return re.sub(r'"(task|prefill)_seconds": [^,}]+', "", path.read_text())


READERS = {".ckpt": trained, ".json": untimed, ".jsonl": untimed}


def stray(folder, usual):
    return sorted(path.name for path in folder.iterdir() if path.name not in usual)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_stopped_or_killed_command_ends_with_the_same_bytes_when_repeated(name, given, tmp_path):
    if name == "eval":
        pytest.importorskip("lm_eval")
        pytest.importorskip("wonderwords")
    command, rng = COMMANDS[name], random.Random(f"{name} {SEED}")
    undisturbed = begin(command, fresh(given, tmp_path / "wanted"))
    began = time.monotonic()
    wanted = complete(undisturbed, command, tmp_path / "wanted")
    whole, usual = time.monotonic() - began, {path.name for path in (tmp_path / "wanted").iterdir()}
    stopped = finished = 0
    for number in range(MOMENTS):
        how = (signal.SIGINT, signal.SIGKILL)[number % 2]
        folder, moment = fresh(given, tmp_path / f"{number}"), rng.uniform(0.0, 1.0) * whole
        process = begin(command, folder)
        process.join(moment)
        if process.exitcode is None:
            end(process, how)
        begun = time.monotonic()
        code, where = ended(process, folder), f"{name}: {how.name} after {moment:.2f} of {whole:.2f} s, seed {SEED}"
        said = (folder / "log").read_text()
        assert code in ((0, 130) if how == signal.SIGINT else (0, -signal.SIGKILL)), f"{where}\n{said[-3000:]}"
        if code == 130:
            assert "Traceback" not in said and said.count(": stopped; ") == 1, f"{where}\n{said[-3000:]}"
            line = said.replace("\r", "\n").splitlines()[-1]
            assert f"elastic {command.words[0]}: stopped; {command.way}" in line, f"{where}\n{said[-3000:]}"
        assert how == signal.SIGKILL or time.monotonic() - begun < 30, where
        stopped, finished = stopped + (code != 0), finished + (code == 0)
        assert complete(begin(command, folder), command, folder) == wanted, where
        assert not stray(folder, usual), where
    print(f"{name}: {stopped} stopped or killed, {finished} had finished, {whole:.1f} s each")  # noqa: T201 - with -s


def end(process, how):
    """Ctrl-C reaches all processes of the command; SIGKILL the first alone, whose end the others notice."""
    with suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, how) if how == signal.SIGINT else process.kill()
