"""From final hidden states to logits, as the backbone's own forward does it.

Losses and scores take the output head by itself, a chunk of positions at a time. Some families do more than that head:
Granite divides its logits, Cohere multiplies them, Gemma caps them.
"""

from typing import Any

import torch
from torch import Tensor, nn

from elastic.protocols import CausalLM


class ScaledHead(nn.Module):
    """An output head with what follows it: [..., E] -> logits [..., V].

    Args:
        head: the projection.
        config: of the model; `logits_scaling` divides, `logit_scale` multiplies, `final_logit_softcapping` caps.
    """

    def __init__(self, head: nn.Module, config: Any) -> None:
        super().__init__()
        self.head = head
        self.divisor, self.factor = getattr(config, "logits_scaling", 1), getattr(config, "logit_scale", 1)
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(self, hidden: Tensor) -> Tensor:
        """The model's logits, bit for bit."""
        logits: Tensor = self.head(hidden)
        if self.divisor != 1:
            logits = logits / self.divisor
        if self.factor != 1:
            logits = logits * self.factor
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits


def logit_head(model: CausalLM) -> nn.Module:
    """What makes a model's logits [..., V] of its final hidden states [..., E]: the output head itself where nothing
    follows it.
    """
    made = ScaledHead(model.get_output_embeddings(), model.config)
    return made.head if (made.divisor, made.factor, made.cap) == (1, 1, None) else made
