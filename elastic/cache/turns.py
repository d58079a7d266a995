"""Turns of the conversations that a KV cache holds, and what was decided for each.

Legend: L layers, N samples, K KV heads.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Turn:
    """Tokens that were read in one pass under one decision: the prompt, a piece of it, or a later turn.

    Attributes:
        route_LNK: int8.
        density_LNK: float64, what XAttention heads visited; None if the configuration has none.
        begin_N, end_N: int64; tokens of each sample before it, and up to its end.
    """

    route_LNK: Tensor
    density_LNK: Tensor | None
    begin_N: Tensor
    end_N: Tensor

    def cut(self, held_N: Tensor) -> "Turn":
        """What is left of it in a cache that holds so many tokens of each sample."""
        return replace(self, begin_N=torch.minimum(self.begin_N, held_N), end_N=torch.minimum(self.end_N, held_N))

    def cpu(self) -> "Turn":
        """Itself on the host."""
        density = None if self.density_LNK is None else self.density_LNK.cpu()
        route, places = self.route_LNK.flatten(), torch.stack([self.begin_N, self.end_N])
        together = torch.cat([places.flatten(), route.to(places)]).cpu()  # one transfer
        begin, end = together[: places.numel()].view_as(places).unbind(0)
        return Turn(together[places.numel() :].view_as(self.route_LNK).to(route.dtype), density, begin, end)

    def joined(self, other: "Turn") -> "Turn":
        """Its samples, then those of another one."""
        density = None
        if self.density_LNK is not None and other.density_LNK is not None:
            density = torch.cat([self.density_LNK, other.density_LNK], 1)
        begin, end = torch.cat([self.begin_N, other.begin_N]), torch.cat([self.end_N, other.end_N])
        return Turn(torch.cat([self.route_LNK, other.route_LNK], 1), density, begin, end)

    def select(self, index: Tensor) -> "Turn":
        """Follow a cache whose samples became `index`."""
        density = None if self.density_LNK is None else self.density_LNK[:, index.to(self.density_LNK.device)]
        route = self.route_LNK[:, index.to(self.route_LNK.device)]
        return Turn(route, density, self.begin_N[index], self.end_N[index])


def joined_turns(ones: list[Turn], others: list[Turn], like: tuple[Turn, Turn]) -> list[Turn]:
    """Turns of two conversations as those of one batch: the last with the last, and where one has no more, it has read
    nothing. `like` are turns of the two.
    """
    longest = max(len(ones), len(others))
    both = [
        [replace(of, end_N=of.begin_N)] * (longest - len(turns)) + turns
        for turns, of in zip((ones, others), like, strict=True)
    ]
    return [one.joined(other) for one, other in zip(*both, strict=True)]
