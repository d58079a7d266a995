"""Models in parts by transformers' `tp_plan`: every process has some of the KV heads of each layer, and their routers'
part of what is kept by head. Decisions are made where the head is; only reports put them together.

Legend: K KV heads of the whole model.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from elastic.model.layer_types import has_sinks, stock_layers
from elastic.protocols import AttentionModule, CausalLM
from elastic.routing.router import PER_HEAD, Router


class HeadShare(NamedTuple):
    """Which of the KV heads are here: all of them, in one part.

    Attributes:
        parts, place: into how many parts the heads are cut, and which of them this is.
        group: the processes that have the parts.
    """

    parts: int = 1
    place: int = 0
    group: Any = None

    def mine(self, heads: int) -> slice:
        """Those of `heads` that are here."""
        here = heads // self.parts
        return slice(self.place * here, (self.place + 1) * here)

    def state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a router of these heads has of one of all heads, by the names of its tensors."""
        return {name: value[self.mine(value.shape[0])] if name in PER_HEAD else value for name, value in state.items()}

    def whole(self, part: Tensor) -> Tensor:
        """A tensor whose last axis is the heads here, put together with those of the other processes, all of which
        call it; on the CPU where it was there.
        """
        if self.parts == 1:
            return part
        device = "cpu" if dist.get_backend(self.group) == "gloo" else torch.device("cuda", torch.cuda.current_device())
        sent = part.to(device).contiguous()
        parts = [torch.empty_like(sent) for _ in range(self.parts)]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts, dim=-1).to(part.device)


def head_share(model: CausalLM, layers: list[AttentionModule]) -> HeadShare:
    """How a model is cut; whole ones are not.

    Raises:
        ValueError: KV heads that the parts do not divide, keys that are not cut by head, or no way to tell the parts.
    """
    parts: int = getattr(model, "tp_size", None) or 1
    if parts == 1:
        return HeadShare()
    heads, first = model.config.num_key_value_heads, layers[0]
    if heads % parts:
        raise ValueError(
            f"{heads} KV heads cannot be cut into {parts} parts, of which routers need whole heads; use tensor "
            "parallelism over a divisor of the KV heads"
        )
    if not hasattr(first, "k_proj") or stock_layers(model.config) or has_sinks(model.config):
        raise ValueError(
            f"a {model.config.model_type} model was cut into {parts} parts by tensor parallelism, but fused "
            "projections, sliding or linear layers and attention sinks are routed in whole models only; load it "
            "without tp_plan"
        )
    norm: Any = getattr(first, "k_norm", None)
    if norm is not None and tuple(norm.weight.shape) != (first.head_dim,):
        raise ValueError(
            f"{type(first).__name__} norms the keys of all heads together, which its {parts} parts do not have; load "
            "it without tp_plan"
        )
    weight: Any = first.k_proj.weight
    mesh = getattr(weight, "device_mesh", None)
    if mesh is not None:
        return HeadShare(parts, mesh.get_local_rank(), mesh.get_group())
    if dist.is_initialized() and dist.get_world_size() == parts:
        return HeadShare(parts, dist.get_rank())
    raise ValueError(
        f"the model is cut into {parts} parts by tensor parallelism, but nothing says which of them is here; load it "
        "with tp_plan in as many processes"
    )


def check_routers(made: list[Router], share: HeadShare) -> None:
    """Refuse routers that need the heads of other processes.

    Raises:
        ValueError: routers by level or reach on a model in parts.
    """
    if share.parts > 1 and made[0].after_rope:
        raise ValueError(
            "routers by level or reach look at all heads of the layers before, of which tensor parallelism leaves each "
            "process some; use routers of kind paper or static, or load the model without tp_plan"
        )
