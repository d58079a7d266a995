"""Routes that are the same for every input, as routers of kind `static` whose logits follow an order of the heads. What
works with trained routers then works with them: caches, reports, `sparsity_bias`, checkpoints.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.model.attach import Model, attach, routers
from elastic.model.loading import architecture
from elastic.routing.fixed_routes import head_order
from elastic.routing.router import StaticRouter

BIAS_OF_ALL = 10.0  # `sparsity_bias` that moves the level over all heads: 1 is a tenth of them


def static_routers(model: Model, order: Sequence[int], msr: float) -> Model:
    """Fix the routes of an attached model whose routers are static: the first heads of an order run route 1.

    The SA logit of a head is (level - rank) / heads, times `BIAS_OF_ALL`, so that `sparsity_bias` moves the level along
    the order: +1 lets a tenth of all heads more run sparse.

    Args:
        model: attached with `RouterConfig(kind="static")`.
        order: every head once, as layer * K + KV head, those first that need full attention least.
        msr: share of the heads on route 1.

    Returns:
        The same model.

    Raises:
        ValueError: routers of another kind, an order that does not name every head once, or an MSR outside [0, 1].
    """
    own = routers(model)
    if not all(isinstance(router, StaticRouter) for router in own):
        raise ValueError(
            f"the model's routers are of kind {type(own[0]).__name__}, which decide by the input; detach the model and "
            "attach it with RouterConfig(kind='static')"
        )
    heads = len(own) * own[0].kv_heads
    if sorted(order) != list(range(heads)):
        raise ValueError(f"the order has {len(order)} entries; expected each of the {heads} heads of the model once")
    if not 0 <= msr <= 1:
        raise ValueError(f"msr={msr} is not a share of the heads; expected a number from 0 to 1")
    rank = torch.empty(heads)
    rank[list(order)] = torch.arange(heads, dtype=torch.float32)
    logit_LK = ((round(msr * heads) - 0.5 - rank) * (BIAS_OF_ALL / heads)).view(len(own), -1)
    for router, logit_K in zip(own, logit_LK, strict=True):
        (logits,) = router.head_logits()
        with torch.no_grad():
            logits.copy_(torch.stack([torch.zeros_like(logit_K), logit_K], dim=-1))
    return model


def attach_static(model: Model, path: str | Path, msr: float | None, sparse: SparseConfig) -> Model:
    """Attach static routers that follow a pattern file or a calibration (`elastic.routing.fixed_routes.head_order`).

    Args:
        model: a stock model; one that is refused stays as it was.
        msr: share of the heads on route 1; None: as the file says.
        sparse: what the heads choose between.

    Raises:
        OSError, ValueError: a file that cannot be read or does not fit the model.
    """
    shape = architecture(model)
    order, level = head_order(Path(path), shape["num_layers"], shape["num_kv_heads"], msr, shape)
    return static_routers(attach(model, ElasticConfig(RouterConfig(kind="static"), sparse)), order, level)
