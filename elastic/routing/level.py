"""Routers by order and level (docs/design.md section 3): a fixed order of heads by measured need, and one number per
input that says how far down the order it may go.

    logit[n, k] = log budget - strain(n) - cost[k],    strain(n) = w . z(n) + b + caution * strangeness(n)

The strain of an input is what the log of its divergence adds to the calibration's: log KL(n, level) is about
strain(n) + cost(level). So a head runs sparse where the divergence that is expected at its place in the order stays
within the budget, in nats per answer token. The features z are the input's reach (`elastic.kernels.reach`), summed up
over the layers so far, and its length; each layer makes a better guess than the one before.
Legend: N samples, K KV heads, F features, S sums.
"""

import math

import torch
from torch import Tensor, nn

from elastic.config import RouterConfig, SparseConfig
from elastic.routing.router import MIN_STATISTICS, Router

FEATURES = ("reach of needed heads", "reach of all heads", "recent reach of needed heads", "log length")
SUMS = 5  # of the summary: need and reach by need (largest, recent), heads and reach of all
CERTAIN = 2.0  # features up to this many deviations from the mean, per feature, are nothing strange
SMALLEST = 1e-6  # variance of a feature
RIDGE = 0.05  # added to the features' correlations, which are nearly those of one number


class LevelRouter(Router):
    """Decides how far down the order of heads an input may go.

    `begin_from` gives it the order; `update_statistics` gathers mean and covariance of the features, which are saved
    with the router and frozen after training.

    Args:
        num_kv_heads: K.
        config: budget and caution.
    """

    after_rope = True
    rank: Tensor
    cost: Tensor
    need: Tensor
    mean: Tensor
    covariance: Tensor
    scale: Tensor
    precision: Tensor
    count: Tensor

    def __init__(self, num_kv_heads: int, config: RouterConfig) -> None:
        super().__init__(num_kv_heads)
        self.config, size = config, len(FEATURES)
        self.weight = nn.Parameter(torch.zeros(size))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("rank", torch.zeros(num_kv_heads))
        self.register_buffer("cost", torch.zeros(num_kv_heads))
        self.register_buffer("need", torch.ones(num_kv_heads))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("covariance", torch.zeros(size, size))
        self.register_buffer("scale", torch.ones(size))
        self.register_buffer("precision", torch.eye(size))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def begin_from(self, rank_K: Tensor, cost_K: Tensor, need_K: Tensor) -> None:
        """Take the heads' places in the order.

        Args:
            rank_K: share of all heads of the model that come before, in [0, 1).
            cost_K: log of the divergence that the calibration measured at that share, in nats.
            need_K: what each head is needed for, any unit, at least 0.
        """
        self.rank.copy_(rank_K)
        self.cost.copy_(cost_K)
        self.need.copy_(need_K.clamp_min(0))

    @torch.no_grad()
    def begin_at(self, sparse_logit: float) -> None:
        """Added to every head's SA logit."""
        self.bias.fill_(-sparse_logit)

    def head_logits(self) -> list[nn.Parameter]:
        """None: the order is fixed."""
        return []

    def summarise(
        self, largest_NK: Tensor, recent_NK: Tensor, earlier_NS: Tensor | None, dropped_NK: Tensor | None
    ) -> Tensor:
        """Sums [N, S] over the heads so far: need, reach and recent reach by need; heads, and their reach."""
        there = torch.ones_like(largest_NK) if dropped_NK is None else (~dropped_NK).to(largest_NK.dtype)
        need = self.need * there
        sums = (need, need * largest_NK, need * recent_NK, there, there * largest_NK)
        here = torch.stack([part.sum(1) for part in sums], 1)
        return here if earlier_NS is None else here + earlier_NS

    def features(self, summary_NS: Tensor, length_N: Tensor, sparse: SparseConfig) -> Tensor:
        """`FEATURES` [N, F]; the length in tokens counts beside what a streaming head sees."""
        need, largest, recent, heads, every = summary_NS.unbind(1)
        need, heads = need.clamp_min(1e-9), heads.clamp_min(1.0)
        length = torch.log(length_N.float() / (sparse.sink + sparse.window)).clamp_min(0.0)
        return torch.stack([largest / need, every / heads, recent / need, length], 1)

    def forward(self, features_NF: Tensor) -> Tensor:
        """Logits [N, K, 2] (route 0 first)."""
        sparse_NK = math.log(self.config.budget) - self.strain(features_NF)[:, None] - self.cost
        return torch.stack([torch.zeros_like(sparse_NK), sparse_NK], -1)

    def strain(self, features_NF: Tensor) -> Tensor:
        """What the input adds to the log of the divergence that its level costs, [N]."""
        known_N = self.expected(features_NF)
        return known_N + self.config.caution * self.strangeness(features_NF)

    def expected(self, features_NF: Tensor) -> Tensor:
        """The strain of an input like those of training, [N]: w . z + b, what training fits."""
        return self.standardise(features_NF) @ self.weight + self.bias

    def standardise(self, features_NF: Tensor) -> Tensor:
        """Features in units of their deviation in training."""
        return (features_NF - self.mean) * self.scale

    def strangeness(self, features_NF: Tensor) -> Tensor:
        """How unlike the training inputs these are, [N]: Mahalanobis distance per feature, beyond `CERTAIN`; 0 before
        there are statistics.
        """
        z_NF = self.standardise(features_NF)
        distance_N = ((z_NF @ self.precision) * z_NF).mean(1).clamp_min(0).sqrt()
        return torch.where(self.count >= MIN_STATISTICS, (distance_N - CERTAIN).clamp_min(0.0), 0.0)

    def route_at(self, level_N: Tensor) -> Tensor:
        """The order's routes [N, K] at these shares of all heads."""
        return (self.rank < level_N.to(self.rank.device)[:, None]).to(torch.float32)

    @torch.no_grad()
    def update_statistics(self, features_NF: Tensor) -> None:
        """Fold a batch of features into the running mean and covariance; batches of all processes count."""
        batch = features_NF.detach().double()
        sums = torch.cat([batch.sum(0), (batch.T @ batch).flatten(), batch.new_tensor([float(batch.shape[0])])])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        size, added = batch.shape[1], sums[-1]
        old, total = self.mean.double(), self.count + added
        second = (self.covariance.double() + torch.outer(old, old)) * self.count
        mean = (old * self.count + sums[:size]) / total
        covariance = (second + sums[size:-1].view(size, size)) / total - torch.outer(mean, mean)
        scale = covariance.diagonal().clamp_min(SMALLEST).rsqrt()
        ridge = RIDGE * torch.eye(size, dtype=scale.dtype, device=scale.device)
        precision = torch.linalg.inv(covariance * torch.outer(scale, scale) + ridge)
        found = {"mean": mean, "covariance": covariance, "scale": scale, "precision": precision, "count": total}
        for name, value in found.items():
            getattr(self, name).copy_(value)
