"""A frozen backbone with routers as a LightningModule: how it is built, and how it is evaluated."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from elastic.attention.row_slice import RowSlice
from elastic.config import ElasticConfig
from elastic.data.context_length import context_length
from elastic.data.datamodule import PlacedBatch
from elastic.data.packing import Batch
from elastic.data.shards import sources_of
from elastic.data.tasks import TASKS
from elastic.model.attach import attach, biased, last_routes, override_routes, set_config
from elastic.model.checkpoint import load_into, read_elastic
from elastic.model.loading import DTYPES, architecture, load_backbone
from elastic.model.logits import logit_head
from elastic.model.ordered_routers import begin_in_order
from elastic.protocols import CausalLM, Decoder
from elastic.routing.fixed_routes import head_order
from elastic.routing.methods import Method, parse_method, parse_methods, ratio_columns
from elastic.routing.sparsity import esr, msr, xattention_heads
from elastic.training.context_parallel import shard, slice_rows
from elastic.training.losses import WHOLE, answer_divergence, labelled_positions
from elastic.training.metrics import (
    DIVERGENCE,
    Answers,
    LayerDensity,
    RouteShare,
    TaskMeans,
    judged_columns,
    score_answers,
)
from elastic.training.resume import check_data
from elastic.training.sample_records import SOURCE, TASK, SampleRecords
from elastic.training.sharding import ShardedBackbone, shard_backbone

PRECISIONS = ("32-true", "bf16-mixed")


class RoutedModule(LightningModule):
    """Evaluates routers on packed data; `ElasticModule` adds their training.

    Args:
        backbone: `tiny`, `smollm2-135m`, a local folder or a hub id.
        elastic: routers and sparse patterns.
        dtype: of the backbone's weights; routers are always float32.
        gguf_file: file name where the backbone's weights are in GGUF format.
        loss_chunk: positions whose logits exist at a time.
        methods: what evaluation compares, by the names of `elastic.routing.methods`.
        routers: checkpoint folder that they begin with; None: fresh ones.
    """

    def __init__(
        self,
        backbone: str,
        elastic: ElasticConfig,
        dtype: str,
        gguf_file: str | None,
        loss_chunk: int,
        methods: list[str],
        routers: str | None,
    ) -> None:
        super().__init__()
        if loss_chunk < 1:
            raise ValueError(f"loss_chunk={loss_chunk} is below 1; it counts positions, 1024 is usual")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}")
        self.backbone, self.elastic, self.dtype_name, self.gguf_file = backbone, elastic, dtype, gguf_file
        self.loss_chunk, self.begins_with = loss_chunk, routers
        self.methods = parse_methods(methods, of_run=True)
        self.model: Any = None
        self.row_slice: RowSlice = WHOLE
        self.tokenizer: Any = None
        self.results: dict[str, dict[str, float]] = {}
        self.source_results: dict[str, dict[str, float]] = {}
        self.route_maps: dict[str, Tensor] = {}
        self.densities: dict[str, list[float | None]] = {}
        self.sample_results: tuple[Tensor, Tensor] = torch.zeros(0), torch.zeros(0)

    def configure_model(self) -> None:
        """Load the backbone and attach routers, once; refuse what cannot be trained before anything runs."""
        if self.model is None:
            self._build()
        group = None if self._trainer is None else getattr(self.trainer.strategy, "row_group", None)
        if group is not None:
            self.row_slice = slice_rows(self.model, group)

    def _build(self) -> None:
        precision = "32-true" if self._trainer is None else str(self._trainer.precision)
        if precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={precision!r} would cast routers and multipliers; use {' or '.join(PRECISIONS)} "
                "and set model.dtype for the backbone's weights"
            )
        model, self.tokenizer = self._load()
        data: Any = None if self._trainer is None else getattr(self._trainer, "datamodule", None)
        if getattr(data, "manifest", None) is not None:
            check_data(data.manifest, context_length(model.config), self.tokenizer, self.backbone)
        self.model = self._attached(model).train()  # routers sample in training mode only
        self.shape = architecture(model)
        if self.device_mesh is not None:
            if not isinstance(self.trainer.strategy, ShardedBackbone):
                raise ValueError(
                    f"{type(self.trainer.strategy).__name__} does not know what is frozen; use "
                    "elastic.training.sharding.ShardedBackbone (-c strategy/fsdp)"
                )
            shard_backbone(self.model, self.device_mesh["data_parallel"])
        size = self.shape["num_layers"], self.shape["num_kv_heads"]
        self.fixed_routes = [
            method.routes(*size, self.shape, method.sparse(self.elastic.sparse)) for method in self.methods
        ]
        self.columns = judged_columns(self.methods)
        self.means = TaskMeans(self.columns)
        manifest = getattr(data, "manifest", None) or {"splits": {}}
        sources = {name for split in manifest["splits"] for name in sources_of(manifest, split)}
        self.source_means = TaskMeans(self.columns, tuple(sorted(sources)))
        self.samples = SampleRecords(self.columns)
        self.route_share = RouteShare(*size)
        counted = (method.name for method in self.methods if method.sparse(self.elastic.sparse).chooser)
        self.density = LayerDensity(tuple(counted), self.shape["num_layers"])

    def _load(self) -> tuple[CausalLM, Any]:
        """Backbone and tokenizer."""
        return load_backbone(self.backbone, dtype=self.dtype_name, gguf_file=self.gguf_file)

    def _attached(self, model: CausalLM) -> CausalLM:
        if self.begins_with is None:
            return attach(model, self.elastic)
        if self.begins_with.startswith("static:"):
            return self._in_order(model, parse_method(self.begins_with))
        theirs = ElasticConfig.from_dict(read_elastic(self.begins_with)["config"]).to_dict()
        mine = self.elastic.to_dict()
        for name in ("router", "sparse"):
            if theirs[name] != mine[name]:
                raise ValueError(
                    f"the routers in {self.begins_with} were trained with {name} settings {theirs[name]}, but this run "
                    f"has {mine[name]}; give the run the same"
                )
        load_into(model, self.begins_with)
        set_config(model, self.elastic)
        return model

    def _in_order(self, model: CausalLM, method: Method) -> CausalLM:
        """Routers of the configured kind, in the order of a pattern file or a calibration."""
        shape = architecture(model)
        size = shape["num_layers"], shape["num_kv_heads"]
        order, level = head_order(Path(str(method.file)), *size, method.msr, shape, self.elastic.sparse)
        return begin_in_order(attach(model, self.elastic), order, level)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states [1, S, E] of a packed batch, under context parallelism of this process's slice; the
        routes are then in `last_routes(self.model)`.
        """
        return packed_hidden_states(self.model, batch, self.row_slice)

    def _count_once(self, batch: Any) -> None:
        """Samples of a row that several processes share count on the first of them."""
        if self.row_slice.rank and "counted" in batch:
            batch["counted"] = torch.zeros_like(batch["counted"])

    def validation_step(self, batch: PlacedBatch, batch_idx: int) -> None:
        """Scores of every method on one batch."""
        self._evaluate(batch)

    def test_step(self, batch: PlacedBatch, batch_idx: int) -> None:
        """Scores of every method on one batch."""
        self._evaluate(batch)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Per sample: task, tokens, MSR, teacher-forced scores and answer of the routed model, route [L][K]."""
        self._count_once(batch)
        answers, state = self._answers(batch), last_routes(self.model)
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

    def _answers(self, batch: Batch, hidden_1SE: Tensor | None = None) -> Answers:
        """Scores of the answers, after a forward pass where the final hidden states are not given."""
        hidden_1SE = self.hidden_states(batch) if hidden_1SE is None else hidden_1SE
        head = logit_head(self.model)
        return score_answers(hidden_1SE, head, batch["labels"], batch["cu_seq_lens"], self.loss_chunk, self.row_slice)

    @torch.no_grad()
    def _dense_answers(self, batch: Batch) -> Tensor:
        """Hidden states [P, E] of the dense pass at the labelled positions, the teacher of a divergence. Runs before
        the routed pass, whose routes stay the last ones.
        """
        with override_routes(self.model, 0, self.elastic.sparse.dense):
            return labelled_positions(self.hidden_states(batch), batch["labels"], self.row_slice)[0]

    @torch.no_grad()
    def _evaluate(self, batch: PlacedBatch) -> None:
        """Measure every method on the samples of a batch, the dense model first."""
        pairs = list(zip(self.methods, self.fixed_routes, strict=True))
        pairs.sort(key=lambda pair: pair[0].kind != "dense")
        dense_PE = None if pairs[0][0].kind == "dense" else self._dense_answers(batch)
        values: dict[str, Tensor] = {}
        self._count_once(batch)
        kept = batch["counted"]
        for method, routes in pairs:
            sparse = method.sparse(self.elastic.sparse)
            with override_routes(self.model, routes, sparse), biased(self.model, method.bias):
                hidden = self.hidden_states(batch)
            scores, state = self._answers(batch, hidden).scores, last_routes(self.model)
            if dense_PE is None:
                dense_PE = labelled_positions(hidden, batch["labels"], self.row_slice)[0]
            else:
                scores[DIVERGENCE] = self._divergence(batch, hidden, dense_PE)
            if state.density is not None:
                runs = xattention_heads(state.route, sparse)
                self.density.update(method.name, state.density[:, kept], runs[:, kept])
            last, overall = esr(state.route, state.lengths, sparse, state.density)
            measured = {"msr": msr(state.route), "esr_last": last, "esr_all": overall}
            values |= {f"{method.name}_{name}": score for name, score in scores.items()}
            values |= {column: measured[ratio] for ratio, column in ratio_columns(method.name).items()}
            if method.name == "elastic":
                self.route_share.update(batch["task_id"][kept], state.route[:, kept])
        self._add(batch, {name: value[kept] for name, value in values.items()})

    def _divergence(self, batch: Batch, hidden_1SE: Tensor, dense_PE: Tensor) -> Tensor:
        """KL(dense || this pass) per sample, nats an answer token, fp32 [N]."""
        head = logit_head(self.model)
        return answer_divergence(
            hidden_1SE, dense_PE, head, batch["labels"], batch["cu_seq_lens"], self.loss_chunk, self.row_slice
        )

    def _add(self, batch: PlacedBatch, values: dict[str, Tensor]) -> None:
        """Take in what was measured of the samples of a batch that count."""
        kept, task_N = batch["counted"], batch["task_id"]
        names = self.source_means.names
        source_N = torch.tensor([names.index(name) if names else 0 for name in batch["source"]], device=task_N.device)
        self.means.update(task_N[kept], values)
        if names:
            self.source_means.update(source_N[kept], values)
        tokens_N = batch["cu_seq_lens"].diff().to(task_N)
        about_NX = torch.cat([batch["place"], torch.stack([source_N, task_N, tokens_N], dim=1)], dim=1)
        self.samples.update(about_NX[kept], values)

    def on_validation_epoch_end(self) -> None:
        """Log the means per task."""
        self.log("step", float(self.global_step))
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        """Log the means per task."""
        self._finish("test")

    def source_tasks(self) -> dict[str, str]:
        """The task class of every source in the last evaluation whose samples are of one class."""
        about, names = self.sample_results[0].long().tolist(), self.source_means.names
        tasks: dict[str, set[str]] = {}
        for line in about if names else ():
            tasks.setdefault(names[line[SOURCE]], set()).add(TASKS[line[TASK]])
        return {source: min(of) for source, of in sorted(tasks.items()) if len(of) == 1}

    def _finish(self, stage: str) -> None:
        self.results, self.route_maps = self.means.compute(), self.route_share.compute()
        self.source_results = self.source_means.compute() if self.source_means.names else {}
        self.densities = self.density.compute() if self.density.methods else {}
        self.sample_results = self.samples.compute()
        for metric in (self.density, self.means, self.source_means, self.route_share, self.samples):
            metric.reset()
        for task, row in self.results.items():
            for name in self.columns:
                self.log(f"{stage}/{name}/{task}", row[name], rank_zero_only=True)


def packed_hidden_states(model: CausalLM, batch: Batch, row_slice: RowSlice = WHOLE) -> Tensor:
    """Final hidden states [1, S, E] of an attached model on a packed batch, or on this process's slice of it."""
    decoder: Decoder = model.get_decoder()
    return decoder(**shard(batch, row_slice), use_cache=False).last_hidden_state
