"""What an evaluation compares: the trained routers, the dense model, and baselines that need no training.

Every method is a choice of routes and of the modes behind them on the same model, so all of them run through one code
path.
Legend: L layers, K KV heads.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.config import Mode, SparseConfig

SCORES = ("loss", "accuracy", "exact")
RATIOS = ("msr", "esr_last", "esr_all")
DEFAULT_METHODS = ("dense", "elastic")
_CONFIGURATIONS: dict[str, tuple[Mode, Mode]] = {
    "fa-ssa": ("full", "streaming"),
    "fa-xa": ("full", "xattention"),
    "xa-ssa": ("xattention", "streaming"),
}
_KNOWN = (
    f"dense, elastic, elastic:<bias>, elastic:<{', '.join(_CONFIGURATIONS)}>[:<bias>], streaming, xattention, "
    "xattention:<threshold>, random:<msr> or random:<msr>:<seed>"
)


@dataclass(frozen=True)
class Method:
    """One way to choose routes.

    Attributes:
        name: `dense`, `streaming`, `xattention[:<threshold>]` (every head in that mode, whatever the configuration),
            `elastic` (the routers decide), `elastic:<bias>` (they decide at another `sparsity_bias`: another operating
            point), `elastic:<configuration>[:<bias>]` (their decisions choose between other modes than they were
            trained for),
            or `random:<msr>[:<seed>]`: the same heads, drawn once, on route 1 for every input.
        share: of heads on route 1; None where the routers decide.
        seed: of the random heads.
        bias: `sparsity_bias` instead of the configuration's; None leaves it.
        modes: of route 0 and route 1 instead of the configuration's; None leaves them.
        threshold: of XAttention, likewise.
    """

    name: str
    share: float | None
    seed: int = 0
    bias: float | None = None
    modes: tuple[Mode, Mode] | None = None
    threshold: float | None = None

    def sparse(self, own: SparseConfig) -> SparseConfig:
        """The modes and sizes that the method runs on a model configured with `own`."""
        route0, route1 = self.modes or (own.route0, own.route1)
        return replace(own, route0=route0, route1=route1, threshold=self.threshold or own.threshold)

    def routes(self, layers: int, kv_heads: int) -> Tensor | None:
        """Routes [L, K] for `override_routes`; None lets the routers decide."""
        if self.share is None:
            return None
        heads = layers * kv_heads
        order = torch.randperm(heads, generator=torch.Generator().manual_seed(self.seed))
        route = torch.zeros(heads)
        route[order[: round(self.share * heads)]] = 1.0
        return route.view(layers, kv_heads)

    @property
    def ratios(self) -> dict[str, str]:
        """Column names of MSR and ESR: plain for `elastic`, with the method's name for baselines, none for `dense`."""
        if self.name == "dense":
            return {}
        return {ratio: ratio if self.name == "elastic" else f"{self.name}_{ratio}" for ratio in RATIOS}


def parse_methods(names: list[str]) -> list[Method]:
    """Methods by name.

    Raises:
        ValueError: an unknown name, a name given twice, or a list without `elastic`.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"methods={names} names a method twice; name each once")
    if "elastic" not in names:
        raise ValueError(f"methods={names} lacks elastic; the routers are what is evaluated, add it")
    return [_parse(name) for name in names]


def columns(methods: list[Method]) -> tuple[str, ...]:
    """Names of everything measured per sample: `<method>_<score>`, then MSR and ESR."""
    scores = [f"{method.name}_{score}" for method in methods for score in SCORES]
    return (*scores, *(column for method in methods for column in method.ratios.values()))


def _parse(name: str) -> Method:
    fixed = {
        "dense": Method("dense", 0.0, modes=_CONFIGURATIONS["fa-ssa"]),
        "streaming": Method("streaming", 1.0, modes=_CONFIGURATIONS["fa-ssa"]),
        "xattention": Method("xattention", 1.0, modes=_CONFIGURATIONS["fa-xa"]),
        "elastic": Method("elastic", None),
    }
    if name in fixed:
        return fixed[name]
    kind, *numbers = name.split(":")
    try:
        if kind == "elastic":
            return _elastic(name, numbers)
        if kind == "xattention" and len(numbers) == 1 and 0 < float(numbers[0]) <= 1:
            return replace(fixed[kind], name=name, threshold=float(numbers[0]))
        share, seed = float(numbers[0]), int(numbers[1]) if len(numbers) == 2 else 0
        if kind != "random" or len(numbers) > 2 or not 0 <= share <= 1 or seed < 0:
            raise ValueError(name)
    except (ValueError, IndexError):
        raise ValueError(
            f"method {name!r} is not known; use {_KNOWN}, with a number <bias>, <threshold> in (0, 1], <msr> in "
            "[0, 1] and a whole <seed> of 0 or more"
        ) from None
    return Method(name, share, seed)


def _elastic(name: str, words: list[str]) -> Method:
    """`elastic:` with a configuration, a bias, or both. Raises ValueError where they are something else."""
    modes = _CONFIGURATIONS.get(words[0])
    bias = [float(word) for word in words[modes is not None :]]
    if len(bias) > 1 or not all(map(math.isfinite, bias)):
        raise ValueError(name)
    return Method(name, None, bias=bias[0] if bias else None, modes=modes)
