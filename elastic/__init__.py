"""Elastic Attention: attention routers for frozen causal language models (arXiv 2601.17367).

Names are loaded on first use: `import elastic` alone imports neither torch nor Lightning nor CuPy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from elastic._version import __version__
from elastic.config import ElasticConfig, RouterConfig, SparseConfig

if TYPE_CHECKING:
    from elastic.cache.elastic_cache import ElasticCache
    from elastic.inference.generate import Generation, generate, load, new_cache, route_report
    from elastic.inference.report import RouteReport
    from elastic.model.attach import attach, detach, override_routes
    from elastic.model.checkpoint import save_elastic
    from elastic.model.compiling import compile_layers

_LAZY = {
    "ElasticCache": "elastic.cache.elastic_cache",
    "Generation": "elastic.inference.generate",
    "RouteReport": "elastic.inference.report",
    "attach": "elastic.model.attach",
    "compile_layers": "elastic.model.compiling",
    "detach": "elastic.model.attach",
    "override_routes": "elastic.model.attach",
    "save_elastic": "elastic.model.checkpoint",
    "load": "elastic.inference.generate",
    "generate": "elastic.inference.generate",
    "new_cache": "elastic.inference.generate",
    "route_report": "elastic.inference.generate",
}

__all__ = [
    "ElasticCache",
    "ElasticConfig",
    "Generation",
    "RouteReport",
    "RouterConfig",
    "SparseConfig",
    "__version__",
    "attach",
    "compile_layers",
    "detach",
    "generate",
    "load",
    "new_cache",
    "override_routes",
    "route_report",
    "save_elastic",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'elastic' has no attribute {name!r}; it offers {', '.join(__all__)}")
