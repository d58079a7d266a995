"""Routers that begin in an order of the heads, of a pattern file or a calibration. As they are, those of kind `static`
are routes that are the same for every input, and what works with trained routers works with them: caches, reports,
`sparsity_bias`, checkpoints.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.model.attach import Model, attach, handle_of, routers
from elastic.model.loading import architecture
from elastic.model.tensor_parallel import HeadShare
from elastic.routing.fixed_routes import head_order
from elastic.routing.methods import Method
from elastic.routing.router import Router, StaticRouter


def begin_in_order(model: Model, order: Sequence[int], msr: float) -> Model:
    """Let the routers of an attached model begin with the first heads of an order on route 1.

    The SA logit of a head is `STEEPNESS` (level - place in the order), so that `sparsity_bias` moves the level: +1 lets
    a tenth of all heads more run sparse. Static routers keep it, unless they are trained.

    Args:
        model: attached; routers of kind `paper` need `head_offset`, since what they share cannot tell heads apart.
        order: every head once, as layer * K + KV head, those first that need full attention least.
        msr: share of the heads on route 1.

    Returns:
        The same model.

    Raises:
        ValueError: routers that cannot hold an order, an order that does not name every head once, or an MSR outside
            [0, 1].
    """
    place_in_order(routers(model), order, msr, handle_of(model).share)
    return model


def place_in_order(
    own: Sequence[Router],
    order: Sequence[int],
    msr: float,
    share: HeadShare = HeadShare(),  # noqa: B008 - a tuple
) -> None:
    """`begin_in_order` for the routers of all layers, without a model; of all its heads, or of a share of them."""
    heads = len(own) * own[0].kv_heads * share.parts
    if sorted(order) != list(range(heads)):
        raise ValueError(f"the order has {len(order)} entries; expected each of the {heads} heads of the model once")
    if not 0 <= msr <= 1:
        raise ValueError(f"msr={msr} is not a share of the heads; expected a number from 0 to 1")
    place = torch.empty(heads)
    place[list(order)] = (torch.arange(heads, dtype=torch.float32) + 0.5) / heads
    for router, place_K in zip(own, place.view(len(own), -1), strict=True):
        router.begin_in_order(place_K[share.mine(len(place_K))], round(msr * heads) / heads)


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
    order, level = head_order(Path(path), shape["num_layers"], shape["num_kv_heads"], msr, shape, sparse)
    return begin_in_order(attach(model, ElasticConfig(RouterConfig(kind="static"), sparse)), order, level)


def attach_fixed(model: Model, method: Method, sparse: SparseConfig) -> Model:
    """Attach static routers that hold the routes of a method, whatever the bias.

    Args:
        model: a stock model.
        method: one whose routes no router decides.
        sparse: what the heads choose between.

    Raises:
        OSError, ValueError: a file of the method that cannot be read or does not fit the model.
    """
    shape = architecture(model)
    routes = method.routes(shape["num_layers"], shape["num_kv_heads"], shape)
    assert routes is not None  # only of routers that decide by themselves
    attach(model, ElasticConfig(RouterConfig(kind="static"), sparse))
    for router, route_K in zip(routers(model), routes, strict=True):
        assert isinstance(router, StaticRouter)
        infinite = torch.where(route_K > 0.5, float("inf"), float("-inf"))
        router.logits.data[:, 1] = infinite.to(router.logits)
    return model
