"""What the tests of training share: packed data for the tiny backbone, a small module, the command as a subprocess."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer, seed_everything

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.data.datamodule import MixtureDataModule
from elastic.training.module import ElasticModule
from tests.helpers.forked import RUNNER, forked, run_command

ROOT = Path(__file__).parents[2]
SMALL = ElasticConfig(RouterConfig(pool_tokens=16), SparseConfig(sink=4, window=16, block=4))


def build_data(folder: Path, words: int = 56, per_task: int = 32, seq_length: int = 128) -> Path:
    """Packed needles and patterns; returns the data folder."""
    from data_prep.build_mixture import build_mixture
    from data_prep.tokenize_and_pack import prepare
    from elastic.model.loading import load_tokenizer

    build_mixture(folder / "records", per_task, words, 0, "tiny", held_out=8, tasks=["single_qa", "in_context"])
    prepare(folder / "records", load_tokenizer("tiny"), folder / "data", seq_length)
    return folder / "data"


def small_run(data: Path, root: Path, steps: int = 2, seed: int = 0, fit: bool = True, **settings: Any) -> Any:
    """(module, data module, trainer) of a short CPU run without files."""
    seed_everything(seed, verbose=False)
    callbacks = settings.pop("callbacks", [])
    rows = settings.pop("rows_per_step", 2)
    module = ElasticModule(**{"elastic": SMALL, **settings})
    loader = MixtureDataModule(str(data), rows_per_step=rows, seed=seed)
    trainer = Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=bool(callbacks),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=str(root),
    )
    if fit:
        trainer.fit(module, loader)
    return module, loader, trainer


def router_tensors(module: ElasticModule) -> dict[str, torch.Tensor]:
    """Copies of everything that training may change."""
    from elastic.model.checkpoint import is_trainable

    return {name: value.clone() for name, value in module.state_dict().items() if is_trainable(name)}


def elastic_command(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `elastic ...` as a user would, on one thread."""
    return subprocess.run(
        [sys.executable, "-m", "elastic.cli", *arguments],
        cwd=cwd,
        env=command_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


def command_environment(**extra: str) -> dict[str, str]:
    """Environment of the command: this checkout, one thread, nothing of the test runner's own."""
    kept = {name: value for name, value in os.environ.items() if name not in RUNNER}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def fit_process(arguments: list[str], cwd: Path, dies: tuple[str, int] | None = None) -> Any:
    """`elastic fit ...` in a process of its own (start it, then join it).

    Args:
        dies: ("step", n) sends itself SIGKILL after step n; ("save", n) in the middle of writing its n-th resume
            checkpoint; ("export", n) where the n-th export would begin; None lives.
    """
    return forked(_fit, arguments, cwd, dies)


def _fit(arguments: list[str], cwd: Path, dies: tuple[str, int] | None) -> None:
    if dies is not None:
        _arm(*dies)
    run_command(["fit", *arguments], cwd, cwd / "fit.log")


def _arm(moment: str, count: int) -> None:
    """Make this process kill itself at a chosen moment."""
    from elastic.training.resume import AtomicCheckpointIO

    if moment == "save":
        save, saves = AtomicCheckpointIO.save_checkpoint, iter(range(1, count + 1))

        def dying_save(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            if next(saves) == count:
                buffer = io.BytesIO()
                torch.save(checkpoint, buffer)
                target = Path(path)
                half = buffer.getvalue()[: buffer.tell() // 2]
                target.with_name(f".{target.name}.writing").write_bytes(half)
                os.kill(os.getpid(), signal.SIGKILL)
            save(self, checkpoint, path, storage_options)

        AtomicCheckpointIO.save_checkpoint = dying_save  # type: ignore[method-assign]
        return
    if moment == "export":
        from elastic.training import callbacks

        export, exports = callbacks.save_elastic, iter(range(1, count + 1))

        def dying_export(*given: Any, **named: Any) -> Any:
            if next(exports) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return export(*given, **named)

        callbacks.save_elastic = dying_export
        return
    step = ElasticModule.training_step

    def dying_step(self: Any, batch: Any, batch_idx: int) -> None:
        step(self, batch, batch_idx)
        if self.global_step == count:
            os.kill(os.getpid(), signal.SIGKILL)

    ElasticModule.training_step = dying_step  # type: ignore[method-assign]
