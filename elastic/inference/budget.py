"""The user's knob in quality: a budget of divergence from the dense model, as a bias of level routers."""

import math

from elastic.config import ElasticConfig
from elastic.model.attach import elastic_config, routers
from elastic.protocols import CausalLM
from elastic.routing.level import LevelRouter
from elastic.routing.router import STEEPNESS, Router


def bias_of_budget(model: CausalLM, budget: float) -> float:
    """The `sparsity_bias` at which level routers go as far as this budget allows instead of `router.budget`: levels are
    slope log(budget / router.budget) higher (docs/design.md section 3), whatever the model's own bias is.

    Args:
        model: attached, with level routers.
        budget: divergence from the dense model to stay below, in nats per answer token.

    Raises:
        ValueError: routers of another kind, which know nothing of divergences, or a budget that is not above 0.
    """
    return budget_bias(routers(model)[0], elastic_config(model), budget)


def budget_bias(router: Router, config: ElasticConfig, budget: float) -> float:
    """`bias_of_budget` for one of the routers and its settings, without a model.

    Raises:
        ValueError: as `bias_of_budget`.
    """
    if not isinstance(router, LevelRouter):
        raise ValueError(
            f"a budget was given, but the model has routers of kind {config.router.kind}, which know nothing of "
            "divergences; use sparsity_bias, or level routers (`elastic calibrate --levels`)"
        )
    if not isinstance(budget, int | float) or isinstance(budget, bool) or not 0 < budget < math.inf:
        raise ValueError(f"budget={budget!r} is not a number above 0; it counts nats per answer token, 0.1 is usual")
    return config.sparsity_bias + STEEPNESS * float(router.slope) * math.log(budget / config.router.budget)
