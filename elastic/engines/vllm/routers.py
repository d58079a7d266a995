"""Routers for an engine that runs the backbone itself: from a checkpoint or by a method's name, without a model of
transformers.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.engines.vllm.options import OPTION, Options
from elastic.inference.budget import budget_bias
from elastic.model.checkpoint import read_routers
from elastic.model.loading import architecture
from elastic.model.ordered_routers import place_in_order
from elastic.routing.calibration import is_calibration, read_calibration
from elastic.routing.fixed_routes import head_order
from elastic.routing.methods import FORMS, Method, parse_method
from elastic.routing.router import Router, StaticRouter

_FAMILIES = ("granite", "llama", "mistral", "qwen2", "qwen3")  # vLLM has no attention module of its own for olmo2
_SERVED = ("full", "streaming")


@dataclass(frozen=True)
class Routing:
    """Routers of all layers, and the settings they run with.

    Attributes:
        config: settings; `sparsity_bias` as the user wants it.
        routers: in layer order, fp32 on the CPU.
    """

    config: ElasticConfig
    routers: list[Router]

    @property
    def fixed(self) -> bool:
        """Whether every request has the same routes."""
        return all(isinstance(router, StaticRouter) for router in self.routers)

    @property
    def shared_prefix(self) -> int | None:
        """Tokens of a prefix that requests may share; None: any number.

        Up to sink + window tokens a streaming head sees every key, so keys and values there are the same whatever the
        routes. After them, those of every layer but the first depend on the routes of the request that computed them.
        """
        if self.fixed and not self.config.dense_decode:
            return None
        return self.config.sparse.sink + self.config.sparse.window


def load_routing(options: Options, backbone: Any) -> Routing:
    """The routers that a user asks for, checked against the backbone.

    Args:
        backbone: its configuration (of transformers).

    Raises:
        FileNotFoundError: no such checkpoint or file.
        ValueError: a damaged one, one of another backbone, a family without support, or modes other than full and
            streaming.
    """
    if backbone.model_type not in _FAMILIES:
        raise ValueError(
            f"model family {backbone.model_type!r} is not supported by the vLLM plugin; tested families are "
            f"{', '.join(_FAMILIES)}"
        )
    shape, method = architecture(SimpleNamespace(config=backbone)), _method(options.checkpoint)
    if method is None or method.kind == "elastic":
        config, routers = read_routers(options.checkpoint if method is None else method.checkpoint or "", shape)
        config = config if method is None else replace(config, sparse=method.sparse(config.sparse))
        config = config if method is None or method.bias is None else replace(config, sparsity_bias=method.bias)
    else:
        config, routers = _fixed(method, shape)
    if not {config.sparse.route0, config.sparse.route1} <= set(_SERVED):
        raise ValueError(
            f"{OPTION}.checkpoint={options.checkpoint!r} runs {config.sparse.name}, but the plugin serves heads that "
            "are full or streaming; use routers of FA-SSA, or `elastic serve`"
        )
    if options.budget is not None:
        config = replace(config, sparsity_bias=budget_bias(routers[0], config, options.budget))
    if options.sparsity_bias is not None:
        config = replace(config, sparsity_bias=options.sparsity_bias)
    return Routing(config, routers)


def _method(name: str) -> Method | None:
    """The method of that name; None for the folder of a checkpoint, which may be missing."""
    if re.split("[:/@]", name, maxsplit=1)[0] not in FORMS or Path(name).exists():
        return None
    method = parse_method(name)
    if method.kind == "elastic" and method.checkpoint is None:
        raise ValueError(f"method {name!r} names no checkpoint; write elastic:<checkpoint> with its folder")
    return method


def _fixed(method: Method, shape: dict[str, Any]) -> tuple[ElasticConfig, list[Router]]:
    """Static routers of a method whose routes do not depend on the input."""
    layers, kv_heads, sparse = shape["num_layers"], shape["num_kv_heads"], SparseConfig()
    routers: list[Router] = [StaticRouter(kv_heads).eval() for _ in range(layers)]
    if method.file is not None:
        file = Path(method.file)
        if not file.is_file():
            raise FileNotFoundError(f"{method.name}: no file {file}; `elastic calibrate --out {file}` writes one")
        sparse = read_calibration(file).sparse if is_calibration(file) else sparse
        place_in_order(routers, *head_order(file, layers, kv_heads, method.msr, shape, sparse))
    else:
        routes = method.routes(layers, kv_heads, shape)
        assert routes is not None  # only of routers that decide by themselves
        for router, route_K in zip(routers, routes, strict=True):
            _always(router, route_K)
    return ElasticConfig(RouterConfig(kind="static"), method.sparse(sparse)), routers


def _always(router: nn.Module, route_K: Tensor) -> None:
    """Whatever the bias."""
    assert isinstance(router, StaticRouter)
    router.logits.data[:, 1] = torch.where(route_K > 0.5, float("inf"), float("-inf"))
