"""A killed run ends with the same weights as an unbroken one, and a half-written checkpoint is never picked up."""

import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from elastic import cli
from elastic.training.resume import AtomicCheckpointIO, noise_seed
from tests.helpers.training import ROOT, build_data, fit_process
from tests.test_files import another_writer

STEPS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def arguments(data: Path, steps: int = STEPS) -> list[str]:
    flags = {
        "data.data_dir": data,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": 7,
        "trainer.limit_val_batches": 2,
        "trainer.default_root_dir": "run",
        "trainer.enable_progress_bar": "false",
        "resume_checkpoint.every_n_steps": 4,
        "elastic_checkpoint.every_n_steps": 9,
        "model.optimiser.lr": 0.01,
        "model.optimiser.multiplier_lr": 0.3,
        "ckpt_path": "last",
    }
    return ["-c", str(ROOT / "configs" / "debug.yaml"), *(f"--{key}={value}" for key, value in flags.items())]


def finish(process) -> int:
    """Run a process to its end; its exit code (negative: the signal that killed it)."""
    process.start()
    process.join(timeout=900)
    if process.exitcode is None:
        process.kill()
        pytest.fail("the run hangs")
    return process.exitcode


def final_state(folder: Path) -> dict:
    checkpoint = torch.load(folder / "run" / "last.ckpt", weights_only=True)
    return {key: checkpoint[key] for key in ("global_step", "state_dict", "optimizer_states")}


def assert_bit_equal(one, other, where="") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_bit_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_bit_equal(a, b, f"{where}/{i}")
    else:
        assert one == other, where


def assert_same_end(folder: Path, reference: Path) -> None:
    assert_bit_equal(final_state(folder), final_state(reference))
    weights = Path("run") / "checkpoint" / "router.safetensors"
    assert (folder / weights).read_bytes() == (reference / weights).read_bytes()


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert finish(fit_process(arguments(data), folder)) == 0, (folder / "fit.log").read_text()
    state = final_state(folder)
    assert state["global_step"] == STEPS
    moved = [value for name, value in state["state_dict"].items() if name.endswith("head.4.weight")]
    assert all(value.abs().max() > 0 for value in moved)
    return folder


def test_killed_at_steps_and_in_a_save_ends_bit_equal(data, unbroken, tmp_path):
    """Before the first save, between saves, beyond the first epoch, and half-way through writing a checkpoint."""
    for dies in (("step", 2), ("save", 2), ("step", 23)):
        assert finish(fit_process(arguments(data), tmp_path, dies)) == -signal.SIGKILL, (
            tmp_path / "fit.log"
        ).read_text()
    assert finish(fit_process(arguments(data), tmp_path)) == 0, (tmp_path / "fit.log").read_text()
    assert_same_end(tmp_path, unbroken)
    log = (tmp_path / "fit.log").read_text()
    assert log.count("does not exist yet, starting from the beginning") == 2 and log.count("checkpoint: run/last") == 4


def test_a_finished_run_is_not_trained_further_and_says_so(data, unbroken):
    before, export = final_state(unbroken), (unbroken / "run" / "checkpoint" / "elastic.json").stat()
    assert finish(fit_process(arguments(data), unbroken)) == 0
    assert_bit_equal(final_state(unbroken), before)
    said = (unbroken / "fit.log").read_text().splitlines()[-1]
    assert said == "nothing left to train: 30 of 30 steps are done; the routers are in run/checkpoint"
    assert (unbroken / "run" / "checkpoint" / "elastic.json").stat() == export


def test_killed_between_the_last_save_and_the_export_the_same_command_exports(data, tmp_path):
    """Also where an export of an earlier step is there (every 9 of 12 steps), is damaged, or was removed."""
    metadata = tmp_path / "run" / "checkpoint" / "elastic.json"

    def exported():
        return json.loads(metadata.read_text())["recipe"]["step"] if metadata.is_file() else None

    assert finish(fit_process(arguments(data, 12), tmp_path, ("export", 2))) == -signal.SIGKILL
    assert final_state(tmp_path)["global_step"] == 12 and exported() == 9
    assert finish(fit_process(arguments(data, 12), tmp_path)) == 0 and exported() == 12
    weights = (metadata.parent / "router.safetensors").read_bytes()
    for damage in (lambda: metadata.write_text("{"), lambda: shutil.rmtree(metadata.parent)):
        damage()
        assert finish(fit_process(arguments(data, 12), tmp_path)) == 0 and exported() == 12
        assert (metadata.parent / "router.safetensors").read_bytes() == weights


@pytest.fixture(scope="module")
def begun(data, tmp_path_factory):
    """A run of six steps, to be resumed."""
    folder = tmp_path_factory.mktemp("begun")
    assert cli.main(["fit", *resumed(data, folder, 6)]) == 0
    return folder / "run"


def resumed(data, folder, steps, *more):
    return [*arguments(data, steps), f"--trainer.default_root_dir={folder / 'run'}", *more]


CHANGES = [
    ((9, ()), ("trainer.max_steps 6 -> 9", "the routers' rate goes from 0 to 0.0031 at step 6")),
    ((6, ("--model.optimiser.warmup=0.5",)), ("model.optimiser.warmup 0.2 -> 0.5",)),
    ((6, ("--model.optimiser.multiplier_lr=0.5",)), ("model.optimiser.multiplier_lr 0.3 -> 0.5",)),
    ((6, ("--model.temperature.final=0.5",)), ("model.temperature.final 0.3 -> 0.5",)),
]


@pytest.mark.parametrize(("given", "said"), CHANGES, ids=[said[0].split()[0] for _, said in CHANGES])
def test_what_was_changed_since_the_run_began_is_said(given, said, data, begun, tmp_path, capsys):
    shutil.copytree(begun, tmp_path / "run")
    capsys.readouterr()
    steps, more = given
    assert cli.main(["fit", *resumed(data, tmp_path, steps, *more)]) == 0
    error = capsys.readouterr().err
    assert "resumed with other settings than the run began with: " in error
    for part in said:
        assert part in error, error


def test_nothing_is_said_where_nothing_was_changed(data, begun, tmp_path, capsys):
    shutil.copytree(begun, tmp_path / "run")
    capsys.readouterr()
    assert cli.main(["fit", *resumed(data, tmp_path, 6)]) == 0
    assert "resumed with other settings" not in capsys.readouterr().err


LATER = ("top_k", "chunk", "min_budget")  # settings of the sparse pattern that came after the first ones


@pytest.mark.parametrize("lacking", [LATER[:1], LATER, (*LATER, "threshold")])
def test_a_run_from_before_a_setting_of_the_pattern_is_resumed(lacking, data, begun, tmp_path, capsys):
    """It ran with the setting's default; another value is another run."""
    shutil.copytree(begun, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    for name in lacking:
        del checkpoint["elastic"]["sparse"][name]
    torch.save(checkpoint, tmp_path / "run" / "last.ckpt")
    assert cli.main(["fit", *resumed(data, tmp_path, 6, "--model.elastic.sparse.top_k=3")]) == 2
    assert "'top_k': None" in capsys.readouterr().err
    assert cli.main(["fit", *resumed(data, tmp_path, 9)]) == 0
    assert final_state(tmp_path)["global_step"] == 9


@pytest.mark.parametrize("left", ["both", "last.ckpt", "checkpoint"])
@pytest.mark.parametrize("given", [None, "other"])
def test_a_used_folder_is_not_trained_over(given, left, data, begun, tmp_path, capsys):
    """Neither afresh nor from another run's checkpoint."""
    shutil.copytree(begun, tmp_path / "run")
    for name in {"last.ckpt", "checkpoint"} - {left} if left != "both" else ():
        (shutil.rmtree if name == "checkpoint" else os.remove)(tmp_path / "run" / name)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    flags = [flag for flag in resumed(data, tmp_path, 6) if "ckpt_path" not in flag]
    flags += [] if given is None else [f"--ckpt_path={begun / 'last.ckpt'}"]
    capsys.readouterr()
    assert cli.main(["fit", *flags]) == 2
    error = capsys.readouterr().err
    assert "run holds a run already" in error and "resume it with --ckpt_path last" in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()} == before


def test_the_runs_own_checkpoint_may_be_given_by_its_path(data, begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    assert cli.main(["fit", *resumed(data, tmp_path, 6, f"--ckpt_path={tmp_path / 'run' / 'last.ckpt'}")]) == 0


def test_the_bar_counts_the_steps_of_the_run(data, tmp_path, capsys):
    """Also beyond an epoch, which has 16, and from where a run resumes; in epochs where the run counts in them."""

    def shown(steps, *more):
        flags = [flag for flag in resumed(data, tmp_path, steps, *more) if "progress_bar" not in flag]
        capsys.readouterr()
        assert cli.main(["fit", *flags]) == 0
        return [(int(n), int(of)) for n, of in re.findall(r"steps: .*? (\d+)/(\d+) \[", capsys.readouterr().out)]

    first, second = shown(20), shown(24)
    assert (
        {of for _, of in first} == {20} and first[-1][0] == 20 and [n for n, _ in first] == sorted(n for n, _ in first)
    )
    assert {of for _, of in second} == {24} and second[0][0] == 20 and second[-1][0] == 24
    other = ("--trainer.max_epochs=1", f"--trainer.default_root_dir={tmp_path / 'other'}")
    assert shown(-1, *other) == []


def test_a_checkpoint_is_complete_or_absent(tmp_path, monkeypatch):
    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"state_dict": {}, "step": 1}, path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        writer.save_checkpoint({"step": 2}, path)
    assert writer.load_checkpoint(path, weights_only=True) == {"state_dict": {}, "step": 1}
    with pytest.raises(ValueError, match="storage_options=\\{\\} is not supported"):
        writer.save_checkpoint({}, path, {})


def test_a_full_disk_leaves_the_old_checkpoint_and_names_it(tmp_path, monkeypatch):
    writer, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"state_dict": {}, "step": 1}, path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*last\.ckpt'$"):
        writer.save_checkpoint({"state_dict": {}, "step": 2}, path)
    assert writer.load_checkpoint(path)["step"] == 1 and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_under_the_log_is_one_line_with_the_folder(data, tmp_path, monkeypatch, capsys):
    """TensorBoard writes in a thread of its own; its error comes without a file's name."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "flush", full)
    assert cli.main(["fit", *resumed(data, tmp_path, 6)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1] == f"elastic fit: error: [Errno 28] No space left on device: '{tmp_path / 'run'}'"
    assert "Traceback" not in error


def test_two_runs_of_one_folder_are_refused_at_once(data, tmp_path, capsys):
    """Both would write last.ckpt, one after the other."""
    with another_writer(tmp_path / "run") as first:
        assert cli.main(["fit", *resumed(data, tmp_path, 6)]) == 2
        assert f"run is being written by process {first.pid} on " in capsys.readouterr().err
        assert cli.main(["demo", "--tiny", "--out", str(tmp_path / "run")]) == 2
        assert f"run is being written by process {first.pid} on " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_a_link_stays_one(tmp_path):
    """Also on another disk, and where the run's folder is the link."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "run")
    link, target = tmp_path / "run" / "last.ckpt", tmp_path / "disk" / "kept.ckpt"
    link.symlink_to(target)
    writer = AtomicCheckpointIO()
    for step, given in enumerate((link, tmp_path / "linked" / "last.ckpt")):
        writer.save_checkpoint({"state_dict": {}, "step": step}, given)
        assert link.is_symlink() and not target.is_symlink()
        assert writer.load_checkpoint(link)["step"] == writer.load_checkpoint(target)["step"] == step
    assert [path.name for path in link.parent.iterdir()] == ["last.ckpt"]


class Planted:
    """Unpickled, it makes the file `ran`."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("asked", [None, False, True])
def test_a_checkpoint_is_read_as_tensors_alone_whatever_is_asked(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "planted": Planted()}, "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged or was not written by `elastic fit`"):
        AtomicCheckpointIO().load_checkpoint("last.ckpt", weights_only=asked)
    assert not Path("ran").exists()


@pytest.mark.parametrize("address", ["http://127.0.0.1:{port}/x.ckpt", "https://a.example/x", "file:///x", "s3://a/x"])
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_no_checkpoint_is_fetched_from_an_address(address, command, data, tmp_path, monkeypatch, capsys):
    """Not even asked for: nobody comes to the port."""
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        given = address.format(port=server.getsockname()[1])
        flags = ["-c", "debug", f"--data.data_dir={data}", f"--ckpt_path={given}"]
        assert cli.main([command, *flags]) == 2
        with pytest.raises(TimeoutError):
            server.accept()
    assert f"--ckpt_path {given} is an address; checkpoints are local files" in capsys.readouterr().err


DAMAGE = {"empty": lambda whole: b"", "cut": lambda whole: whole[: len(whole) // 2], "text": lambda whole: b"hello"}


@pytest.mark.parametrize("kind", [*DAMAGE, "list"])
def test_a_damaged_checkpoint_is_named(kind, tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save([1] if kind == "list" else {"state_dict": {}}, path)
    if kind in DAMAGE:
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
    with pytest.raises(ValueError, match=r"last\.ckpt (is damaged or )?was not written by `elastic fit`") as caught:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"none: no such file; expected `last` or the last\.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "none")


def test_noise_seeds_differ_by_every_part_and_stay_the_same():
    seeds = {noise_seed(a, b, c, d) for a in range(4) for b in range(4) for c in range(4) for d in range(4)}
    assert len(seeds) == 256 and all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(0, 1, 2, 3) == 1600451676917365778


@pytest.mark.slow
def test_killed_at_ten_random_moments_ends_bit_equal(data, tmp_path):
    """Of a start, and, every second time, of the steps and the writing after a save."""
    steps, rng = 60, random.Random(int(os.environ.get("KILL_SEED", "0")))
    reference, broken = tmp_path / "reference", tmp_path / "broken"
    reference.mkdir()
    broken.mkdir()
    started = time.monotonic()
    assert finish(fit_process(arguments(data, steps), reference)) == 0
    whole = time.monotonic() - started
    file, saved = broken / "run" / "last.ckpt", []
    for kill in range(10):
        process, before = fit_process(arguments(data, steps), broken), written(file)
        process.start()
        while kill % 2 and written(file) == before and process.is_alive():
            time.sleep(0.001)
        process.join(timeout=rng.uniform(0, 0.04) * whole)
        assert process.exitcode is None, (broken / "fit.log").read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        saved.append(torch.load(file, weights_only=True)["global_step"] if file.is_file() else 0)
    assert sorted(set(saved[1::2])) == saved[1::2]  # more after each
    assert finish(fit_process(arguments(data, steps), broken)) == 0
    assert_same_end(broken, reference)


def written(file: Path) -> int | None:
    return file.stat().st_mtime_ns if file.is_file() else None
