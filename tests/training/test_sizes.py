"""Sizes from a GPU's memory: what fits is chosen, the fastest first; what is given stays; a CPU keeps its defaults."""

from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from transformers import BloomConfig, GPT2Config

from elastic import cli
from elastic.commands import calibrate, calibration_data
from elastic.commands import training_sizes as of_run
from elastic.data.shards import row_tokens
from elastic.model.memory import Shape
from elastic.training.sizes import GIB, Backbone, Room, calibration_sizes, choose, training_sizes
from tests.helpers.training import build_data
from tests.test_configs import build

# Bytes of a token: 32 layers keep 139,264 each, or 8,192 each and one of them everything; 118,784 of work beside that.
LLAMA = Shape("llama", 8_030_261_248, 32, 4096, 10240, 8192, 14336, 0, 128256, 32, 0, False)
WEIGHTS, LOGITS, LEAN, PLAIN = 16_060_522_496, 20 * 128256, 32 * 8192 + 258_048, 32 * 139_264 + 118_784
BACKBONE = Backbone(LLAMA, 2)
OPEN = {"micro_batch_rows": None, "gradient_checkpointing": None, "loss_chunk": None}


def room(needed):
    """A GPU that holds so many bytes of a step and not one more."""
    return Room(int(needed * 1.1) + GIB + 1, "a GPU")


def sizes(free, row=8192, rows=8, slices=1, **given):
    found, line = training_sizes(BACKBONE, Room(int(free), "a GPU"), row, rows, {**OPEN, **given}, slices)
    return (*found.values(), line)


def test_the_fastest_that_fits_is_chosen():
    """Without recomputation rather than with it, then as many rows as fit and divide a step, to 65536 tokens."""

    def free(rows, a_token):
        return room(WEIGHTS + rows * 8192 * a_token + LOGITS * 1024).free

    assert sizes(free(8, PLAIN))[:3] == (8, False, 1024)
    assert sizes(free(8, PLAIN) - 2 * GIB)[:3] == (4, False, 1024)
    assert sizes(free(1, PLAIN))[:3] == (1, False, 1024)
    assert sizes(free(1, PLAIN) - 2 * GIB)[:3] == (8, True, 1024)
    assert sizes(free(4, LEAN))[:2] == (4, True)
    assert sizes(140 * GIB, row=65536)[:3] == (1, True, 1024), "without recomputation it takes 290 GiB"
    assert sizes(80 * GIB)[:3] == (1, False, 1024) and sizes(24 * GIB)[:2] == (1, True)


def test_rows_divide_a_step_and_stay_below_64k_tokens():
    assert sizes(1000 * GIB, rows=6)[0] == 6 and sizes(1000 * GIB, rows=6, row=16384)[0] == 3
    assert sizes(1000 * GIB, row=65536)[0] == sizes(1000 * GIB, row=100_000)[0] == 1
    assert sizes(1000 * GIB, row=65536, slices=4)[0] == 4, "a row that four processes share is a quarter each"


def test_logits_take_little_of_the_memory():
    for chunk in (1024, 512, 256, 128):
        assert sizes(16 * LOGITS * chunk)[2] == chunk
    assert sizes(1)[2] == 128


def test_what_is_given_stays():
    *found, line = sizes(140 * GIB, micro_batch_rows=2, gradient_checkpointing=True, loss_chunk=64)
    assert found == [2, True, 64] and line.count("(given)") == 3
    *found, line = sizes(140 * GIB, gradient_checkpointing=True)
    assert found == [8, True, 1024] and line.count("(given)") == 1
    assert sizes(1, micro_batch_rows=4)[0] == 4


def test_the_line_has_the_memory_by_parts():
    line = sizes(140 * GIB, row=65536)[-1]
    total = WEIGHTS + 65536 * LEAN + LOGITS * 1024
    assert line == (
        "sizes for rows of 65536 tokens: micro_batch_rows 1, gradient_checkpointing true, loss_chunk 1024; about "
        f"{total / GIB:.1f} GiB of 140.0 on a GPU (weights 15.0, kept 24.5, working 7.2, logits 2.4)"
    )
    assert "more than fits by this estimate, -c strategy/fsdp" in sizes(20 * GIB, row=65536)[-1]


def test_where_nothing_fits_the_leanest_is_taken():
    candidates = list(BACKBONE.passes((8192, 1024), (False, True), 128))
    assert choose(candidates, Room(0, "")) == candidates[3]
    assert sizes(1, rows=4)[:3] == (1, True, 128)


def test_batches_of_a_calibration():
    """The usual batches as long as they fit, with recomputation before smaller ones."""

    def found(needed, longest=4096, **given):
        sizes, _ = calibration_sizes(
            BACKBONE, room(needed), longest, {"batch_tokens": None, "checkpointing": None, **given}
        )
        return tuple(sizes.values())

    chunk = LOGITS * 1024
    assert found(WEIGHTS + 32768 * PLAIN + chunk) == (32768, False)
    assert found(WEIGHTS + 32768 * LEAN + chunk) == (32768, True)
    assert found(WEIGHTS + 32768 * LEAN + chunk - 1e9) == (16384, True)
    assert found(0) == (4096, True) and found(0, longest=40000) == (40000, True)
    assert found(0, batch_tokens=7, checkpointing=False) == (7, False)


def gpus(monkeypatch, count=1, free=100 * GIB, total=140 * GIB):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total))


def trainer(**changes):
    return {"accelerator": "auto", "devices": "auto", "num_nodes": 1, "strategy": "auto", **changes}


def test_the_gpus_of_a_run(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    gpus(monkeypatch, 4)
    for devices, found in (("auto", 4), (1, 1), (2, 2), (-1, 4), ("2", 2), ([3], 1), ("1,3", 2)):
        assert len(of_run.gpus_of(trainer(devices=devices))) == found
    assert of_run.gpus_of(trainer(devices=[3])) == [3]
    assert of_run.gpus_of(trainer(accelerator="cpu")) == []
    assert (Room.of([3]).free, Room.of([0, 1]).free) == (100 * GIB, 140 * GIB), "several must agree"
    for devices in ([4], [-1], "0,7", [0, 4], "two", "1,x", ","):
        assert of_run.gpus_of(trainer(devices=devices)) == [], "the trainer says that there is none"
    gpus(monkeypatch, 0)
    assert of_run.gpus_of(trainer()) == []


def test_weights_and_rows_are_shared_by_the_strategy():
    fsdp = {"class_path": "elastic.training.sharding.ShardedBackbone", "init_args": {"context_parallel": 2}}
    context = {"class_path": "elastic.training.sharding.ContextParallel", "init_args": {}}
    assert of_run.shared(trainer(strategy="ddp"), 8) == (1, 1)
    assert of_run.shared(trainer(strategy=fsdp, num_nodes=2), 8) == (16, 2)
    assert of_run.shared(trainer(strategy=context), 8) == (1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def settings(data, **model):
    model = {"backbone": "tiny", "gguf_file": None, "dtype": "bfloat16", **OPEN, **model}
    own = {"data_dir": str(data), "rows_per_step": 8, "micro_batch_rows": None}
    return {"model": model, "data": own, "trainer": trainer()}


def test_a_run_is_told_its_sizes(data, monkeypatch):
    gpus(monkeypatch)
    config = settings(data)
    line = of_run.choose_sizes(config)
    assert line.startswith(
        "sizes for rows of 128 tokens: micro_batch_rows 8, gradient_checkpointing false, loss_chunk 1024"
    )
    assert config["data"]["micro_batch_rows"] == 8 and config["model"]["gradient_checkpointing"] is False
    config = settings(data, gradient_checkpointing=True, loss_chunk=5)
    of_run.choose_sizes(config)
    assert (config["model"]["gradient_checkpointing"], config["model"]["loss_chunk"]) == (True, 5)
    config["data"]["micro_batch_rows"] = 3
    assert of_run.choose_sizes(config) is None, "nothing is left to choose"
    assert of_run.choose_sizes(settings(data.parent)) is None and row_tokens(data.parent) is None
    gpus(monkeypatch, 0)
    config = settings(data)
    assert of_run.choose_sizes(config) is None and config["data"]["micro_batch_rows"] is None


def test_a_cpu_keeps_the_defaults(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli = build("--data.data_dir", str(data), "--trainer.accelerator", "cpu", "--trainer.devices", "1")
    assert (cli.datamodule.micro_batch_rows, cli.model.gradient_checkpointing, cli.model.loss_chunk) == (1, False, 1024)


def test_families_that_are_not_supported_are_refused_by_name():
    for config in (GPT2Config(), BloomConfig()):
        with pytest.raises(ValueError, match=f"family '{config.model_type}' is not supported; tested families are co"):
            Shape.of(config)


def arguments(*more):
    args = calibrate.build_parser().parse_args(["tiny", "--sink", "4", "--window", "16", "--block", "4", *more])
    return args, calibrate.read_target(args)


def test_the_sizes_of_a_calibration(data, monkeypatch):
    args, target = arguments()
    assert calibration_data.choose_sizes(args, target) is None
    assert (args.batch_tokens, args.checkpointing, target.dtype) == (32768, None, "float32")
    gpus(monkeypatch)
    args, target = arguments("--device", "cuda")
    line = calibration_data.choose_sizes(args, target)
    assert line.startswith("sizes for samples up to 135 tokens: batch_tokens 32768, checkpointing false; about ")
    assert (args.batch_tokens, args.checkpointing, target.dtype) == (32768, False, "bfloat16")
    args, target = arguments("--device", "cuda", "--batch-tokens", "99", "--data", str(data), "--dtype", "float32")
    assert "up to 128 tokens: batch_tokens 99 (given)" in calibration_data.choose_sizes(args, target)
    assert target.dtype == "float32"
    with pytest.raises(ValueError, match="--devices 2 is more than the 1 CUDA GPUs that torch sees"):
        calibration_data.choose_sizes(*arguments("--device", "cuda", "--devices", "2"))
    args, target = arguments("--device", "cuda", "--batch-tokens", "99", "--no-checkpointing", "--devices", "2")
    assert calibration_data.choose_sizes(args, target) is None


def test_two_names_are_one_too_many():
    with pytest.raises(ValueError, match="two backbones are named, tiny and --backbone smollm2-135m; name one"):
        arguments("--backbone", "smollm2-135m")
    assert isinstance(arguments("--backbone", "tiny")[0], Namespace)


@pytest.mark.parametrize(("name", "value"), [("devices", "two"), ("accelerator", "tpu")])
def test_what_no_trainer_can_be_made_with_is_told_in_one_line(name, value, data, tmp_path, capsys):
    folder = f"--trainer.default_root_dir={tmp_path}"
    assert cli.main(["fit", "-c", "tiny", f"--data.data_dir={data}", folder, f"--trainer.{name}={value}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no trainer can be made with {'accelerator': " in line and f"'{name}': '{value}'" in line
