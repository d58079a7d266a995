"""Lagrange multipliers of the two objectives (docs/design.md section 5): prices that ascend while the routers descend.

Every price is of one bound, ascends on the signed slack of that bound (what is over it counts up, what is left of it
counts down, so that a price relaxes once its bound holds) and is projected to [0, limit].
Legend: T task classes, C classes: the tasks and, last, `SPAN`.
"""

import torch
from torch import Tensor, nn

from elastic.data.tasks import TASKS

SPAN = "span"  # the class of all inputs, while they are routed alike
CLASSES = (*TASKS, SPAN)


class Multipliers(nn.Module):
    """One price for each of some classes under every name.

    Args:
        limit: bound on every price, so that it cannot grow without bound where a constraint cannot be met.
        classes: names of the classes.
        start: name -> what its prices begin at, from 0 to the limit.
    """

    def __init__(self, limit: float, classes: tuple[str, ...], start: dict[str, float]) -> None:
        super().__init__()
        if not limit > 0:
            raise ValueError(f"multiplier limit={limit} is not positive; 10 is usual")
        if not all(0 <= value <= limit for value in start.values()):
            raise ValueError(f"multipliers start at {start}, not within 0 and their limit={limit}; raise the limit")
        self.limit, self.classes, self.names = limit, classes, tuple(start)
        for name, value in start.items():
            self.register_parameter(name, nn.Parameter(torch.full((len(classes),), float(value))))

    def by_class(self) -> dict[str, float]:
        """`<name>/<class>` of every price."""
        rows = [(name, getattr(self, name).tolist()) for name in self.names]
        return {f"{name}/{of}": value for name, row in rows for of, value in zip(self.classes, row, strict=True)}

    @torch.no_grad()
    def project(self) -> None:
        """Back into the allowed range. Call after every ascent step."""
        for name in self.names:
            getattr(self, name).clamp_(0.0, self.limit)


class LagrangeMultipliers(Multipliers):
    """Prices [C] of an MSR outside its class's interval [lo, hi]: `u` of MSR - hi, `v` of lo - MSR, and `l2` of the
    squared distance to the interval, whose slack is never negative.

    A single signed price l1 for both bounds, as for the paper's point targets, is wrong for an interval: it does not
    relax inside, and what it gathered below the interval rewards sparsity above it.

    Args:
        limit: bound on every price.
        damping: what every `l2` begins at.
    """

    u: Tensor
    v: Tensor
    l2: Tensor

    def __init__(self, limit: float = 10.0, damping: float = 0.0) -> None:
        super().__init__(limit, CLASSES, {"u": 0.0, "v": 0.0, "l2": damping})


class BudgetMultipliers(Multipliers):
    """Prices `l` [T] of a divergence over its task's budget. One falls by at most its budget a step (times the rate),
    since no divergence is negative, and rises by whatever the divergence is over it: in the mean it does neither where
    the mean divergence is the budget.

    Args:
        limit: bound on every price.
        start: what every price begins at.
    """

    l: Tensor  # noqa: E741 - the symbol of the equation

    def __init__(self, limit: float = 10.0, start: float = 0.0) -> None:
        super().__init__(limit, TASKS, {"l": start})
