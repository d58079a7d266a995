"""`elastic test` and `elastic predict` find the same on any number of processes and in micro-batches of any size."""

import json
from pathlib import Path

import pytest

from elastic import cli
from elastic.data.shards import read_manifest
from tests.helpers.forked import forked_ranks, run_command
from tests.helpers.training import ROOT, build_data

METHODS = '[dense,streaming,xattention,elastic,"elastic@-2","random:0.7"]'
CUTS = [(processes, rows) for processes in (1, 2) for rows in (1, 2, 8)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = build_data(tmp_path_factory.mktemp("data"), seq_length=112)
    rows = [entry["rows"] for entry in read_manifest(folder)["splits"]["test"].values()]
    assert sum(rows) % 2  # so that two processes read one of them twice
    return folder


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    command("fit", data, folder, "--model.optimiser.lr=0.01", "--trainer.limit_val_batches=0")
    return folder


CONTEXT = ("-c", str(ROOT / "configs" / "strategy" / "context.yaml"))


def command(name: str, data: Path, folder: Path, *more: str, processes: int = 1) -> None:
    given = ["-c", str(ROOT / "configs" / "debug.yaml"), f"--data.data_dir={data}", "--data.rows_per_step=8"]
    given += ["--model.elastic.sparse.stride=4", f"--trainer.default_root_dir={folder}", "--trainer.accelerator=cpu"]
    given += [
        f"--trainer.devices={processes}",
        *(["--trainer.strategy=ddp"] if processes > 1 and "-c" not in more else []),
    ]
    if processes == 1:
        assert cli.main([name, *given, *more]) == 0
    else:
        codes = forked_ranks(processes, run_command, [name, *given, *more], folder, folder / "log")
        assert codes == [0] * processes, (folder / "log").read_text()[-3000:]


def numbers(value, name=""):
    """Every leaf of a result by its path."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = {key: leaf for part, inner in parts for key, leaf in numbers(inner, f"{name}/{part}").items()}
    return found or {name: value}


def of_test(data, run, folder, processes, rows):
    folder.mkdir()
    flags = [f"--ckpt_path={run / 'last.ckpt'}", f"--data.micro_batch_rows={rows}", "--trainer.limit_test_batches=1.0"]
    command("test", data, folder, *flags, f"--model.methods={METHODS}", processes=processes)
    lines = (folder / "samples_test.jsonl").read_text().splitlines()
    results = json.loads((folder / "results_test.json").read_text())
    return numbers({"results": {**results, "checkpoint": ""}, "samples": [json.loads(line) for line in lines]})


def test_the_same_figures_for_any_number_of_processes_and_rows(data, run, tmp_path):
    found = [of_test(data, run, tmp_path / f"{processes}-{rows}", processes, rows) for processes, rows in CUTS]
    assert sum(value for name, value in found[0].items() if name.startswith("/results/tasks/") and "/n" in name) == 16
    assert any("xattention_density" in name for name in found[0])
    largest = 0.0
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            if isinstance(value, float):
                largest = max(largest, abs(other[name] - value))
            else:
                assert other[name] == value, name
    assert largest <= 1e-6  # seen: 9.3e-16


def test_every_sample_is_predicted_once_in_the_order_of_the_data(data, run, tmp_path):
    found = []
    for processes, rows, strategy in ((1, 1, ()), (2, 2, ()), (2, 2, CONTEXT)):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        command("predict", data, folder, f"--ckpt_path={run / 'last.ckpt'}", f"--data.micro_batch_rows={rows}",
                "--trainer.limit_predict_batches=1.0", *strategy, processes=processes)  # fmt: skip
        assert [file.name for file in folder.glob("predictions*")] == ["predictions.jsonl"]
        found.append([json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()])
    assert [len(lines) for lines in found] == [16, 16, 16]
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert {**other, "loss": 0} == {**one, "loss": 0} and other["loss"] == pytest.approx(one["loss"], abs=1e-6)
