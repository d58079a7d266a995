"""Files and tables that evaluation writes (docs/design.md section 10)."""

import json
import os
from typing import Any

import torch.distributed as dist
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from elastic.console import say, table
from elastic.files import write_atomic
from elastic.training.callbacks import run_folder
from elastic.training.evaluation_module import RoutedModule
from elastic.training.metrics import DIVERGENCE
from elastic.training.sample_records import sample_lines


class ResultsFile(Callback):
    """After `validate` or `test`: a table on the terminal, and in the run's folder `results_<stage>.json` and, with a
    line per sample, `samples_<stage>.jsonl`.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """A validation of its own, not one within training."""
        if trainer.state.fn == "validate":
            _report(trainer, pl_module, "validation")

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The test split."""
        _report(trainer, pl_module, "test")


class PredictionFile(Callback):
    """Writes `predictions.jsonl` in the run's folder, one line per sample of all processes, in the data's order."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with an empty file."""
        self.path = run_folder(trainer) / "predictions.jsonl"
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Append the samples that count of a batch of every process."""
        told = zip(batch["place"].tolist(), batch["counted"].tolist(), outputs, strict=True)
        found = [[(place, sample) for place, counted, sample in told if counted]]
        if trainer.world_size > 1:
            found *= trainer.world_size
            dist.all_gather_object(found, found[0])
        if trainer.is_global_zero:
            lines = sorted((pair for part in found for pair in part), key=lambda pair: pair[0])
            with open(self.path, "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(sample) + "\n" for _, sample in lines)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are."""
        if trainer.is_global_zero:
            say(f"predictions: {self.path}")


def results_table(results: dict[str, dict[str, float]], methods: list[str], group: str = "task") -> str:
    """Per task or source: exact answers and loss of every method and its divergence from dense, MSR and ESR of the
    routers, samples.
    """
    shown = [(score, method) for score in ("exact", "loss", DIVERGENCE) for method in methods]
    columns = {f"{m} {score}": f"{m}_{score}" for score, m in shown if (score, m) != (DIVERGENCE, "dense")}
    columns |= {"MSR": "msr", "ESR last": "esr_last", "ESR all": "esr_all"}
    rows = [[task, *(f"{row[key]:.3f}" for key in columns.values()), str(row["n"])] for task, row in results.items()]
    return table([group, *columns, "samples"], rows)


def results_of(module: RoutedModule, split: str, checkpoint: str | None, samples: str | None = None) -> dict[str, Any]:
    """Everything that the evaluation of a module found, fit for JSON.

    Args:
        split: `validation` or `test`.
        checkpoint: path of the routers' checkpoint.
        samples: name of the file with a line per sample.
    """
    return {
        "protocol": "answers teacher-forced on packed rows, kl: divergence from the dense model in nats an answer "
        "token; every method runs the same backbone: dense, "
        "streaming and xattention with all heads in that mode, random with heads drawn once, static with heads from a "
        "file, elastic as the routers decide (@: their sparsity_bias; /: the modes they choose between); routes: share "
        "of samples on route 1 by task, layer and KV head",
        "split": split,
        "backbone": module.backbone,
        "elastic": module.elastic.to_dict(),
        "methods": [method.name for method in module.methods],
        "checkpoint": checkpoint,
        "samples": samples,
        "routes": {task: share.tolist() for task, share in module.route_maps.items()},
        "tasks": module.results,
        "sources": module.source_results,
        "source_tasks": module.source_tasks(),
        "xattention_density_by_layer": module.densities,
    }


def _report(trainer: Trainer, module: RoutedModule, split: str) -> None:
    if not trainer.is_global_zero:
        return
    path, samples = (run_folder(trainer) / name for name in (f"results_{split}.json", f"samples_{split}.jsonl"))
    checkpoint = os.path.relpath(trainer.ckpt_path, path.parent) if trainer.ckpt_path else None
    if module.source_results:  # data with a manifest, which names corpora and sources
        corpora = list(trainer.datamodule.manifest["splits"][split])  # type: ignore[attr-defined]
        names = module.source_means.names
        write_atomic(samples, "".join(sample_lines(module.sample_results, module.columns, corpora, names)))
    results = results_of(module, split, checkpoint, samples.name if module.source_results else None)
    write_atomic(path, json.dumps(results, indent=1) + "\n")
    methods = [method.name for method in module.methods]
    say(results_table(module.results, methods))
    if module.source_results:
        say("\n" + results_table(module.source_results, methods, "source"))
    say(f"results: {path}" + (f", by sample: {samples.name}" if module.source_results else ""))
