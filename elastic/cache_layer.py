"""One layer of `ElasticCache` as transformers sees it, and how its routes reach the host.

Legend: B samples, K KV heads, S tokens, D head dim.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from elastic.head_plan import HeadPlan
from elastic.kv_pool import KVPool


class HostCopy:
    """A small tensor on its way to the host."""

    def __init__(self, values: Tensor) -> None:
        self.event = None
        if values.device.type != "cuda":
            self.host = values.detach().clone()
            return
        self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self.host.copy_(values.detach(), non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def get(self) -> Tensor:
        """The values, once they have arrived."""
        if self.event is not None:
            self.event.synchronize()
            self.event = None
        return self.host


class ElasticLayer(CacheLayerMixin):
    """One layer of the cache `owner`: a pool, or keys and values that wait for their routes to reach the host."""

    is_sliding = False

    def __init__(self, owner: Any, index: int) -> None:
        super().__init__()
        self.owner, self.index = owner, index
        self.pool: KVPool | None = None
        self.plan: HeadPlan | None = None
        self.waiting: tuple[Tensor, Tensor, HostCopy] | None = None

    def lazy_initialization(self, key_states: Tensor, _value_states: Tensor | None = None) -> None:
        """Required of every layer; storage is made when the routes are known."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens [B, K, Lq, D]; returns what attention runs on: all positions of a prompt or a new turn
        (dropped ones as zeros), only the new token while decoding, which reads the pool.
        """
        if self.plan is None:
            raise ValueError(
                "an ElasticCache was given to a model without routers; call elastic.attach(model, config) or use "
                "transformers' DynamicCache"
            )
        self.lazy_initialization(key_states)
        return self.owner.take_in(self, key_states, value_states)

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.owner.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover."""
        return self.owner.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20
