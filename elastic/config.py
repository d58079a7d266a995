"""Configuration of routers and sparse patterns (docs/design.md sections 2 and 3).

Frozen dataclasses without a torch import: cheap to build, safe to share, checked once at construction. `to_dict` and
`from_dict` are the form stored in a checkpoint's `elastic.json`.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

RopeScaling = Literal["yarn", "ntk"]  # elastic.model.rope_scaling
Mode = Literal["full", "streaming", "xattention", "moba", "nsa", "infllm", "flexprefill", "flashprefill"]
CHOOSING: tuple[Mode, ...] = ("xattention", "moba", "nsa", "infllm", "flexprefill", "flashprefill")
CHOOSING_IN_STEPS: tuple[Mode, ...] = ("nsa", "infllm")  # in decode steps too; the others attend in full there
SHORT: dict[Mode, str] = {
    "full": "FA", "streaming": "SSA", "xattention": "XA", "moba": "MoBA", "nsa": "NSA", "infllm": "InfLLM",
    "flexprefill": "FlexPrefill", "flashprefill": "FlashPrefill",
}  # fmt: skip
Granule = Literal["token", "block"]
FeatureNorm = Literal["running", "none"]
RouterKind = Literal["paper", "level", "reach", "static", "input"]
PoolOver = Literal["user", "prompt"]
CacheKind = Literal["full", "elastic"]

_LARGEST = 2**31 - 1  # 32 bits
BLOCK_SIZES = (4, 8, 16, 32, 64, 128)
SIZES: dict[Mode, tuple[str, ...]] = {  # settings of `SparseConfig` that what a mode attends to depends on
    "full": (), "streaming": ("sink", "window", "granule"), "xattention": ("block", "stride", "threshold"),
    "moba": ("block", "top_k", "chunk"), "nsa": ("window", "block", "top_k"),
    "infllm": ("sink", "window", "block", "top_k"), "flexprefill": ("block", "threshold", "min_budget"),
    "flashprefill": ("sink", "window", "block", "threshold"),
}  # fmt: skip
UNTOLD = {"pool_over": "prompt"}  # router settings of files from before there was a choice


@dataclass(frozen=True)
class RouterConfig:
    """How a router sees its layer.

    Attributes:
        pool_tokens: P of the boundary pooling: the first P and last P tokens are averaged (P >= 1).
        pool_over: of what the `user` wrote, so that neither the template nor another system prompt changes a decision,
            or of the whole `prompt` with its template, as checkpoints from before this setting were trained.
        budget: level routers go as far as the divergence from the dense backbone is expected to stay below this, in
            nats per answer token.
        caution: what level routers take off the level of a strange input, in MSR per deviation beyond the usual;
            higher keeps more full heads on inputs unlike those of training.
        feature_norm: `running` standardises the pooled keys with statistics gathered in training; `none` is the
            paper's router.
        kind: `paper` decides head by head from the keys; `level` goes down a measured order of the heads, as far as the
            input's reach and length allow; `reach` runs the heads that reach least sparse, without training; `static`
            learns one pattern for every input, the rival that elastic routing is measured against. A level router reads
            `budget` and `caution` alone, the last two none of the settings. `input` is what `paper` was called before.
        head_offset: add learned logits of each KV head to the router's. Standardising takes away what tells the heads
            of a layer apart, so without it a router that they share cannot say "this head, always".
    """

    pool_tokens: int = 100
    feature_norm: FeatureNorm = "running"
    kind: RouterKind = "paper"
    head_offset: bool = False
    pool_over: PoolOver = "user"
    budget: float = 0.1
    caution: float = 0.05

    def __post_init__(self) -> None:
        _check_int("router.pool_tokens", self.pool_tokens, minimum=1)
        _check_choice("router.pool_over", self.pool_over, get_args(PoolOver))
        _check_choice("router.feature_norm", self.feature_norm, get_args(FeatureNorm))
        if not isinstance(self.head_offset, bool):
            raise ValueError(f"router.head_offset={self.head_offset!r} is not true or false")
        if self.kind == "input":
            object.__setattr__(self, "kind", "paper")
        _check_choice("router.kind", self.kind, get_args(RouterKind))
        if not _is_number(self.budget) or not 0 < self.budget < math.inf:
            raise ValueError(f"router.budget={self.budget!r} is not a number above 0; it counts nats per answer token")
        if not _is_number(self.caution) or not 0 <= self.caution < math.inf:
            raise ValueError(f"router.caution={self.caution!r} is not a number of 0 or more; 0 switches it off")


@dataclass(frozen=True)
class SparseConfig:
    """The attention modes of route 0 and route 1, and the sizes of the sparse patterns.

    Attributes:
        route0: mode of heads with route 0 (the paper's FA).
        route1: mode of heads with route 1 (the paper's SA).
        sink: tokens at the start of a sample that streaming heads always see; a multiple of `block`, 0 allowed.
        window: most recent tokens that streaming heads see, the query itself included; a positive multiple of `block`.
        block: block size of the head plan. The CUDA kernels take 64 and 128, the PyTorch path every size in
            `BLOCK_SIZES`.
        granule: whether the window's left edge moves by token or by block.
        stride: XAttention: antidiagonal stride S (appendix of the paper), a divisor of `block`.
        threshold: in (0, 1]. XAttention: share of the estimated mass that the selected blocks must hold; FlexPrefill:
            its gamma; FlashPrefill: its alpha.
        top_k: MoBA, NSA, InfLLM-V2: blocks that are chosen (`elastic.attention.selection`); None: as published.
        chunk: MoBA: tokens of its blocks, a multiple of `block`.
        min_budget: FlexPrefill: tokens that the vertical and the slash lines of a head cover at least.
    """

    route0: Mode = "full"
    route1: Mode = "streaming"
    sink: int = 128
    window: int = 2048
    block: int = 128
    granule: Granule = "token"
    stride: int = 16
    threshold: float = 0.9
    top_k: int | None = None
    chunk: int = 512
    min_budget: int = 1024

    def __post_init__(self) -> None:
        _check_choice("sparse.route0", self.route0, get_args(Mode))
        _check_choice("sparse.route1", self.route1, get_args(Mode))
        if self.route0 == self.route1:
            raise ValueError(
                f"sparse.route0 and sparse.route1 are both {self.route0!r}; routing needs two different modes, "
                "such as full/streaming (FA-SSA)"
            )
        if self.route0 in CHOOSING and self.route1 in CHOOSING:
            raise ValueError(
                f"sparse.route0={self.route0!r} and sparse.route1={self.route1!r} both choose key blocks, which one "
                "launch does by one method; make one of them full or streaming"
            )
        _check_choice("sparse.granule", self.granule, get_args(Granule))
        _check_int("sparse.block", self.block)
        if self.block not in BLOCK_SIZES:
            raise ValueError(
                f"sparse.block={self.block} is not supported; use one of {', '.join(map(str, BLOCK_SIZES))}"
            )
        _check_multiple("sparse.sink", self.sink, self.block, minimum=0)
        _check_multiple("sparse.window", self.window, self.block, minimum=self.block)
        _check_int("sparse.stride", self.stride, minimum=1)
        if self.has("xattention") and self.block % self.stride:
            raise ValueError(
                f"sparse.stride={self.stride} does not divide sparse.block={self.block}; use {min(16, self.block)}"
            )
        if not _is_number(self.threshold) or not 0.0 < self.threshold <= 1.0:
            raise ValueError(f"sparse.threshold={self.threshold!r} is not in (0, 1]; the paper uses 0.9")
        if self.top_k is not None:
            _check_int("sparse.top_k", self.top_k, minimum=1)
        if self.has("moba"):
            _check_multiple("sparse.chunk", self.chunk, self.block, minimum=self.block)
        _check_int("sparse.min_budget", self.min_budget, minimum=1)

    def has(self, mode: Mode) -> bool:
        """Whether one of the two routes leads to this mode."""
        return mode in (self.route0, self.route1)

    @property
    def sizes(self) -> tuple[str, ...]:
        """Names of the settings that what its heads attend to depends on, beside the modes."""
        by_block = ("block",) if self.has("streaming") and self.granule == "block" else ()
        return tuple(dict.fromkeys((*SIZES[self.route0], *SIZES[self.route1], *by_block)))

    @property
    def chooser(self) -> Mode | None:
        """The mode that chooses key blocks for each input, of which a configuration has at most one."""
        return next((mode for mode in (self.route0, self.route1) if mode in CHOOSING), None)

    @property
    def chooses_in_steps(self) -> bool:
        """Whether heads choose key blocks in decode steps too."""
        return self.chooser in CHOOSING_IN_STEPS

    @property
    def dense(self) -> "SparseConfig":
        """The same sizes with full attention as route 0's mode, so that routes of 0 are the dense model."""
        return dataclasses.replace(self, route0="full", route1="streaming")

    @property
    def name(self) -> str:
        """Name of the configuration as the paper writes it, such as `FA-SSA`."""
        return f"{SHORT[self.route0]}-{SHORT[self.route1]}"


@dataclass(frozen=True)
class ElasticConfig:
    """Everything `attach` needs to know.

    Attributes:
        router: how routers pool and standardise keys.
        sparse: which modes they choose between.
        sparsity_bias: added to the SA logit at inference; above 0 more heads run sparse, below 0 fewer. Not used in
            training.
        dense_decode: after the prefill, every head attends to the whole cache; by default heads keep their route.
        gradient_share: training on a GPU: share of the queries from which the gradient of the routes is estimated
            (unbiased); 1, 1/2, 1/3, ..., and 1 is exact.
        kv_cache: what `generate` keeps of a prompt: `full`, every token of every head; `elastic`, sink + window of the
            streaming heads and everything of the others, the same answers from less memory. A later turn on an elastic
            cache cannot route heads back that have dropped tokens.
        chunk_tokens: at inference, tokens that an MLP or a norm works on at a time, which bounds the memory of long
            prompts; 0 is all at once.
    """

    router: RouterConfig = field(default_factory=RouterConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    sparsity_bias: float = 0.0
    dense_decode: bool = False
    gradient_share: float = 1.0
    kv_cache: CacheKind = "full"
    chunk_tokens: int = 16384

    def __post_init__(self) -> None:
        for name, value, kind in (("router", self.router, RouterConfig), ("sparse", self.sparse, SparseConfig)):
            if not isinstance(value, kind):
                raise ValueError(
                    f"ElasticConfig.{name} is a {type(value).__name__}, expected {kind.__name__}; "
                    "use ElasticConfig.from_dict for plain dictionaries"
                )
        if not isinstance(self.dense_decode, bool):
            raise ValueError(
                f"dense_decode={self.dense_decode!r} is a {type(self.dense_decode).__name__}, expected true or false"
            )
        _check_choice("kv_cache", self.kv_cache, get_args(CacheKind))
        _check_int("chunk_tokens", self.chunk_tokens, minimum=0)
        if self.dense_decode and self.kv_cache == "elastic":
            raise ValueError(
                "dense_decode=True needs every token of every head, but kv_cache='elastic' drops those of streaming "
                "heads; use kv_cache='full' or dense_decode=False"
            )
        share = self.gradient_share
        if not _is_number(share) or not 0.0 < share <= 1.0 or abs(share * round(1 / share) - 1) > 1e-3:
            raise ValueError(
                f"gradient_share={share!r} is not 1, 1/2, 1/3, ...; 1.0 gives the exact gradient of the routes, 0.125 "
                "an estimate from every eighth query block"
            )
        if not _is_number(self.sparsity_bias):
            raise ValueError(
                f"sparsity_bias={self.sparsity_bias!r} is not a finite number; 0.0 leaves the routers' decisions as "
                "they are"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, the inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ElasticConfig":
        """Build from a nested dictionary; absent keys take their defaults.

        Raises:
            ValueError: a key that no field has, or a value out of range, named with what was expected.
        """
        values = dict(_known_keys(cls, values, ""))
        for name, kind in (("router", RouterConfig), ("sparse", SparseConfig)):
            if name in values:
                values[name] = kind(**_known_keys(kind, values[name], f"{name}."))
        return cls(**values)


def _known_keys(cls: type, values: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix or 'elastic config'} is a {type(values).__name__}, expected a mapping of settings")
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values:
        if key not in known:
            told = key if str(key).isprintable() else repr(key)
            raise ValueError(
                f"unknown setting {prefix}{told}; known settings are {', '.join(prefix + k for k in known)}"
            )
    return values


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(choices)}")


def _check_int(name: str, value: Any, minimum: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} is a {type(value).__name__}, expected a whole number")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name}={value} is below {minimum}; use {minimum} or more")
    if value > _LARGEST:
        raise ValueError(f"{name}={value!r:.20} is above {_LARGEST}, which is as far as the kernels count")


def _check_multiple(name: str, value: Any, block: int, minimum: int) -> None:
    _check_int(name, value)
    below = value // block * block
    if value % block or value < minimum:
        choices = sorted({max(minimum, below), max(minimum, below + block)})
        raise ValueError(
            f"{name}={value} is not a multiple of sparse.block={block} (at least {minimum}); use "
            f"{' or '.join(map(str, choices))}"
        )
