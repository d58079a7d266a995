"""What a forward pass runs with and what it leaves: the model's settings, what a thread forces on them, one pass, one
layer's call in it, and the decisions of the pass (docs/design.md section 6).

Settings belong to the model. What `override_routes` and `biased` force belongs to the thread (or asyncio task) that
asked for it, and decisions belong to their pass, so threads that share a model never see each other's. A pass reads
settings and forced values once, before its first layer; a layer that gradient checkpointing runs again, perhaps in
another thread, finds them in the pass.
Legend: L layers, N samples, K KV heads, D head dim.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import Layout
from elastic.attention.row_slice import RowSlice
from elastic.cache.pieces import Pieces
from elastic.cache.route_record import find_record
from elastic.config import ElasticConfig, SparseConfig
from elastic.model.fused_parts import Parts
from elastic.protocols import KVCache
from elastic.routing.router import Decision


@dataclass(frozen=True)
class PassRoutes:
    """Decisions of one forward pass.

    Attributes:
        route: [L, N, K] in {0, 1}, with the straight-through gradient in training.
        logits: [L, N, K, 2], route 0 first; None when the routes were given from outside.
        lengths: int64 [N]; tokens of each sample.
        density: float64 [L, N, K]; share of the visible pairs that XAttention heads visited
            (`elastic.attention.block_selection`). None if the configuration has no such heads.
    """

    route: Tensor
    logits: Tensor | None
    lengths: Tensor
    density: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PassRecord:
    """What the layers of one pass decided, by layer. Of a layer that gradient checkpointing runs again the first
    decision stays.

    Attributes:
        layout: where the samples lie.
        decisions: by layer.
        density_NK: by layer, what its XAttention heads visited.
    """

    layout: Layout
    decisions: dict[int, Decision] = field(default_factory=dict)
    density_NK: dict[int, Tensor] = field(default_factory=dict)

    def routes(self) -> PassRoutes:
        """The layers' decisions in one."""
        layout, layers = self.layout, sorted(self.decisions)
        decided = [self.decisions[layer] for layer in layers]
        logits = [decision.logits_NK2 for decision in decided if decision.logits_NK2 is not None]
        return PassRoutes(
            torch.stack([decision.route_NK for decision in decided]),
            torch.stack(logits) if len(logits) == len(decided) else None,
            torch.tensor(layout.bounds).diff() if layout.bounds else layout.end_N - layout.begin_N,
            torch.stack([self.density_NK[layer] for layer in layers]) if self.density_NK else None,
        )


class LastPass(threading.local):
    """What is known of the present thread's last pass. Copies and pickles of a model begin without it, since a record
    may be part of an autograd graph.

    Attributes:
        record: of the last pass that decided routes.
        watched: the last pass was asked which experts it chose (`output_router_logits`), which transformers collects
            by hooks that must see every layer once, and so whole.
    """

    record: PassRecord | None = None
    watched = False

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class AttachedState:
    """What is set on one attached model, for all its threads.

    Attributes:
        config: the model's configuration.
        temperature: of the Gumbel-softmax in training.
        row_slice: which part of the rows is here.
        fused: whether the router may run as one kernel where it can; tests and timings compare both ways.
        layer_parts: how norms, RoPE and activations run.
        last: the last decisions, by thread.
        parts: into how many parts tensor parallelism has cut the heads.
        places: by decoder layer, its place among those that have routers; a layer that is not named is its own.
        windows: the layers without routers, see `elastic.model.layer_types.stock_layers`.
        rope_switches: see `elastic.model.long_rope.switch_lengths`.
    """

    def __init__(self, config: ElasticConfig, parts: int = 1) -> None:
        self.config, self.parts = config, parts
        self.temperature = 1.0
        self.row_slice = RowSlice()
        self.fused, self.layer_parts = True, Parts()
        self.last = LastPass()
        self.places = dict[int, int]()
        self.windows = dict[int, int | None]()
        self.rope_switches: tuple[int, ...] = ()

    def chunk_tokens(self) -> int:
        """Tokens that an MLP or norm works on at a time; 0 is all at once."""
        return 0 if self.last.watched else self.config.chunk_tokens

    def config_in_force(self) -> ElasticConfig:
        """The configuration with what the present thread forces."""
        return forced_on(self).applied_to(self.config)


@dataclass(frozen=True)
class Forced:
    """What `override_routes`, `biased` and `user_wrote` ask for in the present thread; None leaves the model's own.

    Attributes:
        route: 0, 1, or [L, K] or [L, N, K] in {0, 1}.
        sparse: modes and pattern sizes.
        bias: `sparsity_bias`.
        user_spans: int64 [B, 2]; where the users' words are in the prompts to come.
        level_N: MSR [N] at which level routers run each sample, whatever they would say.
        generating: the model's `generate` is running, so tokens will follow every prompt.
        verifying: several tokens after the prompt are candidates of its answer, not a new turn.
        gumbel_LNK2: noise [L, N, K, 2] that the routes of the passes to come are drawn by.
        prompt_end: key position where the prompt ends that is being read in pieces.
        mask: the mask [B, S] of the prompts to come, on the host.
    """

    route: int | Tensor | None = None
    sparse: SparseConfig | None = None
    bias: float | None = None
    user_spans: Tensor | None = None
    level_N: Tensor | None = None
    generating: bool = False
    verifying: bool = False
    gumbel_LNK2: Tensor | None = None
    prompt_end: int | None = None
    mask: Tensor | None = None

    def applied_to(self, config: ElasticConfig) -> ElasticConfig:
        """The configuration under these modes and this bias."""
        if self.sparse is None and self.bias is None:
            return config
        bias = config.sparsity_bias if self.bias is None else self.bias
        return replace(config, sparse=self.sparse or config.sparse, sparsity_bias=bias)


_FORCED: ContextVar[Mapping[AttachedState, Forced] | None] = ContextVar("elastic_forced", default=None)


def forced_on(state: AttachedState) -> Forced:
    """What the present thread forces on a model."""
    return (_FORCED.get() or {}).get(state, Forced())


@contextmanager
def forcing(state: AttachedState, forced: Forced) -> Iterator[None]:
    """Force this on a model inside the context, in the present thread alone."""
    token = _FORCED.set({**(_FORCED.get() or {}), state: forced})
    try:
        yield
    finally:
        _FORCED.reset(token)


@contextmanager
def generating(state: AttachedState, verifying: bool) -> Iterator[None]:
    """Say that `generate` is running, and whether it verifies candidates, in the present thread alone."""
    with forcing(state, replace(forced_on(state), generating=True, verifying=verifying)):
        yield


@contextmanager
def reading(state: AttachedState, prompt_end: int) -> Iterator[None]:
    """Say that the passes to come are pieces of prompts that end at this key position, in the present thread alone."""
    with forcing(state, replace(forced_on(state), prompt_end=prompt_end)):
        yield


@contextmanager
def masked(state: AttachedState, mask: Tensor) -> Iterator[None]:
    """Say what the mask of the prompts to come is, which a pass of them then need not read back from a GPU, in the
    present thread alone.
    """
    with forcing(state, replace(forced_on(state), mask=mask)):
        yield


class ForwardPass:
    """What all layers of a pass share; the decoder's pre-hook builds it.

    Not a dataclass: FSDP2 copies dataclasses among a layer's arguments, casting their tensors, and what the layers then
    decide would end in the copy.

    Attributes:
        layout: where the samples lie.
        config: in force for this pass.
        record: what the layers decide.
        override: routes given from outside; None lets the routers decide.
        mode_LNK: in a decode step what every head does, by the decisions of the prefill; None: routes are decided.
        level_N: MSR that level routers are given, see `Forced`.
        row_slice, temperature, fused: see `AttachedState`.
        gumbel_LNK2: see `Forced`.
        places: see `AttachedState`; L counts the layers that have routers.
        masked: the call brought a mask.
        rotation: see `elastic.model.long_rope.rotation`.
        pieces: of the prompt that this pass reads a piece of.
    """

    __slots__ = (
        "config", "fused", "gumbel_LNK2", "layout", "level_N", "masked", "mode_LNK", "override", "pieces", "places",
        "record", "rotation", "row_slice", "temperature",
    )  # fmt: skip

    def __init__(
        self, layout: Layout, config: ElasticConfig, *, override: int | Tensor | None = None,
        mode_LNK: Tensor | None = None, row_slice: RowSlice | None = None, temperature: float = 1.0, fused: bool = True,
        level_N: Tensor | None = None, gumbel_LNK2: Tensor | None = None,
        places: Mapping[int, int] | None = None, masked: bool = True, pieces: Pieces | None = None,
    ) -> None:  # fmt: skip
        self.layout, self.config, self.record = layout, config, PassRecord(layout)
        self.override, self.mode_LNK = override, mode_LNK
        self.row_slice = row_slice or RowSlice()
        self.temperature, self.fused, self.level_N = temperature, fused, level_N
        self.gumbel_LNK2, self.masked, self.rotation, self.pieces = gumbel_LNK2, masked, 0, pieces
        self.places: Mapping[int, int] = {} if places is None else places

    @property
    def early(self) -> bool:
        """Whether this is a piece before the one that decides."""
        return self.pieces is not None and self.pieces.dense and self.layout.keys < self.pieces.end

    @property
    def pending(self) -> Pieces | None:
        """What the cache must keep for the piece after this one."""
        return self.pieces if self.pieces is not None and self.layout.keys < self.pieces.end else None

    def place(self, layer: int) -> int:
        """Place of a decoder layer among those that have routers: its index in L."""
        return self.places.get(layer, layer)

    def noise(self, layer: int) -> Tensor | None:
        """What the routes [N, K] of one layer are drawn by, [N, K, 2]; None: whatever comes."""
        return None if self.gumbel_LNK2 is None else self.gumbel_LNK2[layer]


@dataclass(frozen=True, eq=False)
class PendingCall:
    """What the attention function is handed where the router decides after RoPE.

    Attributes:
        of_pass: the pass.
        cache: the KV cache that the layer was given, or None.
        dropped_NK: bool; heads whose cached keys allow streaming attention only.
    """

    of_pass: ForwardPass
    cache: KVCache | None = None
    dropped_NK: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerCall:
    """What the attention function needs to know of its layer; the layer's pre-hook builds it.

    Attributes:
        of_pass: the pass.
        layer: its index in L, see `ForwardPass.place`.
        route_NK: of its heads, with the straight-through gradient in training.
        plan: what its heads do.
        cache: the KV cache that the layer was given, or None.
    """

    of_pass: ForwardPass
    layer: int
    route_NK: Tensor
    plan: HeadPlan
    cache: KVCache | None = None

    def remember_density(self, density_NK: Tensor | None) -> None:
        """Keep what XAttention heads visited in the pass's record and the cache's."""
        if density_NK is None:
            return
        self.of_pass.record.density_NK[self.layer] = density_NK
        record = find_record(self.cache)
        if record is not None:
            record.densities[self.layer] = density_NK
