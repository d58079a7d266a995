"""Sizes that a training command leaves open, chosen by the memory of its GPUs. On the CPU they keep their defaults."""

import os
from typing import Any

from elastic.data.shards import row_tokens
from elastic.model.loading import backbone_config

SECTIONS = {"micro_batch_rows": "data", "gradient_checkpointing": "model", "loss_chunk": "model"}


def choose_sizes(config: Any) -> str | None:
    """Fill in the sizes of a run's settings that are None, and say so in a line; None where none is open, where no GPU
    is used, or where the data is missing, which the data module reports.

    Args:
        config: settings of one command: `model`, `data` and `trainer`.

    Raises:
        FileNotFoundError, ValueError: no such backbone, or one whose configuration cannot be read.
    """
    given = {name: config[section][name] for name, section in SECTIONS.items()}
    tokens, gpus = row_tokens(config["data"]["data_dir"]), gpus_of(config["trainer"])
    if None not in given.values() or not gpus or tokens is None:
        return None
    from elastic.model.memory import Shape
    from elastic.training.sizes import Backbone, Room, training_sizes

    shards, slices = shared(config["trainer"], len(gpus))
    shape = Shape.of(backbone_config(config["model"]["backbone"], gguf_file=config["model"]["gguf_file"]))
    backbone = Backbone(shape, 4 if config["model"]["dtype"] == "float32" else 2, shards)
    sizes, told = training_sizes(backbone, Room.of(gpus), tokens, config["data"]["rows_per_step"], given, slices)
    for name, value in sizes.items():
        config[SECTIONS[name]][name] = value
    return told


def gpus_of(trainer: Any) -> list[int]:
    """The GPUs of this machine that a trainer's settings name; none where it runs on the CPU, or where one that is not
    there is named, which the trainer says.
    """
    try:
        found, there = _named_gpus(trainer)
    except ValueError:  # no numbers
        return []
    return found if set(found) <= set(there) else []


def _named_gpus(trainer: Any) -> tuple[list[int], list[int]]:
    """Those that the settings name, and all of this machine.

    Raises:
        ValueError: something else than numbers.
    """
    import torch

    if trainer["accelerator"] not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return [], []
    devices, there = trainer["devices"], list(range(torch.cuda.device_count()))
    if isinstance(devices, list):
        return [int(device) for device in devices], there
    if isinstance(devices, str) and devices not in ("auto", "-1"):
        named = [int(part) for part in devices.split(",") if part.strip()]
        return (named if "," in devices else there[: named[0]]), there
    count = len(there) if devices in ("auto", "-1", -1) else int(devices)
    alone = count == 1 and int(os.environ.get("WORLD_SIZE", "1")) == 1 and trainer["num_nodes"] == 1
    return (there[:count] if count > 1 or alone else there), there


def shared(trainer: Any, gpus: int) -> tuple[int, int]:
    """Processes that the weights are sharded over, and processes that share a row, by the trainer's strategy."""
    strategy = trainer["strategy"]
    if isinstance(strategy, str):
        return 1, 1
    settings = strategy.get("init_args") or {}
    sharded = str(strategy.get("class_path", "")).endswith("ShardedBackbone")
    slices = settings.get("context_parallel", 1 if sharded else 2)
    world = max(gpus * int(trainer["num_nodes"]), int(os.environ.get("WORLD_SIZE", "1")))
    return (world if sharded else 1), slices
