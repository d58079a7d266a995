"""The plugin's one option: `--additional-config '{"elastic": {"checkpoint": ...}}'`. No import of vLLM or torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

OPTION = "elastic"


@dataclass(frozen=True)
class Options:
    """What a user asks the plugin for.

    Attributes:
        checkpoint: folder of the routers; or a method's name (`elastic.routing.methods`), such as `static:<file>@0.7`
            or `dense`.
        sparsity_bias: added to the SA logit of every head, instead of the checkpoint's own bias.
        budget: level routers: divergence to stay below, in nats per answer token, instead of the checkpoint's.
    """

    checkpoint: str
    sparsity_bias: float | None = None
    budget: float | None = None

    @classmethod
    def of(cls, additional: Any) -> "Options | None":
        """The options among vLLM's `additional_config`; None where `elastic` is not among it.

        Raises:
            ValueError: an unknown key, a missing checkpoint, or a value of another kind.
        """
        if not isinstance(additional, Mapping) or OPTION not in additional:
            return None
        given, known = additional[OPTION], [field.name for field in fields(cls)]
        if not isinstance(given, Mapping):
            raise ValueError(f"{OPTION}={given!r} is not a mapping; expected keys among {', '.join(known)}")
        if unknown := [key for key in given if key not in known]:
            raise ValueError(f"unknown key {OPTION}.{unknown[0]}; known keys are {', '.join(known)}")
        checkpoint = given.get("checkpoint")
        if not isinstance(checkpoint, str) or not checkpoint:
            raise ValueError(
                f"{OPTION}.checkpoint={checkpoint!r} is not a text; expected the folder of a checkpoint, or a method "
                "such as static:<file>@0.7"
            )
        numbers = {name: _number(name, given.get(name)) for name in ("sparsity_bias", "budget")}
        if None not in numbers.values():
            raise ValueError(f"{OPTION}.sparsity_bias and {OPTION}.budget both say how sparse; give one of them")
        return cls(checkpoint, **numbers)


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{OPTION}.{name}={value!r} is not a finite number")
    return float(value)
