"""What the routing study compares: kinds of routers, each with its operating points, and the commands of one run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.bench.studies.runs import FOREIGN, UNTRAINED
from elastic.model.checkpoint import METADATA
from elastic.routing.methods import Method

ROOT = Path(__file__).parent.parent.parent
LAYERS = ("configs/train.yaml", "configs/smollm2-gpu.yaml", "configs/logger/csv.yaml")
OBJECTIVES = {"target": [], "quality": ["configs/objective/quality.yaml"]}
DATA = {
    "train": "configs/mixture/offline.yaml",
    "heldout": "configs/mixture/heldout.yaml",
    FOREIGN: "configs/mixture/foreign.yaml",
}
BASELINES = ("dense", "streaming", "random:0.7", "random:0.7:1")
START = 0.75  # MSR that routers which begin in an order begin at
# A share of the heads by bias, for routers in the order at 0.80 of 90 heads; half places would tie.
NEED_AT, NEED = 0.8, (-3, -2, -1, -0.45)  # 0.5, 0.6, 0.7, 0.756


@dataclass(frozen=True)
class Kind:
    """A kind of routers.

    Attributes:
        biases: its operating points beside bias 0.
        layers, flags: of `elastic fit`, beside those of all kinds.
        in_order: it begins with the order of heads of its seed.
        trained: by `elastic fit`.
        seeded: it differs from seed to seed; else it runs once.
    """

    biases: tuple[float, ...] = (-3, -2, -1, 1.5)
    layers: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    in_order: bool = False
    trained: bool = True
    seeded: bool = True


OFFSETS = ("--model.elastic.router.kind=paper", "--model.elastic.router.head_offset=true")
KINDS = {
    # Fitted by `elastic calibrate`; a bias of 1 is 0.1 of MSR.
    "level": Kind((-3, -2, -1.5, -1), in_order=True, trained=False),
    "need": Kind(NEED, in_order=True, trained=False),  # the order itself, the same heads for every input
    # The heads that reach least, without order or training; a bias of 1 is a tenth of a head's attention.
    "reach": Kind((-4, -3, -2, -1), flags=("--model.elastic.router.kind=reach",), trained=False, seeded=False),
    "ordered": Kind(flags=OFFSETS, in_order=True),  # the paper's router, from the order on
    "elastic": Kind(),  # the paper's router
    "static": Kind(layers=("configs/router/static.yaml",)),  # one pattern, learned
}


@dataclass(frozen=True)
class Plan:
    """One run: which router, trained for which objective (or `UNTRAINED`), from which seed."""

    router: str
    objective: str
    seed: int

    @property
    def name(self) -> str:
        """Folder of the run."""
        return f"{self.router}-{self.objective}-{self.seed}"

    @property
    def kind(self) -> Kind:
        """The kind of its router."""
        return KINDS[self.router]

    @property
    def trained(self) -> bool:
        """Whether `elastic fit` makes its routers."""
        return self.objective != UNTRAINED

    def common(self, folder: Path, extra: Sequence[str]) -> list[str]:
        """Of `elastic fit`, `validate` and `test` alike."""
        layers = [*LAYERS, *OBJECTIVES.get(self.objective, ()), *self.kind.layers]
        flags = [f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false"]
        flags += [f"--seed_everything={self.seed}", f"--data.seed={self.seed}", *self.kind.flags]
        return [*(word for layer in layers for word in ("-c", str(ROOT / layer))), *flags, *extra]

    def fit(self, folder: Path, data: Path, order: Path, extra: Sequence[str]) -> list[str]:
        """Train the routers."""
        words = [f"--data.data_dir={data}", f"--trainer.logger.init_args.save_dir={folder}"]
        words += [f"--model.routers=static:{order}@{START}"] if self.kind.in_order else []
        return ["fit", *self.common(folder, extra), *words, "--trainer.limit_val_batches=0", "--ckpt_path=last"]

    def evaluate(
        self, command: str, folder: Path, data: Path, routers: str, methods: Sequence[str], extra: Sequence[str]
    ) -> list[str]:
        """`validate` or `test` them.

        Args:
            routers: a checkpoint folder, whose settings are taken, or `static:<order>@<msr>`; empty: fresh ones.
        """
        words = [f"--data.data_dir={data}", f"--trainer.logger.init_args.save_dir={folder / 'judged'}"]
        words += [f"--model.methods={json.dumps(list(methods))}"]
        words += [f"--model.routers={routers}", *settings(routers)] if routers else []
        return [command, *self.common(folder, extra), *words]

    def methods(self, biases: Sequence[float] | None, beside: Sequence[str]) -> list[str]:
        """Its operating points, then what is measured beside them."""
        points = self.kind.biases if biases is None else biases
        return ["elastic", *map(elastic_at, points), *beside]


def elastic_at(bias: float) -> str:
    """The method's name at a `sparsity_bias`."""
    return Method("elastic", bias=bias or None).name


def settings(routers: str) -> list[str]:
    """Flags by which a run has the router settings of a checkpoint, or static routers for an order."""
    if routers.startswith("static:"):
        return ["--model.elastic.router.kind=static"]
    stored: dict[str, Any] = json.loads((Path(routers) / METADATA).read_text(encoding="utf-8"))["config"]
    return [
        f"--model.elastic.router.{name}={json.dumps(value).strip(chr(34))}" for name, value in stored["router"].items()
    ]


def plans(routers: Sequence[str], objectives: Sequence[str], seeds: Sequence[int]) -> list[Plan]:
    """Most telling runs first: those of one seed that need no training, then every router and objective of it, then the
    next seed.
    """
    found = []
    for seed in seeds:
        mine = [router for router in routers if KINDS[router].seeded or seed == seeds[0]]
        found += [Plan(router, UNTRAINED, seed) for router in mine if not KINDS[router].trained]
        trained = [router for router in mine if KINDS[router].trained]
        found += [Plan(router, objective, seed) for objective in objectives for router in trained]
    return found


def calibration(
    seed: int, data: Path, order: Path, levels: Path | None, device: str, extra: Sequence[str]
) -> list[str]:
    """`elastic calibrate`: the order of a seed, and level routers fitted to it."""
    layers = [word for layer in LAYERS for word in ("-c", str(ROOT / layer))]
    words = ["--data", str(data), "--seed", str(seed), "--device", device, "--out", str(order)]
    words += [] if levels is None else ["--levels", str(levels)]
    return ["calibrate", *layers, *words, *extra]
