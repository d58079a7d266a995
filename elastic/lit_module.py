"""The LightningModule: a frozen backbone with routers, trained by manual optimisation (spec section 5).

One batch of the training loader is one optimiser step: its micro-batches are accumulated, the routers descend, then
the multipliers ascend on the same loss.
"""

import math
import time
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from elastic import schedules
from elastic.backbone import attach, override_routes, routers, routing, set_temperature, update_statistics
from elastic.backbones import DTYPES, architecture, architecture_hash, load_backbone
from elastic.checkpoint import is_trainable
from elastic.config import ElasticConfig
from elastic.metrics import COLUMNS, METHODS, Answers, RouteShare, StepFacts, TaskMeans, score_answers
from elastic.objective import Interval, LagrangeMultipliers, chunked_cross_entropy, sparsity_loss, target_intervals
from elastic.packed import Batch
from elastic.resumable import check_checkpoint, check_data, noise_seed
from elastic.router import entropy
from elastic.sparsity import esr, msr
from elastic.tasks import TASKS
from elastic.training_config import OptimiserConfig, TemperatureConfig

PRECISIONS = ("32-true", "bf16-mixed")


class ElasticModule(LightningModule):
    """Routers on a frozen backbone.

    Args:
        backbone: `tiny`, `smollm2-135m`, a local folder or a hub id.
        elastic: routers and sparse patterns.
        targets: MSR target per task class, a number or [lo, hi]; default 0.7 for sensitive tasks, 1.0 for robust ones.
        optimiser: rates, clipping, warm-up.
        temperature: annealing of the Gumbel-softmax.
        dtype: of the backbone's weights; routers and multipliers are always float32.
        gguf_file: file name where the backbone's weights are in GGUF format.
        gradient_checkpointing: recompute each layer in the backward pass instead of storing its activations.
        loss_chunk: positions whose logits exist at a time.
    """

    def __init__(
        self,
        backbone: str = "tiny",
        elastic: ElasticConfig = ElasticConfig(),  # noqa: B008 - frozen
        targets: dict[str, Interval] | None = None,
        optimiser: OptimiserConfig = OptimiserConfig(),  # noqa: B008 - frozen
        temperature: TemperatureConfig = TemperatureConfig(),  # noqa: B008 - frozen
        dtype: str = "float32",
        gguf_file: str | None = None,
        gradient_checkpointing: bool = False,
        loss_chunk: int = 1024,
    ) -> None:
        super().__init__()
        if loss_chunk < 1:
            raise ValueError(f"loss_chunk={loss_chunk} is below 1; it counts positions, 1024 is usual")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}")
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not in the checkpoint; on_load_checkpoint checks the rest
        self.backbone, self.elastic, self.dtype_name, self.gguf_file = backbone, elastic, dtype, gguf_file
        self.optimiser, self.annealing = optimiser, temperature
        self.gradient_checkpointing, self.loss_chunk = gradient_checkpointing, loss_chunk
        self.intervals = target_intervals(targets or {})
        self.multipliers = LagrangeMultipliers(optimiser.multiplier_limit)
        self.model: Any = None
        self.tokenizer: Any = None
        self.total_steps = self.noise_seed = 0
        self.results: dict[str, dict[str, float]] = {}
        self.route_maps: dict[str, Tensor] = {}

    def configure_model(self) -> None:
        """Load the backbone and attach routers, once; refuse what cannot be trained before anything runs."""
        if self.model is not None:
            return
        precision = "32-true" if self._trainer is None else str(self._trainer.precision)
        if precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={precision!r} would cast routers and multipliers; use {' or '.join(PRECISIONS)} "
                "and set model.dtype for the backbone's weights"
            )
        model, self.tokenizer = load_backbone(self.backbone, dtype=self.dtype_name, gguf_file=self.gguf_file)
        data: Any = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        if getattr(data, "manifest", None) is not None:
            check_data(data.manifest, model, self.tokenizer, self.backbone)
        self.model = attach(model, self.elastic).train()  # routers sample in training mode only
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        shape = architecture(model)
        self.means = TaskMeans(COLUMNS)
        self.route_share = RouteShare(shape["num_layers"], shape["num_kv_heads"])

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW on the routers (no decay on biases), plain ascent on the multipliers."""
        weights = [p for router in routers(self.model) for p in router.parameters()]
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": self.optimiser.weight_decay},
            {"params": [p for p in weights if p.dim() == 1], "weight_decay": 0.0},
        ]
        descent = torch.optim.AdamW(groups, lr=self.optimiser.lr, betas=self.optimiser.betas)
        ascent = torch.optim.SGD(self.multipliers.parameters(), lr=self.optimiser.multiplier_lr, maximize=True)
        return [descent, ascent]

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states [1, S, E] of a packed batch; the routes are then in `routing(self.model)`."""
        return self.model.get_decoder()(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            cu_seq_lens=batch["cu_seq_lens"],
            prompt_spans=batch["prompt_spans"],
            use_cache=False,
        ).last_hidden_state

    def on_fit_start(self) -> None:
        """Fix the number of steps and the seed of the routes' noise."""
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError("the schedules need a number of steps; set trainer.max_steps or trainer.max_epochs")
        self.total_steps, self.noise_seed = int(steps), torch.initial_seed()

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """Router descent on the accumulated micro-batches, then multiplier ascent."""
        started, step = time.perf_counter(), self.global_step
        progress = step / self.total_steps
        facts = StepFacts()
        temperature = schedules.temperature(
            progress, self.annealing.initial, self.annealing.final, self.annealing.reached
        )
        set_temperature(self.model, temperature)
        descent, ascent = (optimiser.optimizer for optimiser in self.optimizers())  # type: ignore[union-attr]
        self._set_rates(descent, ascent)
        for index, micro in enumerate(batch):
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                # The noise depends on seed, step, micro-batch and process only, so a resumed run draws the same.
                torch.manual_seed(noise_seed(self.noise_seed, step, index, self.global_rank))
                self._accumulate(micro, len(batch), facts)
            if progress < self.optimiser.warmup:
                update_statistics(self.model)
        weights = [p for group in descent.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(weights, self.optimiser.clip_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the routers' gradient norm is {norm} at step {step} on {_tasks(batch)}; lower optimiser.lr"
            )
        self.optimizers()[0].step()  # type: ignore[index]  # Lightning counts this one
        ascent.step()  # the raw optimiser: through Lightning the step would count twice
        self.multipliers.project()
        descent.zero_grad()
        ascent.zero_grad()
        seconds = time.perf_counter() - started
        tokens = sum(micro["input_ids"].numel() for micro in batch)
        self._log_step(
            {
                **facts.means(),
                **self.multipliers.by_task(),
                "gradient_norm": norm,
                "temperature": temperature,
                "lr": descent.param_groups[0]["lr"],
                "multiplier_lr": ascent.param_groups[0]["lr"],
                "step_seconds": seconds,
                "tokens_per_second": tokens / seconds,
            }
        )

    def _accumulate(self, batch: Batch, parts: int, facts: StepFacts) -> None:
        """Forward and backward of one micro-batch out of `parts`."""
        hidden = self.hidden_states(batch)
        state, task = routing(self.model), batch["task_id"]
        language = chunked_cross_entropy(hidden, self.model.get_output_embeddings(), batch["labels"], self.loss_chunk)
        ratio = msr(state.route)
        regulariser = sparsity_loss(ratio, task, self.intervals, self.multipliers)
        loss = language + regulariser
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"the loss is {loss.item()} (language {language.item()}, regulariser {regulariser.item()}) at step "
                f"{self.global_step} on {_tasks([batch])}; lower optimiser.lr or look at that data"
            )
        self.manual_backward(loss / parts)
        facts.add("loss", language.item())
        facts.add("regulariser", regulariser.item())
        if state.logits is not None:
            facts.add("router_entropy", entropy(state.logits).item())
        facts.add_per_task("msr", task, ratio)
        facts.add_per_task("esr", task, esr(state.route, state.lengths, self.elastic.sparse)[1])

    def _log_step(self, facts: dict[str, float]) -> None:
        """Scalars over optimiser steps; `loss` and MSR also stand in the progress bar."""
        self.log("step", float(self.global_step))  # the logger's own count may run ahead in manual optimisation
        for name, value in facts.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss" or name.startswith("msr/"), batch_size=1)

    def _set_rates(self, *optimisers: torch.optim.Optimizer) -> None:
        """Learning rates of the step about to be taken; neither the first nor the last is 0."""
        progress = (self.global_step + 1) / (self.total_steps + 1)
        for optimiser, peak in zip(optimisers, (self.optimiser.lr, self.optimiser.multiplier_lr), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = schedules.learning_rate(progress, peak, self.optimiser.warmup)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Dense and elastic scores of one batch."""
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Dense and elastic scores of one batch."""
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Per sample: task, tokens, MSR, teacher-forced scores and answer of the routed model, route [L][K]."""
        answers, state = self._answers(batch), routing(self.model)
        return [
            {
                "task": TASKS[int(batch["task_id"][n])],
                "tokens": int(state.lengths[n]),
                "msr": float(state.route[:, n].mean()),
                **{name: float(value[n]) for name, value in answers.scores.items()},
                "answer": self.tokenizer.decode(answers.predicted_P[answers.sample_P == n], skip_special_tokens=True),
                "route": state.route[:, n].int().tolist(),
            }
            for n in range(len(batch["task_id"]))
        ]

    def _answers(self, batch: Batch) -> Answers:
        hidden, head = self.hidden_states(batch), self.model.get_output_embeddings()
        return score_answers(hidden, head, batch["labels"], batch["cu_seq_lens"], self.loss_chunk)

    def _evaluate(self, batch: Batch) -> None:
        values: dict[str, Tensor] = {}
        for method, override in zip(METHODS, (0, None), strict=True):
            with override_routes(self.model, override):
                values |= {f"{method}_{name}": score for name, score in self._answers(batch).scores.items()}
        state = routing(self.model)  # of the routed pass, which ran last
        last, overall = esr(state.route, state.lengths, self.elastic.sparse)
        values |= {"msr": msr(state.route), "esr_last": last, "esr_all": overall}
        self.means.update(batch["task_id"], values)
        self.route_share.update(batch["task_id"], state.route)

    def on_validation_epoch_end(self) -> None:
        """Log the means per task."""
        self.log("step", float(self.global_step))
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Log the means per task."""
        self._finish("test")

    def _finish(self, stage: str) -> None:
        self.results, self.route_maps = self.means.compute(), self.route_share.compute()
        self.means.reset()
        self.route_share.reset()
        for task, row in self.results.items():
            for name in COLUMNS:
                self.log(f"{stage}/{name}/{task}", row[name], rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep routers and multipliers only, and what a resumed run must agree on."""
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if is_trainable(k)}
        checkpoint["elastic"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another backbone or configuration, or one that lacks or adds keys."""
        fitting = self._trainer is not None and self.trainer.training
        check_checkpoint(checkpoint, self._identity(), {k for k in self.state_dict() if is_trainable(k)}, fitting)

    def _identity(self) -> dict[str, Any]:
        """What decides the weights of a run, apart from data and schedules."""
        return {
            "architecture": architecture_hash(self.model),
            "router": self.elastic.to_dict()["router"],
            "backbone": self.backbone,
            "sparse": self.elastic.to_dict()["sparse"],
            "seed": self.noise_seed or torch.initial_seed(),
        }

    def recipe(self) -> dict[str, Any]:
        """How these routers were trained, for `elastic.json`."""
        return {
            "step": self.global_step,
            "steps": self.total_steps,
            "seed": self.noise_seed,
            "dtype": self.dtype_name,
            "targets": dict(zip(TASKS, self.intervals, strict=True)),
            "optimiser": vars(self.optimiser),
            "temperature": vars(self.annealing),
        }


def _tasks(batch: list[Batch]) -> str:
    """Names of the task classes in a step, for messages."""
    return ", ".join(sorted({TASKS[i] for micro in batch for i in micro["task_id"].tolist()}))
