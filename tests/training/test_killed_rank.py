"""A run of two processes of which one is killed ends, and resumed it ends with the weights of an unbroken one."""

import time
from pathlib import Path

import pytest
import torch

from tests.helpers.forked import forked_program, forked_ranks, run_command
from tests.helpers.training import ROOT, build_data

# `elastic`, in which the process of rank $DIES sends itself SIGKILL after its third step.
SCRIPT = """
import os
import sys

import torch

from elastic import cli
from tests.helpers import training

if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("DIES") == os.environ.get("LOCAL_RANK", "0"):
        training._arm("step", 3)
    raise SystemExit(cli.main(sys.argv[1:]))
"""
STRATEGIES = {
    "context": ["-c", str(ROOT / "configs/strategy/context.yaml")],
    "fsdp": ["-c", str(ROOT / "configs/strategy/fsdp.yaml"), "--trainer.strategy.context_parallel=1"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def words_of(data: Path, strategy: str) -> list[str]:
    """Four steps, saved after every second one."""
    arguments = ["fit", "-c", str(ROOT / "configs/debug.yaml"), *STRATEGIES[strategy], f"--data.data_dir={data}"]
    arguments += ["--trainer.devices=2", "--trainer.limit_val_batches=0", "--trainer.default_root_dir=run"]
    return [*arguments, "--ckpt_path=last"]


def fit(folder: Path, data: Path, strategy: str) -> None:
    """Run them in `folder`."""
    assert forked_ranks(2, run_command, words_of(data, strategy), folder, folder / "log") == [0, 0]


def fit_and_die(folder: Path, data: Path, strategy: str, rank: int) -> int:
    """Run them as a user would, until one process kills itself; the exit code."""
    (folder / "run.py").write_text(SCRIPT)
    environment = {"MASTER_ADDR": "127.0.0.1", "DIES": str(rank)}
    begun = forked_program(
        words_of(data, strategy), folder, folder / "killed.log", script=folder / "run.py", **environment
    )
    begun.start()
    begun.join(240)
    assert begun.exitcode is not None, (folder / "killed.log").read_text()[-3000:]
    return begun.exitcode


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_killed_on_one_rank_and_resumed(data, tmp_path, strategy):
    folders = [tmp_path / name for name in ("unbroken", "killed")]
    for folder in folders:
        folder.mkdir()
    fit(folders[0], data, strategy)
    began = time.monotonic()
    assert fit_and_die(folders[1], data, strategy, 1) != 0
    assert time.monotonic() - began < 200  # the process that lives does not wait for ever
    assert torch.load(folders[1] / "run/last.ckpt", weights_only=True)["global_step"] == 2
    fit(folders[1], data, strategy)
    one, two = (torch.load(folder / "run/last.ckpt", weights_only=True) for folder in folders)
    assert one["global_step"] == two["global_step"] == 4
    for name, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][name]), name
    files = [(folder / "run/checkpoint/router.safetensors").read_bytes() for folder in folders]
    assert files[0] == files[1]
    assert not list(folders[1].rglob("*.writing"))
