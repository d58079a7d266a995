"""Callbacks of a training run: resumable and final checkpoints, routing pictures, the progress bar."""

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, TQDMProgressBar

from elastic.model.checkpoint import save_elastic
from elastic.model.loading import backbone_id
from elastic.plots import image_of, save_png, share_figure

LAST = "last.ckpt"
CHECKPOINT = "checkpoint"


def run_folder(trainer: Trainer) -> Path:
    """Where a run keeps its files: `trainer.default_root_dir`."""
    return Path(trainer.default_root_dir)


class ResumeCheckpoint(Checkpoint):
    """Saves `last.ckpt` in the run's folder, always after a whole optimiser step; `--ckpt_path last` resumes from it.

    Args:
        every_n_steps: optimiser steps between saves; the last step is always saved.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"resume_checkpoint.every_n_steps={every_n_steps} is below 1; 50 is usual")
        self.every_n_steps, self.saved = every_n_steps, -1

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
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Write when it is due."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the trained routers."""
        if not trainer.interrupted:
            self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_elastic(
                run_folder(trainer) / CHECKPOINT,
                module.model,
                backbone_id(module.backbone),
                module.multipliers,
                recipe={**module.recipe(), "data": data_origin(trainer)},
                metrics=module.results,
            )


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
            save_png(share_figure(pl_module.route_maps), run_folder(trainer) / "routes.png")


class RunProgress(TQDMProgressBar):
    """Lightning's bar without the logger's version number. What is said after a run that failed or was stopped has a
    line of its own.
    """

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the line of each bar."""
        for bar in (self._val_progress_bar, self._test_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What the bar shows after its counts."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name.removeprefix("train/"): value for name, value in metrics.items()}


def data_origin(trainer: Trainer) -> dict[str, Any]:
    """What the data folder's manifest says about its origin; empty for other data."""
    manifest = getattr(getattr(trainer, "datamodule", None), "manifest", None) or {}
    return {key: value for key, value in manifest.items() if key not in ("splits", "format")}
