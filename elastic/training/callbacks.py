"""Callbacks of a training run: resumable and final checkpoints, routing pictures, the progress bar."""

import shlex
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn

from elastic.console import say
from elastic.data.prompts import TEMPLATE
from elastic.model.checkpoint import read_elastic, save_elastic
from elastic.model.loading import backbone_id
from elastic.plots import image_of, save_png, share_figure
from elastic.training.resume import changed_settings

LAST = "last.ckpt"
LAST_NAME = "last"  # as it is typed
CHECKPOINT = "checkpoint"


def run_folder(trainer: Trainer) -> Path:
    """Where a run keeps its files: `trainer.default_root_dir`."""
    return Path(trainer.default_root_dir)


def check_unused(folder: Path, resumed: str | None) -> None:
    """Refuse to begin a run over another one.

    Args:
        folder: of the run.
        resumed: `last`, the checkpoint that it resumes from, or None.

    Raises:
        ValueError: the folder holds a run that is not resumed.
    """
    own = resumed == LAST_NAME or (resumed is not None and Path(resumed).resolve() == (folder / LAST).resolve())
    held = [name for name in (LAST, CHECKPOINT) if (folder / name).exists()]
    if held and not own:
        raise ValueError(
            f"trainer.default_root_dir {folder} holds a run already ({', '.join(held)}), which this one would write "
            "over; resume it with --ckpt_path last, choose another folder, or remove that one"
        )


class ResumeCheckpoint(Checkpoint):
    """Saves `last.ckpt` in the run's folder, always after a whole optimiser step; `--ckpt_path last` resumes from it.
    Says what was changed since the run began, and where nothing is left to do.

    Args:
        every_n_steps: optimiser steps between saves; the last step is always saved.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"resume_checkpoint.every_n_steps={every_n_steps} is below 1; 50 is usual")
        self.every_n_steps, self.saved = every_n_steps, -1
        self.resumed_at: int | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the settings that a resumed run is compared with."""
        checkpoint["elastic_settings"] = _schedule(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say what differs. Checkpoints of earlier versions do not tell."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self.resumed_at = int(checkpoint["global_step"])
        began = checkpoint.get("elastic_settings", {})
        for line in changed_settings(began, _schedule(trainer, pl_module), self.resumed_at) if began else ():
            _tell(trainer, line)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that nothing was left to do."""
        if self.resumed_at is not None and self.resumed_at == trainer.global_step:
            steps = f"{trainer.global_step} of {trainer.max_steps} steps are done"
            _tell(trainer, f"nothing left to train: {steps}; the routers are in {run_folder(trainer) / CHECKPOINT}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Save when it is due. Checkpoints are the last callbacks to run."""
        if trainer.global_step % self.every_n_steps == 0 or trainer.global_step == trainer.max_steps:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of a run whose length counts in epochs."""
        if not trainer.interrupted:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run and trainer.global_step != self.saved:  # type: ignore[attr-defined]
            self.saved = trainer.global_step
            trainer.save_checkpoint(run_folder(trainer) / LAST)


class ElasticCheckpoint(Callback):
    """Writes the checkpoint for use, `<run folder>/checkpoint`, which `elastic.load` and `elastic generate` read.

    Args:
        every_n_steps: optimiser steps between writes; 0 writes at the end of training only.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        if every_n_steps < 0:
            raise ValueError(f"elastic_checkpoint.every_n_steps={every_n_steps} is below 0; 0 writes at the end only")
        self.every_n_steps, self.wrote = every_n_steps, ""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write when it is due."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the trained routers."""
        if not trainer.interrupted:
            self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them too where a run that was killed after its last step is resumed, or its export was removed. Say
        where they are.
        """
        if not trainer.interrupted and trainer.global_step and self._step(trainer) != trainer.global_step:
            self._write(trainer, pl_module)
        if self.wrote:
            _tell(trainer, f"trained routers: {self.wrote} (elastic generate --checkpoint {shlex.quote(self.wrote)})")

    def _step(self, trainer: Trainer) -> int | None:
        """After how many steps the checkpoint that is there was written; None: there is none, or it is damaged."""
        try:
            step: int | None = read_elastic(run_folder(trainer) / CHECKPOINT)["recipe"].get("step")
        except (ValueError, FileNotFoundError):
            return None
        return step

    def _write(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            data = data_origin(trainer)
            path = save_elastic(
                run_folder(trainer) / CHECKPOINT,
                module.model,
                backbone_id(module.backbone),
                module.multipliers,
                recipe={**module.recipe(), "data": data},
                metrics=module.results,
                chat_template_kwargs=data.get(TEMPLATE, {}) if data else None,  # earlier data was told nothing
            )
            self.wrote = str(path)


class StopSignal(Callback):
    """Leaves SIGTERM to the command, also in the middle of a run. Lightning's own handler first tells the other ranks
    by a broadcast, which waits for ever where one of them is inside another collective; Lightning ends those that rank
    0 has started all the same.
    """

    def __init__(self) -> None:
        self._handler = signal.getsignal(signal.SIGTERM)

    def _restore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if callable(self._handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)

    on_sanity_check_start = on_train_start = on_validation_start = on_test_start = on_predict_start = _restore


class RoutingPictures(Callback):
    """Heatmaps layer x KV head per task: to TensorBoard after each validation, as `routes.png` after a test."""

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """One image per task; a validation before training shows nothing yet."""
        writer: Any = getattr(trainer.logger, "experiment", None)
        if trainer.sanity_checking or not trainer.is_global_zero or not hasattr(writer, "add_image"):
            return
        for task, share in pl_module.route_maps.items():
            writer.add_image(f"routes/{task}", image_of(share_figure({task: share})), trainer.global_step)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """One file with a panel per task."""
        if trainer.is_global_zero and pl_module.route_maps:
            say(f"routes: {save_png(share_figure(pl_module.route_maps), run_folder(trainer) / 'routes.png')}")


class RunProgress(TQDMProgressBar):
    """Lightning's bar over all optimiser steps of a run whose length counts in steps, instead of one for each epoch, so
    that it says how long the run will take; without the logger's version number.
    """

    def on_train_start(self, trainer: Trainer, *rest: Any) -> None:
        """Begin the bar where the run begins or resumes."""
        super().on_train_start(trainer, *rest)
        if trainer.max_steps > 0:
            self.train_progress_bar.reset(trainer.max_steps)
            self.train_progress_bar.n = self.train_progress_bar.initial = trainer.global_step
            self.train_progress_bar.set_description("steps")

    def on_train_epoch_start(self, trainer: Trainer, *rest: Any) -> None:
        """Begin the bar of an epoch."""
        if trainer.max_steps < 1:
            super().on_train_epoch_start(trainer, *rest)

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Show the steps done."""
        done = batch_idx if trainer.max_steps < 1 else trainer.global_step - 1
        super().on_train_batch_end(trainer, module, outputs, batch, done)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows after its counts."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.removeprefix("train/"): value for name, value in metrics.items()}


def _schedule(trainer: Trainer, module: Any) -> dict[str, Any]:
    """Settings that a run may be resumed with although its weights depend on them, by their command-line names."""
    own = {"model.optimiser": module.optimiser, "model.temperature": module.annealing}
    parts = {f"{section}.{name}": value for section, part in own.items() for name, value in asdict(part).items()}
    return {
        "trainer.max_steps": trainer.max_steps,
        "trainer.max_epochs": trainer.max_epochs,
        "trainer.precision": str(trainer.precision),
        "model.dtype": module.dtype_name,
        **parts,
    }


def _tell(trainer: Trainer, line: str) -> None:
    """A line on standard error, from one process."""
    if trainer.is_global_zero:
        say(line, stream=sys.stderr)


def data_origin(trainer: Trainer) -> dict[str, Any]:
    """What the data folder's manifest says about its origin; empty for other data."""
    manifest = getattr(getattr(trainer, "datamodule", None), "manifest", None) or {}
    return {key: value for key, value in manifest.items() if key not in ("splits", "format")}
