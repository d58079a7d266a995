"""The attention router of one layer (docs/design.md section 3; paper section 3.1, appendices D and H.5).

Pre-RoPE keys -> boundary pooling -> standardised features -> task MLP -> router MLP -> two logits per KV head.
Legend: N samples, S tokens, K KV heads, D head dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from elastic.config import RouterConfig

MIN_STATISTICS = 8  # samples before the deviation means anything
STANDARDISED_LIMIT = 10.0  # features further out than this many deviations carry no more information than the sign
EPSILON = 1e-5  # added to the variance
PER_HEAD = ("logits", "mean", "offset", "var")  # names of a router's tensors that have a row for every KV head
STEEPNESS = 10.0  # of logits along an order of heads: a `sparsity_bias` of 1 lets a tenth of all heads more run sparse


@dataclass(frozen=True)
class Decision:
    """A layer's decision.

    Attributes:
        route_NK: in {0, 1}, with the straight-through gradient in training.
        logits_NK2: what it was decided from; None when the route was given from outside, as are the next.
        features: pooled keys [N, K, D], or the features [N, F] of a level router.
        mode_NK: the route in modes of the head plan, where the kernel that decided made it too.
        reach_NR: reach in this layer and those before, which a level router of the next layer must know.
    """

    route_NK: Tensor
    logits_NK2: Tensor | None
    features: Tensor | None
    mode_NK: Tensor | None = None
    reach_NR: Tensor | None = None


class Router(nn.Module):
    """What the routers of all kinds share: features in, pooled keys [N, K, D] unless said otherwise; logits [N, K, 2]
    out.

    Attributes:
        kv_heads: K.
        after_rope: whether it looks at queries and keys after RoPE, so that the layer is routed then.
    """

    after_rope = False

    def __init__(self, num_kv_heads: int) -> None:
        super().__init__()
        self.kv_heads = num_kv_heads

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """Follow the model to another device, but not to another dtype: routers stay fp32."""
        super()._apply(lambda t: _same_dtype(fn(t), t), recurse)  # type: ignore[no-untyped-call]
        return self

    def update_statistics(self, _features: Tensor) -> None:
        """Gather statistics of the features, where this kind keeps any."""

    def begin_at(self, _sparse_logit: float) -> None:
        """Let every head begin with this logit for SA (and 0 for FA) instead of undecided."""
        raise NotImplementedError

    def begin_in_order(self, _place_K: Tensor, _level: float) -> None:
        """Let the heads before a level of an order begin on route 1. A head's place is the share of all heads of the
        model that come before it, in (0, 1).
        """
        raise NotImplementedError

    def head_logits(self) -> list[nn.Parameter]:
        """Logits [K, 2] of their own that KV heads have; they learn at another rate than shared weights."""
        raise NotImplementedError


def check_router(router: nn.Module, layer: int) -> None:
    """Refuse a router whose values were moved away after `attach`: kernels and checkpoints read them directly.

    Raises:
        ValueError: values on the meta device.
    """
    first = next(router.parameters(), None)  # all are moved or none; this is asked in every layer of a prefill
    if first is not None and first.is_meta:
        raise ValueError(
            f"the router of layer {layer} was offloaded together with the model; offload first (device_map of "
            "from_pretrained, or accelerate's functions), then attach routers or load them"
        )


def _same_dtype(moved: Tensor, before: Tensor) -> Tensor:
    """A moved tensor in the dtype from before, of the values from before where the move has rounded them."""
    return moved if moved.dtype == before.dtype else before.detach().to(moved.device)


class Dense(nn.Module):
    """`torch.nn.Linear` under another class: what looks for linear layers to adapt or quantise them (peft's
    `all-linear`, `quantize_dynamic`) means those of the backbone.

    Args:
        inputs, outputs: features.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        made = nn.Linear(inputs, outputs)
        self.weight, self.bias = made.weight, made.bias

    def forward(self, features: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(features, self.weight, self.bias)


class StaticRouter(Router):
    """One learned pattern for every input: two logits per KV head, no features.

    Trained like `AttentionRouter` (same data, relaxation, objective), so that the two can be compared.

    Args:
        num_kv_heads: K.
    """

    def __init__(self, num_kv_heads: int) -> None:
        super().__init__(num_kv_heads)
        self.logits = nn.Parameter(torch.zeros(num_kv_heads, 2))

    @torch.no_grad()
    def begin_at(self, sparse_logit: float) -> None:
        """Every head's own SA logit."""
        self.logits[:, 1] = sparse_logit

    @torch.no_grad()
    def begin_in_order(self, place_K: Tensor, level: float) -> None:
        """Every head's own SA logit."""
        self.logits[:, 0] = 0.0
        self.logits[:, 1] = STEEPNESS * (level - place_K)

    def head_logits(self) -> list[nn.Parameter]:
        """The whole pattern."""
        return [self.logits]

    def forward(self, pooled_NKD: Tensor) -> Tensor:
        """Logits [N, K, 2], the same for all samples."""
        return self.logits.expand(pooled_NKD.shape[0], -1, -1)


class AttentionRouter(Router):
    """Decides full or sparse attention per sample and KV head from the layer's own keys.

    Parameters are shared by the heads of the layer: 263,682 at D = 128. The last layer's weight starts at zero, so
    every head starts undecided. The running statistics (per KV head and channel) are gathered in training by
    `update_statistics`, saved with the router and frozen afterwards; with `feature_norm="none"` they stay unused.

    Args:
        num_kv_heads: K.
        head_dim: D.
        config: pooling and feature normalisation.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, num_kv_heads: int, head_dim: int, config: RouterConfig) -> None:
        super().__init__(num_kv_heads)
        self.config = config
        self.task = nn.Sequential(Dense(head_dim, 4 * head_dim), nn.SiLU(), Dense(4 * head_dim, head_dim))
        undecided = Dense(head_dim, 2)
        nn.init.zeros_(undecided.weight)
        nn.init.zeros_(undecided.bias)
        self.head = nn.Sequential(
            Dense(head_dim, 4 * head_dim),
            nn.SiLU(),
            Dense(4 * head_dim, head_dim),
            nn.SiLU(),
            undecided,
        )
        for layer in (self.task[0], self.task[2], self.head[0], self.head[2]):
            _keep_variance(layer)
        self.offset = nn.Parameter(torch.zeros(num_kv_heads, 2)) if config.head_offset else None
        self.register_buffer("mean", torch.zeros(num_kv_heads, head_dim))
        self.register_buffer("var", torch.ones(num_kv_heads, head_dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, pooled_NKD: Tensor) -> Tensor:
        """Logits [N, K, 2] (route 0 first) of pooled keys [N, K, D]; fp32 whatever the backbone's dtype."""
        with torch.autocast(pooled_NKD.device.type, enabled=False):
            features = self.standardise(pooled_NKD.float())
            logits: Tensor = self.head(self.task(features))
            return logits if self.offset is None else logits + self.offset

    @torch.no_grad()
    def begin_at(self, sparse_logit: float) -> None:
        """The last bias, whose weights start at zero."""
        undecided: Any = self.head[-1]
        undecided.bias[1] = sparse_logit

    @torch.no_grad()
    def begin_in_order(self, place_K: Tensor, level: float) -> None:
        """The heads' offsets.

        Raises:
            ValueError: there are none.
        """
        if self.offset is None:
            raise ValueError(
                "routers of kind paper begin in an order by offsets of their heads; set router.head_offset"
            )
        self.offset[:, 0] = 0.0
        self.offset[:, 1] = STEEPNESS * (level - place_K)

    def head_logits(self) -> list[nn.Parameter]:
        """The heads' offsets, where there are any."""
        return [] if self.offset is None else [self.offset]

    def standardise(self, pooled_NKD: Tensor) -> Tensor:
        """Features in units of the running deviation, per KV head and channel; unchanged before `MIN_STATISTICS`
        samples.
        """
        if self.config.feature_norm == "none":
            return pooled_NKD
        features = (pooled_NKD - self.mean) * torch.rsqrt(self.var + EPSILON)
        features = features.clamp(-STANDARDISED_LIMIT, STANDARDISED_LIMIT)
        return torch.where(self.count >= MIN_STATISTICS, features, pooled_NKD)

    @torch.no_grad()
    def update_statistics(self, pooled_NKD: Tensor) -> None:
        """Fold a batch of pooled keys [N, K, D] into the running mean and variance (Chan's parallel update).

        In a distributed run the batches of all processes count.
        """
        pooled = pooled_NKD.detach().double()
        moments = torch.stack([pooled.sum(0), pooled.square().sum(0)])
        added = torch.tensor(float(pooled.shape[0]), dtype=torch.float64, device=pooled.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(moments)
            torch.distributed.all_reduce(added)
        batch_mean = moments[0] / added
        batch_var = (moments[1] / added - batch_mean.square()).clamp_min(0.0)
        # Before the first batch `var` is the neutral 1.0, which must not count.
        old_var = torch.where(self.count > 0, self.var.double(), torch.zeros_like(batch_var))
        total = self.count + added
        delta = batch_mean - self.mean.double()
        var = (old_var * self.count + batch_var * added + delta.square() * self.count * added / total) / total
        self.mean.copy_(self.mean.double() + delta * added / total)
        self.var.copy_(var)
        self.count.copy_(total)


def _keep_variance(layer: nn.Module) -> None:
    """He's initialisation: differences between inputs reach the last layer about as large as they came in. Under
    PyTorch's default they shrink to a sixtieth over the four layers.
    """
    assert isinstance(layer, Dense)
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    nn.init.zeros_(layer.bias)


def entropy(logits: Tensor) -> Tensor:
    """Mean entropy in nats of the routes' softmax over the last axis: ln 2 when undecided, 0 when certain."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1).mean()
