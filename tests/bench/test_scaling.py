"""`elastic bench training --devices N`: two processes on the CPU under every strategy; table and picture; how much of a
step is communication.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import pytest

from elastic import cli
from elastic.bench import records, scaling, step, tables
from elastic.bench.drawing import figures
from elastic.bench.records import Measurement
from elastic.bench.scaling import communication, run
from elastic.bench.scaling_tables import HEADER, scaling_cells
from elastic.bench.training import add_arguments
from tests.helpers.forked import forked_ranks, say_to
from tests.training import several_gpus


def measure(place: Path) -> None:
    """What `elastic bench training --devices 2` and `tests.training.several_gpus` do, on shapes that a CPU can run."""
    say_to(place / "log")
    os.chdir(place)
    several_gpus.for_cpu()
    step.SHAPES["qwen3-4b"].update(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=99)
    scaling.WARM_UP = 256
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["--devices", "2", "--length", "1152", "--msr", "0.5", "--backbones", "qwen3-4b", "--steps", "1"]
    run(parser.parse_args([*words, "--out", "."]), "elastic bench training --devices 2")
    raise SystemExit(several_gpus.main(Path("gradients.json")))


def compiled_gradients(place: Path) -> None:
    say_to(place / "log")
    several_gpus.for_cpu()
    raise SystemExit(several_gpus.main(place / "gradients.json", compiled=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes wrote what they measured."""
    place = tmp_path_factory.mktemp("scaling")
    assert forked_ranks(2, measure, place, CUDA_VISIBLE_DEVICES="") == [0, 0], (place / "log").read_text()[-3000:]
    return place


def test_records_of_two_processes(folder: Path) -> None:
    found = records.load(folder / "training.json")
    value = {(r["who"], r["metric"]): r["value"] for r in found}
    assert {r["case"] for r in found} == {"qwen3-4b-1k"}
    assert [who for who, metric in value if metric == "step time"] == [
        "1 GPU", "2 GPUs, ddp", "2 GPUs, fsdp", "2 GPUs, context",
    ]  # fmt: skip
    for who, rows in (("1 GPU", 1), ("2 GPUs, ddp", 2), ("2 GPUs, fsdp", 2), ("2 GPUs, context", 1)):
        assert value[who, "MSR"] == 0.5
        assert value[who, "speed"] == pytest.approx(1152 * rows / value[who, "step time"] * 1e3, rel=1e-3)
        if rows > 1 or "context" in who:
            together = 2 * value["1 GPU", "speed"]
            assert value[who, "scaling efficiency"] == pytest.approx(value[who, "speed"] / together, rel=1e-3)


def test_gradients_under_every_strategy_are_those_of_one_process(folder: Path) -> None:
    same_gradients(folder)


def same_gradients(folder: Path) -> None:
    found = json.loads((folder / "gradients.json").read_text())
    different = found["relative difference"]
    assert different["ddp"] <= 1e-6 and different["fsdp"] <= 1e-6 and different["context"] <= 1e-5
    assert found["same routes"]


def test_compiled_layers_have_the_same_gradients_under_every_strategy(tmp_path: Path) -> None:
    codes = forked_ranks(2, compiled_gradients, tmp_path, CUDA_VISIBLE_DEVICES="")
    assert codes == [0, 0], (tmp_path / "log").read_text()[-3000:]
    same_gradients(tmp_path)


def test_communication_is_told_from_what_it_is_hidden_behind() -> None:
    kernels = [
        ("ncclDevKernel_AllReduce", 0.0, 4.0), ("gemm", 1.0, 2.0), ("gemm", 1.5, 3.0), ("copy", 3.5, 3.75),
        ("ncclDevKernel_SendRecv", 6.0, 7.0), ("gemm", 5.0, 6.0), ("ncclDevKernel_AllGather", 6.5, 8.0),
        ("copy", 7.5, 9.0),
    ]  # fmt: skip
    busy, exposed = communication(kernels)
    assert busy == pytest.approx(6.0)  # 0-4 and 6-8
    assert exposed == pytest.approx(6.0 - 2.0 - 0.25 - 0.5)
    assert communication([("gemm", 0.0, 1.0)]) == (0.0, 0.0)
    assert communication([("ncclKernel", 0.0, 1.0)]) == (1.0, 1.0)


STAMP = {"gpu": "G", "kernel": "k", "versions": {}, "commit": "c", "command": "elastic bench training --devices 2"}


def made(strategy: str, devices: int, sliced: int = 1, **figures: float) -> list[Measurement]:
    who = "1 GPU" if strategy == "one" else f"{devices} GPUs, {strategy}"
    about = {"case": "m-64k", "who": who, "strategy": strategy, "devices": devices, "sliced": sliced, **STAMP}
    return [{**about, "metric": name.replace("_", " "), "value": value, "unit": ""} for name, value in figures.items()]


def test_table_and_picture() -> None:
    found = made("one", 1, step_time=7500.0, speed=8738.0, peak_allocated=44.4, MSR=0.7)
    found += made("context", 2, 2, step_time=4000.0, speed=16384.0, scaling_efficiency=0.9375, communication=0.081,
                  exposed_communication=0.08, peak_allocated=25.0, MSR=0.7)  # fmt: skip
    assert scaling_cells(found) == (
        HEADER,
        [
            ["m-64k", "1", "", "7.50", "8738", "", "", "", "44.4", "0.700"],
            ["m-64k", "2", "context, 2 share a row", "4.00", "16384", "0.938", "8.1%", "8.0%", "25.0", "0.700"],
        ],
    )
    assert "| m-64k | 2 | context, 2 share a row | 4.00 |" in tables.markdown({"scaling": found})
    speed, memory = figures(found)[""].axes
    assert speed.lines[0].get_xdata().tolist() == [1.0, 2.0] and speed.lines[0].get_ydata().tolist() == [8738, 16384]
    assert memory.lines[0].get_ydata().tolist() == [44.4, 25.0]


BAD: list[tuple[list[str], str]] = [
    (["--steps", "0"], "expected at least one step"),
    (["--context-parallel", "2", "--devices", "3"], "groups that divide the devices"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options: list[str], message: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(ValueError, match=message):
        run(parser.parse_args(["--devices", "2", *options]), "command")


def test_without_a_gpu_it_says_so(capsys: Any) -> None:
    assert cli.main(["bench", "training", "--devices", "2"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
