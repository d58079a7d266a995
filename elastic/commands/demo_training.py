"""The training part of `elastic demo`: settings, offline data, the real ElasticModule under a Lightning Trainer."""

import logging
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from tqdm import tqdm

from elastic.commands.data_prep import part
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.data.datamodule import MixtureDataModule
from elastic.data.packing import Batch
from elastic.data.tasks import TASKS
from elastic.model.loading import SMOLLM2, TINY, load_tokenizer
from elastic.plots import curves_figure, smooth
from elastic.training.config import ObjectiveConfig, OptimiserConfig, TemperatureConfig
from elastic.training.module import ElasticModule
from elastic.training.objective import Interval

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class DemoSettings:
    """One demo.

    Attributes:
        backbone, language: model, and the language of the generated records.
        longest: longest context in tokens.
        seq_length: tokens of a packed row.
        steps: optimiser steps.
        rows: packed rows of a step, in one forward pass.
        held_out: records per task that are tested on.
        sparse, pool_tokens: what the routers choose between, and how much of the prompt's ends they see.
        optimiser: rates. Short runs need far higher ones than the paper's.
        objective: what keeps MSR from swinging about its target in so few steps.
        temperature: annealing. The default's 2.0 at the start leaves little gradient for so few steps.
        targets: wanted MSR per task, where the default (0.7 sensitive, 1.0 robust) spends too few full heads.
        prompts: the two tasks that a prompt is answered of: one that needs detail, one that does not.
        new_tokens: length of those answers.
    """

    backbone: str
    language: str
    longest: int
    seq_length: int
    steps: int
    rows: int
    held_out: int
    sparse: SparseConfig
    pool_tokens: int
    optimiser: OptimiserConfig
    objective: ObjectiveConfig
    temperature: TemperatureConfig
    targets: dict[str, Interval]
    prompts: tuple[str, str]
    new_tokens: int

    @property
    def elastic(self) -> ElasticConfig:
        """What the routers are attached with."""
        return ElasticConfig(RouterConfig(pool_tokens=self.pool_tokens), self.sparse)


SMALL = DemoSettings(
    backbone=SMOLLM2,
    language="text",
    longest=288,
    seq_length=448,
    steps=44,
    rows=2,
    held_out=6,
    sparse=SparseConfig(sink=16, window=64, block=16),
    pool_tokens=16,
    optimiser=OptimiserConfig(lr=6e-3, multiplier_lr=1.0),
    objective=ObjectiveConfig(damping=3.0),
    temperature=TemperatureConfig(initial=1.0, final=1.0),
    targets={"single_qa": 0.4, "multihop_qa": 0.4},
    prompts=("single_qa", "summarization"),
    new_tokens=24,
)
SMALLEST = DemoSettings(
    backbone=TINY,
    language="tiny",
    longest=240,
    seq_length=320,
    steps=120,
    rows=2,
    held_out=24,
    sparse=SparseConfig(sink=4, window=32, block=4),
    pool_tokens=16,
    optimiser=OptimiserConfig(lr=3e-3, multiplier_lr=5e-2),
    objective=ObjectiveConfig(damping=3.0),
    temperature=TemperatureConfig(initial=1.0, final=0.3),
    targets={},
    prompts=("single_qa", "in_context"),
    new_tokens=12,
)


class Follow(Callback):
    """Progress bars, and the curves of the run: name -> [(step, value), ...]."""

    def __init__(self) -> None:
        self.curves: dict[str, Points] = defaultdict(list)
        self.bar: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the training bar."""
        self.bar = tqdm(total=trainer.max_steps, desc="training", unit="step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: list[Batch], batch_idx: int
    ) -> None:
        """Record what this step logged; values of tasks that it did not hold are old."""
        present = {TASKS[i] for part in batch for i in part["task_id"].tolist()}
        for name, value in trainer.callback_metrics.items():
            task = name.split("/")[2] if name.count("/") == 2 else None
            if task is None or task in present:
                self.curves[name.removeprefix("train/")].append((trainer.global_step, float(value)))
        loss, msr = smooth(self.curves["loss"])[-1][1], trainer.callback_metrics
        shown = {name.split("/")[2]: f"{float(v):.2f}" for name, v in msr.items() if name.startswith("train/msr/")}
        self.bar.set_postfix_str(
            f"loss {loss:.2f}, MSR " + " ".join(f"{k} {v}" for k, v in shown.items()), refresh=False
        )
        self.bar.update()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self.bar.close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the test bar."""
        self.bar = tqdm(total=sum(trainer.num_test_batches), desc="testing dense and elastic", unit="row")

    def on_test_batch_end(self, *_: Any) -> None:
        """One row more."""
        self.bar.update()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self.bar.close()

    def figure(self) -> Any:
        """Loss, MSR by task and multipliers by task over the steps."""
        by_task = {
            kind: {task: self.curves[f"{kind}/{task}"] for task in TASKS if f"{kind}/{task}" in self.curves}
            for kind in ("msr", "u", "v")
        }
        prices = {  # of MSR: above 0 it is too high, below 0 too low
            task: [(step, u - v) for (step, u), (_, v) in zip(points, by_task["v"][task], strict=True)]
            for task, points in by_task["u"].items()
        }
        return curves_figure(
            {
                "language loss (smoothed)": {"loss": smooth(self.curves["loss"])},
                "MSR by task (smoothed)": {task: smooth(points) for task, points in by_task["msr"].items()},
                "multipliers u - v by task": prices,
            }
        )


def build_data(settings: DemoSettings, folder: Path, seed: int) -> tuple[Path, int]:
    """Records and packed rows of all splits; as many training records as the steps will read.

    Returns:
        The data folder, and how many records did not fit into a row.
    """
    records, data = folder / "records", folder / "data"
    building, packing = part("build_mixture"), part("tokenize_and_pack")
    tasks, _ = building.LANGUAGES[settings.language]
    per_task = -(-settings.steps * settings.rows * 2 // len(tasks))
    tokenizer = load_tokenizer(settings.backbone)
    # Generators whose answers are short enough for contexts of this size.
    chosen = part("generators").BASIC if settings.language == "text" else None
    building.build_mixture(
        records,
        per_task,
        settings.longest,
        seed,
        settings.language,
        settings.held_out,
        tokenizer=tokenizer,
        chosen=chosen,
    )
    _, report = packing.prepare(records, tokenizer, data, settings.seq_length)
    return data, len(report.bad)


def train(settings: DemoSettings, data_dir: Path, seed: int) -> tuple[ElasticModule, Follow]:
    """Train routers, then test: the module holds `results` by task and `route_maps`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(seed, verbose=False)
    module = ElasticModule(
        settings.backbone,
        settings.elastic,
        settings.targets,
        settings.optimiser,
        settings.temperature,
        settings.objective,
    )
    data = MixtureDataModule(str(data_dir), rows_per_step=settings.rows, micro_batch_rows=settings.rows, seed=seed)
    follow = Follow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers and validation, which the demo leaves out
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            max_steps=settings.steps,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[follow],
        )
        trainer.fit(module, datamodule=data)
        trainer.test(module, datamodule=data, verbose=False)
    return module, follow


def question(settings: DemoSettings, seed: int) -> tuple[str, str]:
    """A short prompt in the backbone's language, on one line, for the user to begin with; and its answer, or "" where
    there are many.
    """
    if settings.language != "tiny":
        return "Name three oceans.", ""
    short = part("tiny_language").build_records("single_qa", "test", 16, 48, seed)
    # Of a value that repeats a digit, the tiny backbone often reads on from the wrong place.
    record = max(short, key=lambda record: len(set(record.answer.split())))
    return " ".join(record.prompt.split()), record.answer


def recipe(settings: DemoSettings, seed: int) -> dict[str, Any]:
    """How the routers were trained, for the checkpoint."""
    return {"command": "elastic demo", "seed": seed, "threads": torch.get_num_threads(), **asdict(settings)}
