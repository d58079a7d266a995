"""Runs a calibration under Lightning's trainer, with a bar over its rounds and sums that repeat."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from elastic.routing.calibration import Calibration
from elastic.training.calibration import HeadNeed


class CalibrationBar(TQDMProgressBar):
    """A bar over all rounds, which names the one that runs."""

    test_description = "calibrating"

    def on_test_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *rest: Any) -> None:
        """Name the round."""
        super().on_test_batch_start(trainer, pl_module, batch, *rest)
        of = pl_module.rounds[batch["round"]]
        self.test_progress_bar.set_description(f"{self.test_description}, {of.name}", refresh=False)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """None: the counts say it all."""
        return {}


def measure(module: HeadNeed, device: str = "cpu", devices: int = 1, progress: bool = True) -> Calibration:
    """Run what is missing of a calibration; the result is the same for any number of processes.

    Args:
        device: `cpu`, `cuda`, or `cuda:N` for one GPU of several.
        devices: processes, a GPU each with `cuda`.
        progress: show a bar.
    """
    place = torch.device(device)
    trainer = Trainer(
        accelerator="gpu" if place.type == "cuda" else "cpu",
        devices=devices if place.index is None else [place.index],
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        callbacks=[CalibrationBar()] if progress else [],
        inference_mode=False,
        use_distributed_sampler=False,  # `test_dataloader` shares the work
    )
    with repeatable():
        trainer.test(module, verbose=False)
    return module.calibration()


@contextmanager
def repeatable() -> Iterator[None]:
    """Inside, sums on a GPU are made in a fixed order where torch and the kernels can."""
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # nothing reads it
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
