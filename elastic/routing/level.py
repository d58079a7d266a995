"""Routers by order and level (docs/design.md section 3): a fixed order of heads by measured need, and one number per
input that says how far down the order it may go.

    logit[n, k] = STEEPNESS (level(n) - rank[k]),
    level(n) = w . z(n) + b + slope log(budget / fitted budget) - caution strangeness(n)

A level is an MSR: the head at place r of the order, counted from 0 to 1, runs sparse where r < level. The features z
are the input's reach (`elastic.attention.prompt_reach`) in every head of the layers so far, and its length,
standardised; so each layer makes a better guess than the one before. `elastic.training.level_fit` fits w, b and slope
to measured outcomes; `elastic fit` learns them by gradient.
Legend: N samples, K KV heads, R numbers of reach in the layers so far, F = R + 1 features.
"""

import math

import torch
from torch import Tensor, nn

from elastic.config import RouterConfig, SparseConfig
from elastic.routing.router import MIN_STATISTICS, STEEPNESS, Router

USUAL = 3.0  # deviations of the outline from its mean that are nothing strange
SMALLEST = 1e-6  # variance of a feature


def log_length(length_N: Tensor, sparse: SparseConfig) -> Tensor:
    """Logarithm of lengths in tokens as level routers see them, [N]: beside what a streaming head sees."""
    return torch.log(length_N.float() / (sparse.sink + sparse.window)).clamp_min(0.0)


class LevelRouter(Router):
    """Decides how far down the order of heads an input may go.

    Args:
        num_kv_heads: K.
        layer: index of the layer, from 0: its features are those of layers 0 to `layer`.
        config: budget and caution.
    """

    after_rope = True
    rank: Tensor
    mean: Tensor
    scale: Tensor
    count: Tensor
    outline_mean: Tensor
    outline_scale: Tensor
    slope: Tensor
    fitted_budget: Tensor

    def __init__(self, num_kv_heads: int, layer: int, config: RouterConfig) -> None:
        super().__init__(num_kv_heads)
        self.config, size = config, 2 * num_kv_heads * (layer + 1) + 1
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("rank", (torch.arange(num_kv_heads) + 0.5) / num_kv_heads)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("outline_mean", torch.zeros(3))
        self.register_buffer("outline_scale", torch.ones(3))
        self.register_buffer("slope", torch.zeros(()))
        self.register_buffer("fitted_budget", torch.tensor(config.budget))

    @torch.no_grad()
    def begin_in_order(self, place_K: Tensor, level: float) -> None:
        """Take the heads' places, and the level for all inputs."""
        self.rank.copy_(place_K)
        self.bias.fill_(level)

    @torch.no_grad()
    def begin_at(self, sparse_logit: float) -> None:
        """Half of the heads, and so much more."""
        self.bias.fill_(0.5 + sparse_logit / STEEPNESS)

    def head_logits(self) -> list[nn.Parameter]:
        """None: the order is fixed."""
        return []

    def with_earlier(
        self, largest_NK: Tensor, recent_NK: Tensor, earlier_NR: Tensor | None, dropped_NK: Tensor | None
    ) -> Tensor:
        """Reach of the layers so far, [N, R]. Heads whose cached keys are not all there count as usual ones."""
        if dropped_NK is not None:
            largest, recent = self.mean[-1 - 2 * self.kv_heads : -1].chunk(2)  # usual ones
            largest_NK, recent_NK = (
                torch.where(dropped_NK, usual, here) for usual, here in ((largest, largest_NK), (recent, recent_NK))
            )
        here = (largest_NK, recent_NK)
        return torch.cat(here if earlier_NR is None else (earlier_NR, *here), 1)

    def features(self, reach_NR: Tensor, length_N: Tensor, sparse: SparseConfig) -> Tensor:
        """Reach and `log_length`, [N, F]."""
        return self.with_length(reach_NR, log_length(length_N, sparse))

    def with_length(self, reach_NR: Tensor, log_N: Tensor) -> Tensor:
        """As `features`, of a length whose logarithm all layers share."""
        return torch.cat([reach_NR, log_N[:, None]], 1)

    def forward(self, features_NF: Tensor) -> Tensor:
        """Logits [N, K, 2] (route 0 first), fp32."""
        with torch.autocast(features_NF.device.type, enabled=False):
            sparse_NK = STEEPNESS * (self.level(features_NF)[:, None] - self.rank)
        return torch.stack([torch.zeros_like(sparse_NK), sparse_NK], -1)

    def level(self, features_NF: Tensor) -> Tensor:
        """MSR that the input is run at, [N]; outside [0, 1] every head is on one side. A length more than `USUAL` away
        counts as one at that distance: where the level was never fitted only caution moves it, towards full heads.
        """
        z_NF = self._within_usual_length((features_NF - self.mean) * self.scale)
        budget = self.slope * (math.log(self.config.budget) - self.fitted_budget.log())
        return z_NF @ self.weight + self.bias + budget - self.config.caution * self.strangeness(features_NF)

    def _within_usual_length(self, z_NF: Tensor) -> Tensor:
        held_N1 = torch.where(self.count >= MIN_STATISTICS, z_NF[:, -1:].clamp(-USUAL, USUAL), z_NF[:, -1:])
        return torch.cat([z_NF[:, :-1], held_N1], 1)

    def strangeness(self, features_NF: Tensor) -> Tensor:
        """How unlike the training inputs these are, [N]: deviations of mean reach, mean recent reach or length from
        their means, the largest of them, beyond `USUAL`; 0 before there are statistics.
        """
        far_N = ((self.outline(features_NF) - self.outline_mean) * self.outline_scale).abs().amax(1)
        return torch.where(self.count >= MIN_STATISTICS, (far_N - USUAL).clamp_min(0.0), 0.0)

    def outline(self, features_NF: Tensor) -> Tensor:
        """Mean reach, mean recent reach, log length: [N, 3]."""
        reach = features_NF[:, :-1].unflatten(1, (-1, 2, self.kv_heads)).mean((1, 3))
        return torch.cat([reach, features_NF[:, -1:]], 1)

    def route_at(self, level_N: Tensor) -> Tensor:
        """The order's routes [N, K] at these shares of all heads."""
        return (self.rank < level_N.to(self.rank.device)[:, None]).to(torch.float32)

    @torch.no_grad()
    def update_statistics(self, features_NF: Tensor) -> None:
        """Fold a batch of features into running means and deviations; batches of all processes count."""
        batch = torch.cat([features_NF, self.outline(features_NF)], 1).double()
        sums = torch.cat([batch.sum(0), batch.square().sum(0), batch.new_tensor([float(batch.shape[0])])])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        added, total = sums[-1], self.count + sums[-1]
        mean = torch.cat([self.mean, self.outline_mean]).double()
        scale = torch.cat([self.scale, self.outline_scale]).double()
        square = torch.where(self.count > 0, scale.square().reciprocal() + mean.square(), 0.0)
        first, second = sums[:-1].chunk(2)
        mean = (mean * self.count + first) / total
        variance = (square * self.count + second) / total - mean.square()
        scale, size = variance.clamp_min(SMALLEST).rsqrt(), self.mean.shape[0]
        for name, value in (("mean", mean[:size]), ("outline_mean", mean[size:])):
            getattr(self, name).copy_(value)
        for name, value in (("scale", scale[:size]), ("outline_scale", scale[size:])):
            getattr(self, name).copy_(value)
        self.count.copy_(self.count + added)
