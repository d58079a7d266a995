"""Training of the routers by manual optimisation (docs/design.md section 5).

One batch of the training loader is one optimiser step: its micro-batches are accumulated, the routers descend, then
the multipliers ascend on the same loss.
"""

import math
import sys
import time
from typing import Any

import torch
from torch import Tensor

from elastic.attention.routed import backend_for
from elastic.config import ElasticConfig
from elastic.console import say
from elastic.data.datamodule import data_place
from elastic.data.packing import IGNORE, Batch
from elastic.data.tasks import TASKS
from elastic.model.attach import drawn_by, last_features, last_routes, routers, set_temperature, update_statistics
from elastic.model.checkpoint import MULTIPLIERS, is_trainable
from elastic.model.compiling import compile_layers
from elastic.model.fused_parts import always_fused
from elastic.model.loading import architecture_hash
from elastic.model.logits import logit_head
from elastic.routing.methods import DEFAULT_METHODS
from elastic.routing.relaxation import gumbel_noise
from elastic.routing.router import entropy
from elastic.routing.sparsity import esr, msr
from elastic.training import schedules
from elastic.training.config import ObjectiveConfig, OptimiserConfig, TemperatureConfig
from elastic.training.evaluation_module import RoutedModule
from elastic.training.metrics import StepAverages
from elastic.training.objective import Interval, RoutedPass, build_objective
from elastic.training.resume import check_checkpoint, noise_seed
from elastic.training.sharding import ShardedBackbone, average_gradients


class ElasticModule(RoutedModule):
    """Routers on a frozen backbone.

    Args:
        backbone: `tiny`, `smollm2-135m`, a local folder or a hub id.
        elastic: routers and sparse patterns.
        targets: MSR target per task class, a number or [lo, hi]; default 0.7 for sensitive tasks, 1.0 for robust ones.
            Read by objective `target` only.
        optimiser: rates, clipping, warm-up.
        temperature: annealing of the Gumbel-softmax.
        objective: `target` (the paper's) or `quality`, with its cost and budgets.
        dtype: of the backbone's weights; routers and multipliers are always float32.
        gguf_file: file name where the backbone's weights are in GGUF format.
        gradient_checkpointing: recompute each layer in the backward pass instead of storing its activations. None: no,
            but `elastic fit` on a GPU decides by its memory.
        loss_chunk: positions whose logits exist at a time. None: 1024, or fewer by the memory of a GPU, likewise.
        compiled: torch.compile what surrounds attention in the backbone's layers
            (`elastic.model.compiling.compile_layers`).
        methods: what evaluation compares, by name (docs/evaluation.md, Methods); default dense and elastic.
        routers: checkpoint folder that training or evaluation begins with, or `static:<file>[@<msr>]`: fresh routers
            that begin in the order of a calibration or a pattern file; None: fresh ones, undecided.
    """

    def __init__(
        self,
        backbone: str = "tiny",
        elastic: ElasticConfig = ElasticConfig(),  # noqa: B008 - frozen
        targets: dict[str, Interval] | None = None,
        optimiser: OptimiserConfig = OptimiserConfig(),  # noqa: B008 - frozen
        temperature: TemperatureConfig = TemperatureConfig(),  # noqa: B008 - frozen
        objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008 - frozen
        dtype: str = "float32",
        gguf_file: str | None = None,
        gradient_checkpointing: bool | None = None,
        loss_chunk: int | None = None,
        compiled: bool = False,
        methods: list[str] | None = None,
        routers: str | None = None,
    ) -> None:
        loss_chunk = 1024 if loss_chunk is None else loss_chunk
        super().__init__(backbone, elastic, dtype, gguf_file, loss_chunk, methods or list(DEFAULT_METHODS), routers)
        self.automatic_optimization = False
        self.strict_loading = False  # frozen weights are not in the checkpoint; on_load_checkpoint checks the rest
        self.optimiser, self.annealing = optimiser, temperature
        self.gradient_checkpointing, self.compiled = bool(gradient_checkpointing), compiled
        self.objective = build_objective(objective, targets or {}, optimiser.multiplier_limit)
        self.multipliers = self.objective.multipliers
        self.total_steps = self.noise_seed = 0

    def configure_model(self) -> None:
        """Load the backbone and attach routers, once."""
        fresh = self.model is None
        super().configure_model()
        for router in routers(self.model) if fresh and self.begins_with is None else ():
            router.begin_at(self.optimiser.start)
        if fresh and self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if fresh and self.compiled:
            compile_layers(self.model)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW on the routers (no decay on biases and logits of single heads), plain ascent on the multipliers."""
        own = [p for router in routers(self.model) for p in router.head_logits()]
        shared = [p for router in routers(self.model) for p in router.parameters() if all(p is not o for o in own)]
        settings = self.optimiser
        if not own and not shared:
            kind = self.elastic.router.kind
            raise ValueError(f"routers of kind {kind} have nothing to learn; `elastic test` evaluates them as they are")
        if settings.heads_first and not own:
            raise ValueError(
                f"optimiser.heads_first={settings.heads_first} trains nothing at first, because no head has logits of "
                "its own; set elastic.router.head_offset: true, or heads_first: 0"
            )
        late = {"peak": settings.lr, "begin": settings.heads_first}
        groups = [
            {"params": [p for p in shared if p.dim() > 1], "weight_decay": settings.weight_decay, **late},
            {"params": [p for p in shared if p.dim() == 1], "weight_decay": 0.0, **late},
            {"params": own, "weight_decay": 0.0, "peak": settings.head_lr, "begin": 0.0},
        ]
        descent = torch.optim.AdamW([group for group in groups if group["params"]], betas=settings.betas)
        prices = [{"params": list(self.multipliers.parameters()), "peak": settings.multiplier_lr, "begin": 0.0}]
        return [descent, torch.optim.SGD(prices, maximize=True)]

    def on_fit_start(self) -> None:
        """Fix the number of steps and the seed of the routes' noise; say what runs attention."""
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError("the schedules need a number of steps; set trainer.max_steps or trainer.max_epochs")
        self.total_steps, self.noise_seed = int(steps), torch.initial_seed()
        dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else self.model.dtype
        backend = backend_for(self.device, dtype, self.shape["head_dim"], True, self.elastic.sparse)
        if self.trainer.is_global_zero:
            say(f"attention in training runs in {backend}", stream=sys.stderr)

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        """Router descent on the accumulated micro-batches, then multiplier ascent."""
        started, step = time.perf_counter(), self.global_step
        progress = step / self.total_steps
        averages = StepAverages()
        temperature = schedules.temperature(
            progress, self.annealing.initial, self.annealing.final, self.annealing.reached
        )
        set_temperature(self.model, temperature)
        descent, ascent = (optimiser.optimizer for optimiser in self.optimizers())  # type: ignore[union-attr]
        self._set_rates(descent, ascent)
        (samples, answer_tokens, tokens), pooled = self._shares(batch), []
        row = data_place(self.trainer)[0] * sum(len(micro["row_samples"]) for micro in batch)  # its place in the step
        for micro in batch:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(noise_seed(self.noise_seed, step, row))  # which queries tell the route's gradient
                with drawn_by(self.model, self._noise(micro["row_samples"], step, row)):
                    self._accumulate(micro, len(batch), (samples, answer_tokens), averages)
            row += len(micro["row_samples"])
            pooled.append(last_features(self.model))
        if progress < self.optimiser.warmup:
            # once: all micro-batches see the same features
            mine = slice(None if self.row_slice.rank == 0 else 0)  # a shared row counts once
            update_statistics(self.model, [torch.cat(of_layer)[mine] for of_layer in zip(*pooled, strict=True)])
        weights = [p for group in descent.param_groups for p in group["params"]]
        if isinstance(self.trainer.strategy, ShardedBackbone):  # DDP has averaged already
            average_gradients([*weights, *self.multipliers.parameters()])
        averages.add("gradient_norm", torch.nn.utils.clip_grad_norm_(weights, self.optimiser.clip_norm))
        means = averages.means(self._over_processes)  # the step's one wait for the GPU
        for name, what in (("objective", "objective"), ("gradient_norm", "routers' gradient norm")):
            if not math.isfinite(means[name]):
                raise FloatingPointError(
                    f"the {what} is {means[name]} at step {step} on {_tasks(means)}; lower optimiser.lr or look at "
                    "that data"
                )
        self.optimizers()[0].step()  # type: ignore[index]  # Lightning counts this one
        ascent.step()  # the raw optimiser: through Lightning the step would count twice
        self.multipliers.project()
        descent.zero_grad()
        ascent.zero_grad()
        seconds = time.perf_counter() - started
        self._log_step(
            {
                **means,
                **self.multipliers.by_class(),
                "temperature": temperature,
                "lr": descent.param_groups[0]["lr"],
                "multiplier_lr": ascent.param_groups[0]["lr"],
                "step_seconds": seconds,
                "tokens_per_second": float(tokens) / seconds,
            }
        )

    def _noise(self, row_samples: list[int], step: int, row: int) -> Tensor:
        """Noise [L, N, K, 2] of the routes. That of a row depends on seed, step and the row's place in the step alone,
        so that a resumed run draws the same, however the step is cut into micro-batches and shared out to processes.
        """
        layers, heads = self.shape["num_layers"], self.shape["num_kv_heads"]
        drawn = []
        for place, samples in enumerate(row_samples, row):
            generator = torch.Generator().manual_seed(noise_seed(self.noise_seed, step, place))
            drawn.append(gumbel_noise((layers, samples, heads, 2), generator))
        return torch.cat(drawn, dim=1).to(self.device)

    def _over_processes(self, part: Tensor) -> Tensor:
        """Sum over all processes, on each of them."""
        total: Tensor = self.trainer.strategy.reduce(part, reduce_op="sum")
        return total

    def _shares(self, batch: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """Of the step, over all micro-batches and processes: samples of each task [T] and labelled tokens, both divided
        by the number of passes (see `RoutedPass`), and tokens.
        """
        count_T = torch.bincount(torch.cat([micro["task_id"] for micro in batch]), minlength=len(TASKS))
        labelled = sum((micro["labels"][:, 1:] != IGNORE).sum() for micro in batch)
        tokens = torch.tensor(sum(micro["input_ids"].numel() for micro in batch), device=count_T.device)
        total = self._over_processes(torch.cat([count_T, torch.stack([torch.as_tensor(labelled), tokens])]).double())
        shares = (total / (len(batch) * self.trainer.world_size)).float()
        return shares[:-2], shares[-2], total[-1] / self.row_slice.size

    @property
    def _heads_alone(self) -> bool:
        """Whether the step about to be taken is one of `optimiser.heads_first`: the shared router's rate is 0."""
        return self._rate_progress <= self.optimiser.heads_first

    @property
    def _rate_progress(self) -> float:
        """Progress of the step about to be taken, for rates; neither the first nor the last is 0."""
        return (self.global_step + 1) / (self.total_steps + 1)

    def _accumulate(self, batch: Batch, parts: int, shares: tuple[Tensor, Tensor], averages: StepAverages) -> None:
        """Forward and backward of one micro-batch out of `parts`."""
        with always_fused():  # by the parts of the routed pass, so that what parts the two is routes, not roundings
            dense = self._dense_answers(batch) if self.objective.needs_dense else None
        hidden = self.hidden_states(batch)
        state, task, head = last_routes(self.model), batch["task_id"], logit_head(self.model)
        ratio = msr(state.route)
        routed = RoutedPass(
            batch, hidden, ratio, dense, head, self.loss_chunk, self._heads_alone, *shares, self.row_slice
        )
        verdict = self.objective.judge(routed)
        self.manual_backward(verdict.loss / parts)
        for name, value in {"objective": verdict.loss, **verdict.parts}.items():
            averages.add(name, value)
        for name, values in verdict.per_task.items():
            averages.add_per_task(name, task, values)
        if state.logits is not None:
            averages.add("router_entropy", entropy(state.logits), len(task))
        averages.add_per_task("msr", task, ratio)
        averages.add_per_task("esr", task, esr(state.route, state.lengths, self.elastic.sparse, state.density)[1])

    def _log_step(self, scalars: dict[str, float]) -> None:
        """Scalars over optimiser steps; `loss` and MSR are in the progress bar too."""
        self.log("step", float(self.global_step))  # the logger's own count may run ahead in manual optimisation
        for name, value in scalars.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss" or name.startswith(("msr/", "kl/")), batch_size=1)

    def _set_rates(self, descent: torch.optim.Optimizer, ascent: torch.optim.Optimizer) -> None:
        """Learning rates of the step about to be taken. Multipliers that begin with the shared router warm up with
        it, those that were in force before it from the first step on.
        """
        anew = self.objective.begins_anew and not self._heads_alone
        ascent.param_groups[0]["begin"] = self.optimiser.heads_first if anew else 0.0
        for group in (*descent.param_groups, *ascent.param_groups):
            group["lr"] = schedules.learning_rate(
                self._rate_progress, group["peak"], self.optimiser.warmup, group["begin"]
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep routers and multipliers only, and what a resumed run must agree on."""
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if is_trainable(k)}
        checkpoint["elastic"] = self._identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another backbone or configuration, or one that lacks or adds keys. Multipliers are for
        training alone: evaluation reads those of no version.
        """
        fitting = self._trainer is not None and self.trainer.training
        if not fitting:
            kept = checkpoint["state_dict"].items()
            checkpoint["state_dict"] = {name: value for name, value in kept if not name.startswith(MULTIPLIERS)}
        check_checkpoint(checkpoint, self._identity(), {k for k in self.state_dict() if is_trainable(k)}, fitting)

    def _identity(self) -> dict[str, Any]:
        """What decides the weights of a run, apart from data and schedules."""
        return {
            "architecture": architecture_hash(self.model),
            "router": self.elastic.to_dict()["router"],
            "backbone": self.backbone,
            "sparse": self.elastic.to_dict()["sparse"],
            "gradient_share": self.elastic.gradient_share,
            "objective": self.objective.settings(),
            "seed": self.noise_seed or torch.initial_seed(),
        }

    def recipe(self) -> dict[str, Any]:
        """How these routers were trained, for `elastic.json`."""
        return {
            "step": self.global_step,
            "steps": self.total_steps,
            "seed": self.noise_seed,
            "dtype": self.dtype_name,
            "objective": self.objective.settings(),
            "optimiser": vars(self.optimiser),
            "temperature": vars(self.annealing),
        }


def _tasks(means: dict[str, float]) -> str:
    """Names of the task classes in a step, for messages."""
    return ", ".join(sorted(name.removeprefix("msr/") for name in means if name.startswith("msr/")))
