"""Settings of a training run (docs/design.md sections 4 and 5), checked at construction; no torch import. Defaults are
the paper's.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from elastic.data.tasks import task_index

# Of a training process, unless it is set: without it a 64K-token step of an 8B backbone leaves a fifth of 80 GB in
# fragments.
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
ObjectiveKind = Literal["target", "quality"]
Average = Literal["tokens", "tasks"]


@dataclass(frozen=True)
class OptimiserConfig:
    """Router descent (AdamW) and multiplier ascent (SGD).

    Attributes:
        lr: peak learning rate of the routers.
        head_lr: that of logits which belong to a single KV head (static patterns, `router.head_offset`); nothing
            amplifies them, so it is higher. They have no weight decay, which would pull heads back to undecided.
        betas: AdamW's decay rates.
        weight_decay: on router weights; biases and multipliers have none.
        clip_norm: bound on the norm of the routers' gradient.
        multiplier_lr: peak rate of the multipliers' ascent. The paper's 1e-3 hardly moves them within a few hundred
            steps; short runs need 2e-2 or more.
        multiplier_limit: bound on every multiplier; none is below 0.
        warmup: share of the steps with linearly rising rates, in which the feature statistics are gathered.
        heads_first: share of the steps in which only logits of single heads learn (`router.head_offset`), before the
            shared router begins with a warm-up of its own, so that which heads matter is looked for before how many of
            them an input needs. Until then objective `target` holds all inputs to the interval that spans those of the
            tasks, by multipliers of its own; the tasks' begin with the shared router. 0 lets all begin together.
        start: SA logit of every head before the first step. 0 is the paper's, undecided; below 0 training begins near
            the dense model, where dropping one head shows: with half of the heads dropped at random retrieval is gone
            whatever the rest do, and its gradient says nothing.
    """

    lr: float = 5e-4
    head_lr: float = 5e-2
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    multiplier_lr: float = 1e-3
    multiplier_limit: float = 10.0
    warmup: float = 0.2
    heads_first: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "head_lr", "clip_norm", "multiplier_lr", "multiplier_limit"):
            value = _number(f"optimiser.{name}", getattr(self, name))
            if not value > 0:
                raise ValueError(
                    f"optimiser.{name}={value} is not positive; the default is {getattr(type(self), name)}"
                )
        if len(self.betas) != 2 or not all(0 <= _number("optimiser.betas", beta) < 1 for beta in self.betas):
            raise ValueError(
                f"optimiser.betas={self.betas} is not a pair of numbers in [0, 1); the default is 0.9, 0.95"
            )
        if _number("optimiser.weight_decay", self.weight_decay) < 0:
            raise ValueError(f"optimiser.weight_decay={self.weight_decay} is below 0; 0 switches it off")
        _number("optimiser.start", self.start)
        if not 0 < _number("optimiser.warmup", self.warmup) < 1:
            raise ValueError(f"optimiser.warmup={self.warmup} is not in (0, 1); it is a share of the steps")
        if not 0 <= _number("optimiser.heads_first", self.heads_first) < 1:
            raise ValueError(f"optimiser.heads_first={self.heads_first} is not in [0, 1); it is a share of the steps")


@dataclass(frozen=True)
class TemperatureConfig:
    """Annealing of the Gumbel-softmax: tau falls exponentially from `initial` to `final`, then stays.

    Attributes:
        initial: tau at the first step.
        final: tau from progress `reached` on.
        reached: share of the steps after which `final` is reached.
    """

    initial: float = 2.0
    final: float = 0.3
    reached: float = 0.6

    def __post_init__(self) -> None:
        for name in ("initial", "final", "reached"):
            _number(f"temperature.{name}", getattr(self, name))
        if not 0 < self.final <= self.initial:
            raise ValueError(
                f"temperature goes from initial={self.initial} to final={self.final}; expected 0 < final <= initial"
            )
        if not 0 < self.reached <= 1:
            raise ValueError(f"temperature.reached={self.reached} is not in (0, 1]; it is a share of the steps")


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the routers are trained for.

    Attributes:
        kind: `target` (the paper: a wanted MSR per task) or `quality` (the sparsest routes within a budget of
            divergence from the dense backbone).
        cost: quality: price of a pass with every head full.
        budget: quality: KL(dense || routed) that answers may have, in nats per answer token.
        budgets: quality: budget per task class, where it differs from `budget`.
        price: quality: what every multiplier begins at.
        average: target: cross-entropy is the mean over answer `tokens` (the paper), or over the answers of each task
            and then over `tasks`. By tokens, a continuation of 256 tokens weighs as much as fifty answers of five.
        damping: target: what the price of the squared distance to a target begins at. 0 is the paper's; above 0 MSR
            swings less about its target, since linear prices alone have nothing that slows it down.
    """

    kind: ObjectiveKind = "target"
    cost: float = 1.0
    budget: float = 0.02
    budgets: dict[str, float] = field(default_factory=dict)
    price: float = 0.0
    average: Average = "tokens"
    damping: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(ObjectiveKind):
            raise ValueError(
                f"objective.kind={self.kind!r} is not known; use one of {', '.join(get_args(ObjectiveKind))}"
            )
        if self.average not in get_args(Average):
            raise ValueError(
                f"objective.average={self.average!r} is not known; use one of {', '.join(get_args(Average))}"
            )
        if not _number("objective.cost", self.cost) > 0:
            raise ValueError(f"objective.cost={self.cost} is not positive; 1.0 is usual")
        for name in ("price", "damping"):
            if _number(f"objective.{name}", value := getattr(self, name)) < 0:
                raise ValueError(f"objective.{name}={value} is below 0; 0 is the default")
        for task, value in {"": self.budget, **self.budgets}.items():
            name = f"objective.budgets[{task!r}]" if task else "objective.budget"
            if task:
                task_index(task)
            if _number(name, value) < 0:
                raise ValueError(f"{name}={value} is below 0; it counts nats per answer token, 0.02 is usual")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not a finite number")
    return value
