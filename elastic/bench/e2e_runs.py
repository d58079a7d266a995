"""One case of `elastic bench e2e`: a prompt and some decode steps, timed and weighed."""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from elastic.attention.row_slice import RowSlice
from elastic.bench.e2e_floor import bytes_per_second, has_experts, products_ms, step_bytes
from elastic.bench.records import Measurement
from elastic.bench.stock_graph import captured, give_room, in_place_step
from elastic.cache.elastic_cache import ElasticCache
from elastic.cache.keyword import given
from elastic.inference.decode_graph import DecodeGraph
from elastic.model import layer_hooks
from elastic.model.attach import (
    elastic_config,
    handle_of,
    is_attached,
    override_routes,
    route_of,
    set_row_slice,
)
from elastic.model.pass_state import reading
from elastic.protocols import CausalLM, KVCache

Run = list[Measurement]
STOCK = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash2": SDPBackend.FLASH_ATTENTION}
_WARM_STEPS = 3
_TIMED_SDPA = "elastic-bench-sdpa"


@dataclass(frozen=True)
class Sizes:
    """What is timed: a prompt of `length` tokens, `repeats` times, then `new_tokens` decode steps (0: none) of `batch`
    copies of it; `piece`: the prompt in pieces of so many tokens (None: in one pass).
    """

    length: int
    new_tokens: int
    repeats: int
    batch: int = 1
    piece: int | None = None


def elastic_runs(model: CausalLM, sizes: Sizes, fused: bool = True) -> Run:
    """The attached model over an elastic cache; decode steps launched one by one and, on a GPU, as a CUDA graph.

    Args:
        fused: whether parts of a layer run fused where they can.
    """
    layers = len(model.get_decoder().layers)

    def new_cache() -> ElasticCache:
        return ElasticCache(layers, elastic_config(model), reserve=2 * (sizes.new_tokens + _WARM_STEPS))

    parts = handle_of(model).state.layer_parts
    before, parts.on = parts.on, fused
    try:
        with _timed_elastic(model) as clock:
            found, cache, token = _prefills(model, new_cache, sizes, clock)
        found.append(_record("MSR", float(route_of(cache).route.float().mean()), ""))
        if model.device.type == "cuda" and not has_experts(model):
            found.append(_beside_products(model, found, sizes.length))
        if sizes.new_tokens:
            found += _elastic_steps(model, cache, token, sizes)
        return found
    finally:
        parts.on = before


def _elastic_steps(model: CausalLM, cache: ElasticCache, token_11: Tensor, sizes: Sizes) -> Run:
    cache.batch_repeat_interleave(sizes.batch)
    token_B1 = token_11.expand(sizes.batch, 1)
    found = [_decode("decode", _stepper(model, cache), token_B1, sizes.new_tokens)]
    if model.device.type == "cuda":
        found.append(_decode("decode graph", DecodeGraph(model, cache).step, token_B1, sizes.new_tokens))
        found += _beside_floor(model, cache, found[-1:], sizes.batch)
    return found


def _beside_products(model: CausalLM, found: Run, length: int) -> Measurement:
    """How much longer the rest of a prompt takes than its matrix products alone."""
    rest = next(record["value"] for record in found if record["metric"] == "rest")
    return _record("rest over products", rest / products_ms(model, length, elastic_config(model).chunk_tokens), "x")


def _beside_floor(model: CausalLM, cache: KVCache, decoded: Run, batch: int) -> Run:
    """Which share of the tokens a second that the memory's speed allows is reached; nothing of a model with experts."""
    if has_experts(model):
        return []
    allowed = batch * bytes_per_second(model.device) / step_bytes(model, cache)
    return [_record("share of bandwidth", record["value"] / allowed, "") for record in decoded]


def given_runs(model: CausalLM, sizes: Sizes, route_LK: Tensor) -> Run:
    """`elastic_runs` under routes that are given, as static ones are, and so hold from the first piece."""
    with override_routes(model, route_LK):
        return elastic_runs(model, sizes)


def stock_runs(model: CausalLM, name: str, sizes: Sizes, compiled: bool = False) -> Run:
    """The stock model over transformers' DynamicCache; the prompt by one SDPA backend; decode steps by the fastest,
    launched one by one and, on a GPU, as a CUDA graph over the same cache written in place.

    Args:
        compiled: let torch.compile run the model, which is then not asked where its time goes.
    """
    from transformers import DynamicCache

    with stock_compiled(model) if compiled else nullcontext():
        with nullcontext(_Clock()) if compiled else _timed_stock(model) as clock, _only(model, name):
            found, cache, token = _prefills(model, lambda: DynamicCache(config=model.config), sizes, clock, compiled)
        if sizes.new_tokens == 0:
            return found
        cache.batch_repeat_interleave(sizes.batch)
        token_B1 = token.expand(sizes.batch, 1).contiguous()
        if not compiled:  # a cache that grows by concatenation has another shape in every step
            found += _fastest(model, "decode", lambda: _stepper(model, cache), token_B1, sizes.new_tokens)
        if model.device.type == "cuda":
            give_room(cache)
            step, backends = in_place_step(model, cache), [name] if compiled else STOCK  # each compiles for itself
            new = sizes.new_tokens
            timed = _fastest(model, "decode graph", lambda: captured(step, token_B1), token_B1, new, backends)
            best = [record for record in timed if record["metric"] == "decode graph"]
            found += [*timed, *_beside_floor(model, cache, best, sizes.batch)]
    return found


def _fastest(
    model: CausalLM,
    metric: str,
    make: Callable[[], Callable[[Tensor], Tensor]],
    token_B1: Tensor,
    new_tokens: int,
    backends: Iterable[str] = STOCK,
) -> Run:
    """Decode steps by each SDPA backend, and once more the fastest; a backend that fails says why."""
    found = []
    for backend in backends:
        with _only(model, backend):
            try:
                found.append(_decode(f"{metric} {backend}", make(), token_B1, new_tokens))
            except RuntimeError as error:
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                found.append({**_record(f"{metric} {backend}", None, "tokens/s"), "why": why})
    timed = [record for record in found if record["value"] is not None]
    return [*found, *({**max(timed, key=lambda r: r["value"]), "metric": metric} for _ in timed[:1])]


def _only(model: CausalLM, name: str) -> AbstractContextManager[None]:
    """Stock attention by one SDPA backend; the CPU has but one."""
    return sdpa_kernel(STOCK[name]) if model.device.type == "cuda" else nullcontext()


def _record(metric: str, value: float | None, unit: str) -> Measurement:
    return {"metric": metric, "value": value, "unit": unit}


def _ids(model: CausalLM, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(1, model.config.vocab_size, (1, length), generator=generator).to(model.device)


@torch.no_grad()
def _prefill(model: CausalLM, cache: KVCache, ids: Tensor, piece: int | None) -> Tensor:
    """Next token [1, 1] of a prompt that is read in one pass or in pieces."""
    token, in_pieces = ids, piece is not None and is_attached(model)
    with reading(handle_of(model).state, ids.shape[1]) if in_pieces else nullcontext():
        for part in ids.split(piece or ids.shape[1], dim=1):
            logits = model(part, use_cache=True, logits_to_keep=1, **given(cache)).logits
            token = logits[:, -1:].argmax(-1)
    return token


def _prefills(
    model: CausalLM, new_cache: Callable[[], Any], sizes: Sizes, clock: "_Clock", compiled: bool = False
) -> tuple[Run, Any, Tensor]:
    """Time to first token (median, as the user waits for it), where it goes (attention, router with its pooling, the
    rest: device time of the last run) and peak memory; the last run's cache and token.

    Args:
        compiled: another length compiles the model again, so it warms up on this one, and does not say where time goes.
    """
    length, piece = sizes.length, sizes.piece
    warm = length if compiled else min(length, 4096)
    _prefill(model, new_cache(), _ids(model, warm), piece)  # kernels compiled, workspaces there
    ids, times, token, before = _ids(model, length), [], torch.zeros(0), 0
    cache: Any = None
    for _ in range(sizes.repeats):
        del cache
        cache = new_cache()
        clock.spans.clear()
        before = _reset_peak(model.device)
        start = time.perf_counter()
        token = clock.timed("all", _prefill)(model, cache, ids, piece)
        _wait(model.device)
        times.append((time.perf_counter() - start) * 1e3)
    peak = torch.cuda.max_memory_allocated(model.device) if model.device.type == "cuda" else 0
    attention, router, everything = (clock.total(part) for part in ("attention", "router", "all"))
    found = [_record("first token", statistics.median(times), "ms"), _record("peak memory", peak, "bytes")]
    found.append(_record("KV cache", _cache_bytes(cache, model.device, before), "bytes"))
    if compiled:
        return found, cache, token
    found += [_record("attention", attention, "ms"), _record("router", router, "ms")]
    return [*found, _record("rest", everything - attention - router, "ms")], cache, token


def _cache_bytes(cache: KVCache, device: torch.device, before: int) -> int:
    """What the prompt left allocated on a GPU; on the CPU, the size of the cache's tensors."""
    held = cache.nbytes if isinstance(cache, ElasticCache) else 0  # gives every layer its storage
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) - before
    return held or sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _reset_peak(device: torch.device) -> int:
    """Start measuring the peak; returns the bytes allocated now."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _stepper(model: CausalLM, cache: KVCache) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def step(token_B1: Tensor) -> Tensor:
        return model(token_B1, use_cache=True, **given(cache)).logits

    return step


def _decode(metric: str, step: Callable[[Tensor], Tensor], token_B1: Tensor, new_tokens: int) -> Measurement:
    """Tokens a second of greedy decoding, those of all rows."""
    for _ in range(_WARM_STEPS):
        token_B1 = step(token_B1)[:, -1:].argmax(-1)
    _wait(token_B1.device)
    start = time.perf_counter()
    for _ in range(new_tokens):
        token_B1 = step(token_B1)[:, -1:].argmax(-1)
    _wait(token_B1.device)
    return _record(metric, token_B1.shape[0] * new_tokens / (time.perf_counter() - start), "tokens/s")


class _Clock:
    """Device time of calls, by CUDA events; on the CPU by the clock."""

    def __init__(self) -> None:
        self.spans: dict[str, list[tuple[Any, Any]]] = {}

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            first = self.now()
            result = call(*args, **kwargs)
            self.spans.setdefault(part, []).append((first, self.now()))
            return result

        return run

    @staticmethod
    def now() -> Any:
        if not torch.cuda.is_available():
            return time.perf_counter() * 1e3
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def total(self, part: str) -> float:
        """Milliseconds."""
        pairs = self.spans.get(part, [])
        return float(
            sum(last - first if isinstance(first, float) else first.elapsed_time(last) for first, last in pairs)
        )


@contextmanager
def _timed_elastic(model: CausalLM) -> Iterator[_Clock]:
    row_slice, clock = RowSlice(), _Clock()
    row_slice.attend = clock.timed("attention", row_slice.attend)
    previous = set_row_slice(model, row_slice)
    try:
        with patch.object(layer_hooks, "route_layer", clock.timed("router", layer_hooks.route_layer)):
            yield clock
    finally:
        set_row_slice(model, previous)


@contextmanager
def stock_compiled(model: CausalLM) -> Iterator[None]:
    """Inside the context torch.compile runs the stock model, as `torch.compile(model)` does."""
    part: Any = model  # of which the protocol lets nobody assign a method
    part.forward = torch.compile(model.forward)
    try:
        yield
    finally:
        del part.forward
        torch.compiler.reset()  # the next length is another program


@contextmanager
def _timed_stock(model: CausalLM) -> Iterator[_Clock]:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    clock = _Clock()
    AttentionInterface.register(_TIMED_SDPA, clock.timed("attention", sdpa_attention_forward))
    AttentionMaskInterface.register(_TIMED_SDPA, sdpa_mask)
    model.set_attn_implementation(_TIMED_SDPA)
    try:
        yield clock
    finally:
        model.set_attn_implementation("sdpa")
