"""Long prompts: a layer's MLP and norms work on a bounded number of tokens at a time (docs/design.md section 7).

Attention needs the whole prompt, because routing needs its end; these modules treat every token alone, so their large
intermediate results (an MLP's is 3.5 times as wide as the model, a norm's is in fp32) never exist for all tokens.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from elastic.model.families import feed_forward
from elastic.protocols import Decoder, Module


class Instead:
    """What is called in place of a module's forward, `inner`, until `give_back`. Copies with its model."""

    def __init__(self, module: nn.Module) -> None:
        self.inner = module.forward


class Fused(Protocol):
    """Does a module's work its own way where it can (`elastic.model.fusing`)."""

    def takes(self, hidden: Tensor) -> bool:
        """Whether it does this call."""
        ...

    def __call__(self, hidden: Tensor) -> Tensor:
        """What the module would return."""
        ...


class Chunked(Instead):
    """A module's forward, `size()` tokens at a time. Callable in place of the method; copies with its model.

    Args:
        module: maps [B, S, ...] to the same shape and dtype, every token alone; experts may return a pair.
        size: tokens at a time; 0 is all at once.

    Attributes:
        fused: what runs instead of the module where it can.
    """

    def __init__(self, module: nn.Module, size: Callable[[], int]) -> None:
        super().__init__(module)
        self.size = size
        self.run: Callable[..., Any] = self.inner
        self.fused: Fused | None = None

    def compile(self, **settings: Any) -> None:
        """Let `torch.compile` with these settings run the module's work on a chunk."""
        self.run, self.fused = torch.compile(self.inner, **settings), None

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.fused is not None and self.fused.takes(hidden):
            return self.fused(hidden)
        size = self.size()
        if hidden.dim() < 3 or not 0 < size < hidden.shape[1] or torch.is_grad_enabled():
            return self.run(hidden, *args, **kwargs)
        out, others = torch.empty_like(hidden), list[Tensor]()
        for start in range(0, hidden.shape[1], size):
            part = hidden[:, start : start + size].contiguous()  # experts view it as one list of tokens
            found = self.run(part, *args, **kwargs)
            if isinstance(found, tuple):  # with how the experts of every token were weighted, [B * S, experts]
                found, weights = found
                others.append(weights.unflatten(0, part.shape[:2]))
            out[:, start : start + size] = found
        return (out, torch.cat(others, 1).flatten(0, 1)) if others else out


def token_modules(decoder: Decoder) -> list[nn.Module]:
    """The MLPs and norms of a decoder: what treats every token alone and needs memory."""
    found = [feed_forward(layer) for layer in decoder.layers]
    return found + [module for name, module in decoder.named_modules() if name.rpartition(".")[2].endswith("norm")]


def chunk(decoder: Decoder, size: Callable[[], int]) -> None:
    """Chunk a decoder's MLPs and norms from outside."""
    for module in token_modules(decoder):
        module.forward = Chunked(module, size)


def give_back(root: nn.Module | Module) -> None:
    """Give a module and everything inside it their own forward again, which `Instead` took the place of."""
    for module in root.modules():
        if not isinstance(vars(module).get("forward"), Instead):
            continue
        inner = vars(module).pop("forward").inner
        if getattr(inner, "__func__", None) is not type(module).forward:
            module.forward = inner  # somebody else's, from before
