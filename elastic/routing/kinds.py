"""The kinds of routers by name."""

from elastic.config import RouterConfig
from elastic.routing.level import LevelRouter
from elastic.routing.router import AttentionRouter, Router, StaticRouter


def build_router(num_kv_heads: int, head_dim: int, config: RouterConfig) -> Router:
    """A router of the configured kind."""
    if config.kind == "static":
        return StaticRouter(num_kv_heads)
    if config.kind == "level":
        return LevelRouter(num_kv_heads, config)
    return AttentionRouter(num_kv_heads, head_dim, config)
