"""Fits level routers to measured outcomes, in closed form: ridge regression of the level at which an answer breaks, on
reach and length (docs/design.md section 3).

A sample breaks at the MSR of the order from which on KL(dense || that level) exceeds the budget. Every source counts
the same. Regression draws all inputs towards the mean level; `contrast` stretches the levels about it again.
Legend: M samples, L layers, K KV heads, J levels, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.config import SparseConfig
from elastic.routing.level import LevelRouter

RIDGE = 0.3  # on standardised features whose samples weigh 1 together
CONTRAST = 1.5
FLOOR = 1e-4  # nats; below it a divergence is rounding
BESIDE = 2.0  # budgets this much larger and smaller give the slope


@dataclass(frozen=True)
class Outcomes:
    """What levels of an order cost on samples that did not make it.

    Attributes:
        reach_MLR: [M, L, 2, K], largest and recent reach of every head under a level in use.
        length_M: tokens of each prompt up to the end of the user's words.
        kl_MJ: KL(dense || level) in nats per answer token; where route 0 is not full attention, what it exceeds that of
            level 0 by.
        levels: MSR of the columns, ascending from 0.
        sources: name of each sample's source.
    """

    reach_MLR: Tensor
    length_M: Tensor
    kl_MJ: Tensor
    levels: Sequence[float]
    sources: Sequence[str]

    def weights(self) -> Tensor:
        """fp64 [M]: the sources weigh the same, all together 1."""
        counts = {name: list(self.sources).count(name) for name in set(self.sources)}
        return torch.tensor([1.0 / (counts[name] * len(counts)) for name in self.sources], dtype=torch.float64)


def breaking_level(kl_MJ: Tensor, levels: Sequence[float], budget: float) -> Tensor:
    """Level [M] up to which the divergence stays within the budget, straight between measured levels in the log of the
    divergence; fp64. Divergences that fall at a higher level count as if they did not.
    """
    log_MJ = kl_MJ.double().clamp_min(FLOOR).log().cummax(1).values
    level_J = torch.tensor(levels, dtype=torch.float64)
    inside_M = (log_MJ <= torch.tensor(budget).log()).sum(1)
    last_M = (inside_M - 1).clamp(0, len(levels) - 2)[:, None]
    low, high = log_MJ.gather(1, last_M)[:, 0], log_MJ.gather(1, last_M + 1)[:, 0]
    share = ((torch.tensor(budget).log() - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    begin, end = level_J[last_M[:, 0]], level_J[last_M[:, 0] + 1]
    return torch.where(inside_M == len(levels), level_J[-1], begin + share * (end - begin))


@torch.no_grad()
def fit_levels(
    routers: Sequence[LevelRouter], order: Sequence[int], outcomes: Outcomes, sparse: SparseConfig,
    contrast: float = CONTRAST,
) -> list[float]:  # fmt: skip
    """Fit the routers of all layers, in place.

    Args:
        routers: in layer order; their budget is what is fitted for.
        order: all heads, as layer * K + KV head, the least needed first.
        contrast: factor of a level's distance from the mean level; 1 is plain regression.

    Returns:
        Share of the variance of the breaking level that each layer's router explains.

    Raises:
        ValueError: an order or outcomes of another size.
    """
    heads = len(routers) * routers[0].kv_heads
    if sorted(order) != list(range(heads)) or outcomes.reach_MLR.shape[1] != len(routers):
        raise ValueError(
            f"an order of {len(order)} heads and outcomes of {outcomes.reach_MLR.shape[1]} layers do not fit "
            f"{len(routers)} layers with {heads} KV heads"
        )
    rank = torch.empty(heads)
    rank[list(order)] = (torch.arange(heads) + 0.5) / heads
    weight_M, budget = outcomes.weights(), routers[0].config.budget
    wanted = {b: breaking_level(outcomes.kl_MJ, outcomes.levels, b) for b in (budget / BESIDE, budget, budget * BESIDE)}
    low, at, high = wanted.values()
    slope = float(((high - low) * weight_M).sum()) / (2 * torch.tensor(BESIDE).log().item())
    explained = []
    for layer, (router, rank_K) in enumerate(zip(routers, rank.view(len(routers), -1), strict=True)):
        reach_MR = outcomes.reach_MLR[:, : layer + 1].flatten(1)
        features = router.features(reach_MR, outcomes.length_M, sparse).double()
        router.begin_in_order(rank_K, 0.0)
        explained.append(_fit(router, features, at, weight_M, contrast))
        router.slope.fill_(slope)
        router.fitted_budget.fill_(budget)
    return explained


def _fit(router: LevelRouter, features_MF: Tensor, wanted_M: Tensor, weight_M: Tensor, contrast: float) -> float:
    """Fit one router; share of the wanted levels' variance that it explains, before the contrast."""
    router.count.zero_()
    router.update_statistics(features_MF.float())
    z_MF = (features_MF - router.mean) * router.scale
    z_mean, mean = (z_MF * weight_M[:, None]).sum(0), (wanted_M * weight_M).sum()
    centred, target = z_MF - z_mean, wanted_M - mean
    gram = (centred * weight_M[:, None]).T @ centred + RIDGE * torch.eye(z_MF.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(gram, (centred * weight_M[:, None]).T @ target)
    left = target - centred @ solution
    router.weight.copy_(contrast * solution)
    router.bias.copy_(mean - contrast * z_mean @ solution)
    spread = (weight_M * target.square()).sum()
    return float(1 - (weight_M * left.square()).sum() / spread.clamp_min(1e-12))
