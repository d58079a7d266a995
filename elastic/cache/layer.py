"""One layer of `ElasticCache` as transformers sees it, and how its routes reach the host.

Legend: B samples, K KV heads, S tokens, D head dim.
"""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import Layout
from elastic.cache.kv_pool import KVPool


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
    """One layer: a pool, or keys and values that wait for their routes to reach the host.

    Attributes:
        seen: tokens so far, padding included.
        layout, plan: of the present forward pass. The plan may follow after `update`, since some routers look at the
            new keys first.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers annotates no constructor of a layer
        self.seen = 0
        self.pool: KVPool | None = None
        self.layout: Layout | None = None
        self.plan: HeadPlan | None = None
        self.waiting: tuple[Tensor, Tensor] | None = None
        self.modes: HostCopy | None = None

    def begin(self, layout: Layout) -> None:
        """Before the layer runs."""
        self.layout, self.plan, self.modes = layout, None, None

    def follow(self, plan: HeadPlan) -> None:
        """Take the layer's plan, whose modes say what must be kept of a prompt or a turn."""
        self.plan = plan
        if not plan.layout.decoding:
            self.modes = HostCopy(plan.mode_NK)

    def lazy_initialization(self, key_states: Tensor, _value_states: Tensor | None = None) -> None:
        """Required of every layer; storage is made when the routes are known."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, rows_BK: Tensor, begin_B: Tensor, count_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take in new tokens [B, K, Lq, D].

        Args:
            rows_BK: rows of the pool that a decode step writes.
            begin_B, count_B: padding before, and valid tokens already held.

        Returns:
            What attention runs on: all positions of a prompt or a new turn (dropped ones as zeros); only the new token
            in a decode step, which reads the pool.
        """
        if self.layout is None:
            raise ValueError(
                "an ElasticCache was given to a model without routers; call elastic.attach(model, config) or use "
                "transformers' DynamicCache"
            )
        self.lazy_initialization(key_states)
        layout, self.seen = self.layout, self.layout.keys
        if layout.decoding:
            self.held().append(rows_BK, key_states, value_states)
            return key_states, value_states
        if layout.past:
            keys, values = self.held().dense(begin_B, count_B, layout.past)
            key_states, value_states = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
            self.pool = None
        self.waiting = (key_states, value_states)
        return key_states, value_states

    def held(self) -> KVPool:
        """The pool.

        Raises:
            ValueError: there is none yet.
        """
        if self.pool is None:
            raise ValueError("the cache is empty; run the prompt through the model first")
        return self.pool

    def get_seq_length(self) -> int:
        """Tokens so far, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask would cover."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        """Empty the layer."""
        self.seen, self.pool, self.waiting = 0, None, None
        self.layout = self.plan = self.modes = None
