"""Measures what each KV head of a backbone is needed for (`elastic calibrate`), under Lightning on one process or many.

The need of a head is KL(dense || that head sparse) in nats per answer token. The dense model is the teacher, so no
label is fitted. The rounds of `elastic.training.head_need` say which routes run; here they meet the model.
Legend: N samples, L layers, K KV heads.
"""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning import LightningModule
from torch import Tensor
from torch.utils.data import DataLoader

from elastic._version import __version__
from elastic.attention.routed import backend_for
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.console import say
from elastic.data.calibration_rows import RowSet
from elastic.data.packing import Batch, collate
from elastic.files import text_sha256
from elastic.model.attach import attach, detach, routers
from elastic.model.loading import DTYPES, architecture, architecture_hash, backbone_id, load_backbone
from elastic.routing.calibration import LEVELS, Calibration, Curve
from elastic.routing.level import LevelRouter
from elastic.training.head_need import (
    CURVE,
    OUTCOMES,
    CurveRound,
    OutcomeRound,
    Ranking,
    Recipe,
    Round,
    rounded,
    source_means,
)
from elastic.training.judged_batch import JudgedBatch
from elastic.training.level_fit import Outcomes, fit_levels
from elastic.training.partial_results import Found, read_partial, write_partial

SAVE_EVERY = 4  # batches of a process
LARGE = 1_000_000_000  # parameters from which layers are recomputed in the backward pass unless said otherwise


class HeadNeed(LightningModule):
    """Runs the rounds of a calibration: those of the recipe, then the curve of the order that they gave.

    Args:
        backbone: `tiny`, `smollm2-135m`, a local folder or a hub id.
        sparse: modes and sizes of the heads.
        recipe: how to measure.
        rows: those that make the order, and those that its curve is measured on.
        level_rows: those that level routers are fitted to (`fit`); None: no routers are wanted.
        partial: file that keeps what is measured until the end.
        data: what the calibration should say about its rows, beside their checksums.
        dtype: of the backbone's weights.
        gguf_file: file name where they are in GGUF format.
        checkpointing: recompute layers in the backward pass; None: where the backbone is large.
        loss_chunk: positions whose logits exist at a time.
    """

    def __init__(
        self,
        backbone: str,
        sparse: SparseConfig,
        recipe: Recipe,
        rows: tuple[RowSet, RowSet],
        partial: Path,
        data: dict[str, Any] | None = None,
        dtype: str = "float32",
        gguf_file: str | None = None,
        checkpointing: bool | None = None,
        loss_chunk: int = 1024,
        level_rows: RowSet | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} is not supported; use one of {', '.join(DTYPES)}")
        self.backbone, self.sparse, self.recipe, self.data = backbone, sparse, recipe, data or {}
        self.partial, self.dtype_name, self.gguf_file = partial, dtype, gguf_file
        self.checkpointing, self.loss_chunk = checkpointing, loss_chunk
        self.order_rows, self.curve_rows, self.level_rows = *rows, level_rows
        self.rounds: list[Round] = [*recipe.rounds(), CurveRound(), *([OutcomeRound()] if level_rows else [])]
        self.model: Any = None
        self.provenance: dict[str, Any] = {}
        self.found: Found = {}
        self.fresh: Found = {}  # not yet known to the other processes
        self.running = ""  # name of the round whose routes are prepared

    def configure_model(self) -> None:
        """Load the backbone and attach static routers, once."""
        if self.model is not None:
            return
        model, _ = load_backbone(self.backbone, dtype=self.dtype_name, gguf_file=self.gguf_file)
        self.model = attach(model, ElasticConfig(RouterConfig(kind="static"), self.sparse))
        self.shape = architecture(model)
        self.size = self.shape["num_layers"], self.shape["num_kv_heads"]
        if self.checkpointing is None:
            self.checkpointing = sum(p.numel() for p in model.parameters()) >= LARGE
        if self.checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def on_test_model_eval(self) -> None:
        """Layers are recomputed in training mode only, which changes nothing else: no route is drawn."""
        self.eval()
        self.model.train(bool(self.checkpointing))

    def test_dataloader(self) -> DataLoader[Any]:
        """What is missing of every round, this process's share; all processes take equally many steps."""
        self.provenance = self._origin()
        self.key = text_sha256(json.dumps(self.provenance, sort_keys=True))
        known = read_partial(self.partial, self.key) if self.trainer.is_global_zero else {}
        self.found = self.trainer.strategy.broadcast(known)
        if self.trainer.is_global_zero and self.partial.exists():
            say(f"{len(known)} batches are in {self.partial} already" if known else f"{self.partial} is of another run")
        rank, world = self.trainer.global_rank, self.trainer.world_size
        work: list[tuple[int, int | None]] = []
        for number, of in enumerate(self.rounds):
            batches = range(len(self._rows(of).batches))
            missing = [index for index in batches if (of.name, index) not in self.found]
            steps = -(-len(missing) // world)
            work += [(number, index) for index in [*missing[rank::world], None][:steps]]
        dataset: Any = work  # a list is one
        return DataLoader(dataset, batch_size=None, collate_fn=self._read)

    def _read(self, work: Any) -> dict[str, Any]:
        """A batch of a round; a process that has none left takes part without one."""
        number, index = work
        rows = self._rows(self.rounds[number])
        return {"round": number, **({} if index is None else {"index": index, "batch": collate(rows.batches[index])})}

    def test_step(self, work: dict[str, Any], batch_idx: int) -> None:
        """Measure one batch in one round."""
        of = self.rounds[work["round"]]
        if of.name != self.running:
            self._keep()
            self.running, self.routes = of.name, self._routes(of)
        if "index" in work:
            begin, end = self._rows(of).places[work["index"]]
            with torch.no_grad():
                values = of.measure(self.judged(work["batch"]), self.routes, slice(begin, end))
            if not bool(torch.isfinite(values).all()):
                raise FloatingPointError(
                    f"round {of.name!r} gave NaN or infinity on batch {work['index']}; try --dtype float32"
                )
            self.fresh[of.name, work["index"]] = values.float().cpu()
        if (batch_idx + 1) % SAVE_EVERY == 0:
            self._keep()

    def judged(self, batch: Batch) -> JudgedBatch:
        """A batch, ready to be judged."""
        return JudgedBatch(self.model, batch, self.sparse.dense, self.loss_chunk)

    def on_test_epoch_end(self) -> None:
        """All processes know everything."""
        self._keep()

    def _keep(self) -> None:
        """Share what is new among the processes, and write everything to the file of partial results."""
        parts: list[Any] = [self.fresh]
        if self.trainer.world_size > 1:
            parts = [None] * self.trainer.world_size
            dist.all_gather_object(parts, self.fresh)
        new = {place: values for part in parts for place, values in part.items()}
        self.found, self.fresh = {**self.found, **new}, {}
        if new and self.trainer.is_global_zero:
            write_partial(self.partial, self.key, self.found)

    def _origin(self) -> dict[str, Any]:
        """Everything that the result depends on; partial results of anything else are of no use."""
        levels = {} if self.level_rows is None else {OUTCOMES: self.level_rows.summary()}
        return {
            "backbone": backbone_id(self.backbone),
            "architecture": self.shape,
            "architecture_sha256": architecture_hash(self.model),
            "sparse": asdict(self.sparse),
            "by": self.recipe.by,
            "settings": self.recipe.settings(),
            "dtype": self.dtype_name,
            "backend": backend_for(self.device, self.model.dtype, self.shape["head_dim"], True, self.sparse),
            "data": {**self.data, "order": self.order_rows.summary(), CURVE: self.curve_rows.summary(), **levels},
            "versions": {
                "elastic-attention": __version__,
                **{name: version(name) for name in ("torch", "transformers")},
            },
        }

    def _rows(self, of: Round) -> RowSet:
        if of.name == OUTCOMES and self.level_rows is not None:
            return self.level_rows
        return self.curve_rows if of.name == CURVE else self.order_rows

    def _routes(self, of: Round) -> Tensor:
        """What a round runs; rounds before it are finished."""
        return of.routes(self._ranking(until=of), self.size, self._rows(of).sources)

    def _ranking(self, until: Round | None = None) -> Ranking:
        """What the rounds before one have told, or all of them."""
        known = Ranking.unknown(self.size[0] * self.size[1])
        for of in self.rounds:
            if of is until:
                break
            sources = self._rows(of).sources
            known = of.learn(known, of.routes(known, self.size, sources), self._values(of), sources)
        return known

    def _values(self, of: Round) -> Tensor:
        """What a finished round measured, [N, ...]."""
        return torch.cat([self.found[of.name, index] for index in range(len(self._rows(of).batches))])

    def calibration(self) -> Calibration:
        """The result, once every round has run."""
        order, need_T = self._ranking()
        kl = source_means(self._values(CurveRound()), self.curve_rows.sources)
        overall = torch.stack(list(kl.values())).mean(0)
        curve = Curve(LEVELS, _numbers(overall), {name: _numbers(values) for name, values in kl.items()})
        return Calibration(tuple(map(_numbers, need_T.view(self.size))), tuple(order), curve, self.provenance)

    def outcomes(self) -> Outcomes:
        """What level routers are fitted to.

        Raises:
            ValueError: there are no rows for them.
        """
        if self.level_rows is None:
            raise ValueError("no rows were given to fit level routers to; pass level_rows")
        values = self._values(OutcomeRound())
        kl, reach = values[:, : len(LEVELS)], values[:, len(LEVELS) :].view(len(values), self.size[0], 2, self.size[1])
        if self.sparse.route0 != "full":
            kl = kl - kl[:, :1]  # routers cannot avoid what route 0 costs by itself; the budget is for what they choose
        heads = self.size[0] * self.size[1]
        ran = [round(level * heads) / heads for level in LEVELS]  # of few heads, far from the level asked for
        return Outcomes(reach, torch.tensor(self.level_rows.lengths), kl, ran, self.level_rows.sources)

    def fit(self, budget: float) -> list[float]:
        """Exchange the model's static routers for level routers, fitted to what was measured.

        Args:
            budget: divergence that they stay below, in nats per answer token.

        Returns:
            Share of the variance of the breaking level that each layer's router explains.
        """
        outcomes, order = self.outcomes(), self._ranking().order
        self.model.requires_grad_(False)
        detach(self.model)
        attach(self.model, ElasticConfig(RouterConfig(kind="level", budget=budget), self.sparse))
        return fit_levels(cast(list[LevelRouter], routers(self.model)), order, outcomes, self.sparse)


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(map(rounded, values.tolist()))
