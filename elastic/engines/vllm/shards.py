"""The KV heads of one process under tensor parallelism, and routers for them.

Routers of kinds `paper`, `static` and `reach` decide each KV head from its own keys: a process has the slice for its
heads and asks nobody. Routers by level look at all heads of the layers so far: each process has them whole, and the
reach of the others is gathered once a layer and prompt.
Legend: K KV heads of the model, k of this process.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.routing.level import LevelRouter
from elastic.routing.router import AttentionRouter, Router, StaticRouter

_BY_HEAD = {AttentionRouter: ("mean", "var", "offset"), StaticRouter: ("logits",)}


def _alone(found: Tensor) -> Tensor:
    return found


@dataclass(frozen=True)
class Shard:
    """The place of a process among those that share a model's heads.

    Attributes:
        rank: from 0.
        size: processes.
        gather: from [..., k] of this process to [..., K] of all, in order of their ranks; called by all at once.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Tensor], Tensor] = _alone

    def own(self, found_K: Tensor) -> Tensor:
        """This process's heads [k] of all [K]."""
        return found_K.chunk(self.size)[self.rank]

    def router(self, whole: Router) -> Router:
        """The router of this process's heads; one by level as it is."""
        if self.size == 1 or isinstance(whole, LevelRouter):
            return whole
        made = copy.copy(whole)
        made._parameters, made._buffers = dict(whole._parameters), dict(whole._buffers)
        made.kv_heads = whole.kv_heads // self.size
        for name in _BY_HEAD.get(type(whole), ()):
            value = getattr(whole, name)
            if value is not None:
                own = self.own(value.detach()).clone()
                setattr(made, name, torch.nn.Parameter(own) if isinstance(value, torch.nn.Parameter) else own)
        return made


def check_heads(kv_heads: int, processes: int) -> None:
    """Refuse a model whose KV heads do not divide among the processes: some would share a head's decision.

    Raises:
        ValueError: they do not.
    """
    if kv_heads % processes:
        fit = [str(size) for size in range(1, kv_heads + 1) if kv_heads % size == 0]
        raise ValueError(
            f"tensor_parallel_size={processes} does not divide the model's {kv_heads} KV heads, each of which one "
            f"process must route; use one of {', '.join(fit)}"
        )
