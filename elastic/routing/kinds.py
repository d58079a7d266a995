"""The kinds of routers by name."""

from elastic.config import RouterConfig
from elastic.routing.level import LevelRouter
from elastic.routing.reach_router import ReachRouter
from elastic.routing.router import AttentionRouter, Router, StaticRouter


def build_router(num_kv_heads: int, head_dim: int, config: RouterConfig, layer: int = 0) -> Router:
    """A router of the configured kind for the layer of that index."""
    if config.kind == "static":
        return StaticRouter(num_kv_heads)
    if config.kind == "level":
        return LevelRouter(num_kv_heads, layer, config)
    if config.kind == "reach":
        return ReachRouter(num_kv_heads)
    return AttentionRouter(num_kv_heads, head_dim, config)
