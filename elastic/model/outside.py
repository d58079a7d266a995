"""What other libraries do to a model from outside: they wrap it (peft, torch.compile) and move its weights away until a
module runs (accelerate).
"""

from typing import Any, cast

import torch
from torch import nn

from elastic.model.families import key_projection
from elastic.protocols import AttentionModule, CausalLM


def unwrapped(model: CausalLM) -> CausalLM:
    """The transformers model inside wrappers, whose own `generate` runs in the end; without any, the model itself."""
    from transformers import PreTrainedModel

    parts = model.modules() if isinstance(model, nn.Module) else iter(())
    return cast(CausalLM, next((part for part in parts if isinstance(part, PreTrainedModel)), model))


def device_of(attn: AttentionModule, layer: int, default: torch.device) -> torch.device:
    """Where a layer's keys are made, which is not where the weights of an offloaded layer are.

    Args:
        layer: its index, for the message.
        default: for projections without tensors of their own.

    Raises:
        ValueError: weights on the meta device, which nothing loads before the layer runs.
    """
    parts = list(key_projection(attn).modules())
    for hook in (getattr(part, "_hf_hook", None) for part in parts):
        for one in (hook, *getattr(hook, "hooks", ())):  # one of accelerate's, or several in a row
            device: Any = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    found = tensors[0].device if tensors else default
    if found.type == "meta":
        raise ValueError(
            f"layer {layer} is on the meta device, without values, and no hook of accelerate loads them; load the "
            "model by from_pretrained before routers are attached"
        )
    return found
