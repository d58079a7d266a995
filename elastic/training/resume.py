"""What makes a killed run end as if it had never been killed: noise that depends on the step alone, checkpoint files
that are complete or absent, and checks of what must agree before training starts or resumes.
"""

import io
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from elastic.config import UNTOLD, RouterConfig, SparseConfig
from elastic.data.shards import longest_sample, tokenizer_hash
from elastic.files import new_file
from elastic.model.checkpoint import MULTIPLIERS
from elastic.protocols import Tokenizer
from elastic.training.schedules import learning_rate

ALWAYS = ("architecture", "router")  # the rest must agree only where training resumes


def noise_seed(*parts: int) -> int:
    """One 63-bit seed out of several numbers (FNV-1a), stable across processes and versions."""
    value = 0xCBF29CE484222325
    for part in parts:
        for byte in part.to_bytes(16, "little", signed=True):
            value = (value ^ byte) * 0x100000001B3 % 2**64
    return value >> 1


def local_checkpoint(path: Any) -> Path:
    """The file at a path given as `--ckpt_path`.

    Raises:
        ValueError: an address; what it answers with could be anything.
        FileNotFoundError: no file there.
    """
    if "://" in str(path):
        raise ValueError(f"--ckpt_path {path} is an address; checkpoints are local files, so download it first")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--ckpt_path {path}: no such file; expected `last` or the last.ckpt of a run")
    return Path(path)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final place, flushes it to the disk and renames it over the old one. Reads local
    files alone, and of those tensors and plain values alone.

    Lightning's own writer goes through the system's temporary folder, whose rename is no longer atomic where that
    folder lies on another file system. Its own reader takes addresses too, and runs what a pickle from one says.
    """

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, *_: Any, **__: Any
    ) -> dict[str, Any]:
        """The content of a checkpoint, read with `weights_only=True` whatever is asked for.

        Raises:
            ValueError: an address, a damaged file, or one that holds more than tensors and plain values.
            FileNotFoundError: no such file.
        """
        path = local_checkpoint(path)
        try:
            found = torch.load(path, map_location=map_location, weights_only=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError, KeyError, ValueError) as error:
            first = str(error).split("\n")[0] or type(error).__name__
            raise ValueError(
                f"{path} is damaged or was not written by `elastic fit` ({first}); put an undamaged copy there, or "
                "remove it to begin the run again"
            ) from error
        if not isinstance(found, dict) or "state_dict" not in found:
            raise ValueError(f"{path} was not written by `elastic fit`; pass the last.ckpt of a run")
        return found

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`."""
        if storage_options is not None:
            raise ValueError(f"storage_options={storage_options!r} is not supported; checkpoints are local files")
        whole = (
            io.BytesIO()
        )  # a stream: no name in its bytes; in memory: on a full disk torch's own writer says nothing
        torch.save(checkpoint, whole)
        with new_file(path, sync=True) as scratch:
            scratch.write_bytes(whole.getbuffer())


def changed_settings(began: dict[str, Any], now: dict[str, Any], step: int) -> list[str]:
    """What a run resumes with that it did not begin with, and what that does; a line each, none where nothing differs.

    Args:
        began: settings of the run that wrote the checkpoint, by their names on the command line.
        now: those of this run.
        step: optimiser steps done so far.
    """
    differing = [name for name in now if name in began and began[name] != now[name]]
    listed = ", ".join(f"{name} {began[name]} -> {now[name]}" for name in differing)
    lines = [f"resumed with other settings than the run began with: {listed}"] if differing else []
    before, after = (_rate(settings, step) for settings in (began, now))
    if before != after:
        lines.append(
            f"schedules run over all steps of the settings given now: the routers' rate goes from {before:.2g} to "
            f"{after:.2g} at step {step}. The weights will be those of neither run; for a clean one train in a new "
            "folder, with --model.routers <this run's checkpoint> to begin where this one is"
        )
    return lines


def _rate(settings: dict[str, Any], step: int) -> float:
    """The shared routers' rate at a step; 0 of a run that counts in epochs, whose length is not known here."""
    if settings.get("trainer.max_steps", -1) < 1:
        return 0.0
    total, names = settings["trainer.max_steps"], ("lr", "warmup", "heads_first")
    return learning_rate((step + 1) / (total + 1), *(settings[f"model.optimiser.{name}"] for name in names))


def check_checkpoint(checkpoint: dict[str, Any], mine: dict[str, Any], wanted: set[str], fitting: bool) -> None:
    """Compare a resume checkpoint with this run.

    Args:
        checkpoint: as `ElasticModule.on_save_checkpoint` left it.
        mine: what this run was made of, compared with the checkpoint's.
        wanted: names of the trained tensors.
        fitting: training resumes, so that everything must agree; otherwise only what the tensors depend on, which
            multipliers are not part of.

    Raises:
        ValueError: written by something else, of another backbone or configuration, by a version with other
            multipliers, or with missing or added tensors.
    """
    theirs = checkpoint.get("elastic")
    if theirs is None:
        raise ValueError("this checkpoint was not written by `elastic fit`; pass the last.ckpt of a run")
    if fitting and f"{MULTIPLIERS}l1" in checkpoint["state_dict"]:
        raise ValueError(
            "the checkpoint is of an earlier version, which had one multiplier l1 for both bounds of a target instead "
            "of u and v: resumed, the run would end as neither version's. Train its routers further in a new run "
            "(--model.routers <its folder>/checkpoint and another trainer.default_root_dir), or finish it with the "
            "version that began it"
        )
    known, sizes = theirs.get("router"), theirs.get("sparse")
    if isinstance(known, dict):  # of settings that were not there when it was written, what ran then
        theirs = {**theirs, "router": asdict(RouterConfig(**{**UNTOLD, **known}))}
    if isinstance(sizes, dict):  # likewise
        theirs = {**theirs, "sparse": {**asdict(SparseConfig()), **sizes}}
    for key in mine if fitting else ALWAYS:
        if theirs.get(key) != mine[key]:
            raise ValueError(
                f"the checkpoint was trained with {key} {theirs.get(key)}, this run has {mine[key]}; use the "
                "settings it was trained with, or start a new run in another trainer.default_root_dir"
            )
    found = set(checkpoint["state_dict"])
    if not fitting:
        wanted = {name for name in wanted if not name.startswith(MULTIPLIERS)}
    if wanted != found:
        missing, unexpected = ", ".join(sorted(wanted - found)[:3]), ", ".join(sorted(found - wanted)[:3])
        raise ValueError(
            f"the checkpoint does not fit: missing tensors {missing or 'none'}, unexpected tensors "
            f"{unexpected or 'none'}; use an undamaged checkpoint of this configuration"
        )


def check_data(manifest: dict[str, Any], limit: int, tokenizer: Tokenizer, backbone: str) -> None:
    """Refuse packed data that was made for another tokenizer or is too long for the backbone.

    Args:
        limit: tokens that the backbone reads.

    Raises:
        ValueError: with both values.
    """
    # Positions begin again with every sample of a row, so rows may be longer than what the backbone reads.
    if manifest["seq_length"] > limit and (longest := longest_sample(manifest)) > limit:
        raise ValueError(
            f"packed samples have up to {longest} tokens but backbone {backbone!r} reads at most {limit}; pack the "
            f"data with --seq-length {limit} or less"
        )
    check_tokenizer(manifest, tokenizer, backbone)


def check_tokenizer(manifest: dict[str, Any], tokenizer: Tokenizer, backbone: str) -> None:
    """Refuse packed data that was made for another tokenizer.

    Raises:
        ValueError: with both names.
    """
    theirs = manifest["tokenizer"]
    if theirs["sha256"] != tokenizer_hash(tokenizer):
        raise ValueError(
            f"the data was packed with the tokenizer of {theirs['name']!r}, which is not that of backbone "
            f"{backbone!r}; pack it again with --backbone {backbone}"
        )
