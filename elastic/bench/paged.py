"""`elastic bench paged`: the kernels over an engine's pages beside those of contiguous keys, and decoding beside itself
with every head full.

The contestants of a case take turns in every round, and factors are medians over the rounds. Pages lie in a random
order. Caches of the default lengths are many times the L2 cache, so they are read from memory. Legend: B requests, L
cached tokens, H query heads, K KV heads, D head dim, N pages of T tokens.
"""

import argparse
import importlib.metadata
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from elastic.bench import records
from elastic.bench.cases import DTYPES, PATTERN
from elastic.bench.contestants import FA4_PACKAGE
from elastic.bench.decode import PEAKED, DecodeCase
from elastic.bench.options import add_record_options, kernel_device, streaming_heads
from elastic.bench.race import DISAGREED, TOLERANCE, largest_difference, measure_cases
from elastic.bench.records import LEFT_OUT, Measurement
from elastic.bench.replay import captured
from elastic.bench.timing import measure_in_turn
from elastic.console import say
from elastic.kernels import attention_decode, attention_forward, paged_decode, paged_forward, unsupported_reason
from elastic.kernels.pages import LEAST_PAGE

SUMMARY = "prefill and decode over an engine's pages beside our kernels of contiguous keys"
PREFILL, DECODE = "prefill", "decode"
CALLS = {PREFILL: 1, DECODE: 5}  # in a graph
TIME_FACTOR, SPEED_FACTOR = "time over contiguous", "speed over dense"
LAYOUTS = ("tokens", "heads")  # [2, N, T, K, D], and [N, K, T, 2 D] as of vLLM 0.32
Call = Callable[[], tuple[Tensor, ...]]


class PagedInputs(NamedTuple):
    """Tensors of a case: q [S, H, D]; contiguous k, v [B, L, K, D]; the same in pools [N, T, K, D] with table [B, P];
    starts [B + 1], lengths [B], mode [B, K].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pools: tuple[Tensor, Tensor]
    table: Tensor
    starts: Tensor
    lengths: Tensor
    mode: Tensor


@dataclass(frozen=True)
class PagedCase(DecodeCase):
    """One line of the table: a prefill of `length` tokens, or a step of decoding after them."""

    kind: str = PREFILL
    page: int = 16
    layout: str = LAYOUTS[0]

    @property
    def name(self) -> str:
        """As the table calls it: prefill-streaming-6of8-64k-page16, decode-dense-128k-b8-page16."""
        words = [self.kind, super().name, f"page{self.page}", self.layout if self.layout != LAYOUTS[0] else ""]
        return "-".join(filter(None, words))

    def properties(self) -> dict[str, object]:
        """What a record says about its case."""
        return {**super().properties(), "kind": self.kind, "page": self.page, "layout": self.layout}

    def paged_inputs(self, device: str) -> PagedInputs:
        """Random operands on a device."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=DTYPES[self.dtype])

        queries = self.length if self.kind == PREFILL else 1
        q = normal(self.batch * queries, self.heads, self.head_dim) * (PEAKED if self.kind == DECODE else 1.0)
        k, v = (normal(self.batch, self.length, self.kv_heads, self.head_dim) for _ in range(2))
        entries = self.length // self.page
        table = torch.randperm(self.batch * entries, generator=generator, device=device).view(self.batch, entries)
        numbers = {"dtype": torch.int32, "device": device}
        starts = torch.arange(self.batch + 1, **numbers) * queries  # type: ignore[call-overload]
        lengths = torch.full((self.batch,), self.length, **numbers)  # type: ignore[call-overload]
        mode = torch.zeros(self.batch, self.kv_heads, **numbers)  # type: ignore[call-overload]
        mode[:, : self.streaming] = 1
        return PagedInputs(q, k, v, self._pools(k, v, table), table.int(), starts.int(), lengths, mode)

    def _pools(self, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """The same keys and values in pages, [N, T, K, D] each."""
        shape = (table.numel(), self.page, self.kv_heads, self.head_dim)
        if self.layout == "tokens":
            cache = k.new_empty(2, *shape)
        else:
            cache = k.new_empty(shape[0], shape[2], shape[1], 2, shape[3]).permute(3, 0, 2, 1, 4)
        for pool, x in zip(cache, (k, v), strict=True):
            pool[table.flatten()] = x.view(shape)
        return cache[0], cache[1]


def paged(case: PagedCase, inputs: PagedInputs, mode: Tensor) -> Call:
    """Our operator over pages, with heads of these modes."""
    q, _, _, pools, table, starts, lengths, _ = inputs
    if case.kind == DECODE:
        return lambda: (paged_decode(q, *pools, table, lengths, mode, PATTERN)[None],)
    return lambda: (paged_forward(q, *pools, table, starts, lengths, mode, PATTERN)[0][None],)


def contiguous(case: PagedCase, inputs: PagedInputs) -> Call:
    """Our operator over the same keys in one piece."""
    q, k, v, mode = inputs.q, inputs.k, inputs.v, inputs.mode
    if case.kind == PREFILL:
        per_row = q.view(case.batch, case.length, *q.shape[1:])
        return lambda: (attention_forward(per_row, k, v, mode, PATTERN)[0].flatten(0, 1)[None],)
    first = torch.arange(case.batch, device=q.device)[:, None] * case.length * case.kv_heads
    base = first + torch.arange(case.kv_heads, device=q.device)
    begin, end = (case.length - PATTERN.window) * mode, torch.full_like(mode, case.length)
    sink = PATTERN.sink * mode
    return lambda: (attention_decode(q, k, v, base, sink, begin, end, token_stride=case.kv_heads)[None],)


def _varlen(case: PagedCase, inputs: PagedInputs) -> dict[str, object]:
    """What the FlashAttention interfaces over pages are called with, beside q and the pools."""
    queries = case.length if case.kind == PREFILL else 1
    return {"cu_seqlens_q": inputs.starts, "seqused_k": inputs.lengths, "max_seqlen_q": queries,
            "max_seqlen_k": case.length, "causal": True}  # fmt: skip


def _fa4(case: PagedCase, inputs: PagedInputs) -> Call:
    from flash_attn.cute import flash_attn_varlen_func

    options = {**_varlen(case, inputs), "page_table": inputs.table}

    def call() -> tuple[Tensor, ...]:
        found = flash_attn_varlen_func(inputs.q, *inputs.pools, **options)
        return ((found[0] if isinstance(found, tuple) else found)[None],)

    return call


def _vllm(case: PagedCase, inputs: PagedInputs) -> Call:
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    options = {**_varlen(case, inputs), "block_table": inputs.table}
    return lambda: (flash_attn_varlen_func(inputs.q, *inputs.pools, **options)[None],)


class Rival(NamedTuple):
    """Dense attention over pages by somebody else: what it is, the distribution it needs, how its call is built."""

    about: str
    package: str
    build: Callable[[PagedCase, PagedInputs], Call]

    @property
    def installed(self) -> bool:
        """Whether the distribution is there."""
        return bool(list(importlib.metadata.distributions(name=self.package)))


RIVALS = {
    "fa4": Rival(f"{FA4_PACKAGE} over pages (dense)", FA4_PACKAGE, _fa4),
    "vllm": Rival("vLLM's FlashAttention (dense)", "vllm", _vllm),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    listed = "; ".join(f"{name}: {rival.about}" for name, rival in RIVALS.items())
    parser.add_argument("--prefill-lengths", type=int, nargs="*", default=(65536,), metavar="N",
                        help="tokens of a prefill of one request (default 65536)")  # fmt: skip
    parser.add_argument("--decode-lengths", type=int, nargs="*", default=(131072,), metavar="N",
                        help="cached tokens of each request in decoding (default 131072)")  # fmt: skip
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="requests in decoding (default 8)")
    parser.add_argument("--msr", type=float, nargs="+", default=(0.75, 0.0), metavar="R",
                        help="shares of streaming KV heads (default 0.75 0)")  # fmt: skip
    parser.add_argument(
        "--pages", type=int, nargs="+", default=(16,), metavar="T", help="tokens of a page (default 16)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, default=LAYOUTS[0],
                        help="of the cache: [2, N, T, K, D] (default), or [N, K, T, 2 D] as of vLLM 0.32")  # fmt: skip
    parser.add_argument("--heads", type=int, default=32, metavar="H", help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, default=8, metavar="K", help="KV heads (default 8)")
    parser.add_argument("--head-dim", type=int, default=128, metavar="D", help="64 or 128 (default 128)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="element type (default bf16)")
    parser.add_argument("--contestants", nargs="*", choices=list(RIVALS), metavar="NAME",
                        help=f"who runs beside our kernels (default: all that are installed). {listed}")  # fmt: skip
    add_record_options(parser, "paged")


def cases_of(args: argparse.Namespace) -> list[PagedCase]:
    """The cases that the options ask for.

    Raises:
        ValueError: a length, ratio, batch, page or head shape that does not fit.
    """
    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}; expected at least 1 request")
    for page in args.pages:
        if page < LEAST_PAGE or page & (page - 1) or page > 128:
            raise ValueError(f"--pages {page}; expected powers of two from {LEAST_PAGE} to 128")
    shape = {name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim", "dtype", "layout")}
    found = []
    for kind, lengths, batch in ((PREFILL, args.prefill_lengths, 1), (DECODE, args.decode_lengths, args.batch)):
        for length in lengths:
            for page in args.pages:
                for ratio in args.msr:
                    streaming = streaming_heads(ratio, args.kv_heads)
                    found.append(PagedCase(length, streaming, batch=batch, kind=kind, page=page, **shape))
    if not found:
        raise ValueError("no case to time; give --prefill-lengths or --decode-lengths at least one value")
    return found


def _contestants(
    case: PagedCase, inputs: PagedInputs, rivals: Mapping[str, Rival]
) -> tuple[dict[str, Call], list[tuple[str, str]]]:
    """Calls to time by name, ours first, and who is left out and why."""
    calls = {"ours": paged(case, inputs, inputs.mode)}
    if case.streaming:
        calls["dense"] = paged(case, inputs, torch.zeros_like(inputs.mode))
    left_out = []
    others: dict[str, tuple[str, Callable[[], Call]]] = {"contiguous": ("ours", lambda: contiguous(case, inputs))}
    for name, rival in rivals.items():
        others[name] = ("dense" if case.streaming else "ours", partial(rival.build, case, inputs))
    for name, (like, build) in others.items():
        try:
            call = build()
            difference = largest_difference(call(), calls[like]())
            if difference <= TOLERANCE:
                calls[name] = call
                continue
            why = f"{DISAGREED} by {difference:.3g}, allowed is {TOLERANCE}"
        except Exception as error:  # noqa: BLE001 - a competitor that cannot run is a result, stated in the table
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        left_out.append((name, why))
    return calls, left_out


def run_case(case: PagedCase, rivals: Mapping[str, Rival], budget_ms: float, device: str) -> list[Measurement]:
    """Records of all contestants, and factors: ours over contiguous in time, dense over ours."""
    inputs = case.paged_inputs(device)
    calls, left_out = _contestants(case, inputs, rivals)
    each = CALLS[case.kind]
    graphs = {name: captured(call, each) for name, call in calls.items()}
    times = measure_in_turn({name: graph.replay for name, graph in graphs.items()}, budget_ms)
    found: list[Measurement] = []
    for name, of_rounds in times.items():
        dense = replace(case, streaming=0)
        done = case if name in ("ours", "contiguous") else dense
        work, unit = (done.nbytes, "TB/s") if case.kind == DECODE else (done.flops(), "TFLOP/s")
        ms = statistics.median(of_rounds) / each
        shared = {"case": case.name, "who": name, "repeats": len(of_rounds) * each, **case.properties()}
        found.append({**shared, "metric": "time", "value": ms, "unit": "ms"})
        found.append({**shared, "metric": "eff", "value": work / ms / 1e9, "unit": unit})
        say(f"{case.name:44s} {name:10s} {ms:9.4f} ms  {work / ms / 1e9:7.2f} {unit}  {len(of_rounds)} rounds")
    for metric, over, under in ((TIME_FACTOR, "ours", "contiguous"), (SPEED_FACTOR, "dense", "ours")):
        if over in times and under in times:
            factor = statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))
            shared = {"case": case.name, "who": "ours", **case.properties()}
            found.append({**shared, "metric": metric, "value": factor, "unit": "x"})
            say(f"{case.name:44s} {metric}: {factor:.3f}")
    for name, why in left_out:
        say(f"{case.name:44s} {name:10s} left out: {why}")
        shared = {"case": case.name, "who": name, **case.properties()}
        found.append({**shared, "metric": LEFT_OUT, "value": None, "unit": "", "why": why})
    return found


def chosen(wanted: Sequence[str] | None) -> tuple[dict[str, Rival], list[str]]:
    """Who runs beside us, and by name who is not installed.

    Raises:
        ValueError: one asked for by name is not installed.
    """
    for name in wanted or ():
        if not RIVALS[name].installed:
            raise ValueError(
                f"{name} needs {RIVALS[name].package}, which is not installed; install it, or leave it out"
            )
    listed = [name for name in RIVALS if wanted is None or name in wanted]
    absent = [name for name in listed if not RIVALS[name].installed]
    return {name: RIVALS[name] for name in listed if name not in absent}, absent


def run(args: argparse.Namespace, command: str) -> int:
    """Time every case, show the table, write `<out>/<tag>.json`.

    Returns:
        0, or 1 where another's output differs from ours.

    Raises:
        ValueError: options that do not fit, or no GPU that runs the kernels.
    """
    cases, (rivals, absent) = cases_of(args), chosen(args.contestants)
    device = kernel_device(args, unsupported_reason)
    for name in absent:
        say(f"{name} left out: {RIVALS[name].package} is not installed")
    stamp, path = records.stamp(command, args.commit, device), Path(args.out) / f"{args.tag}.json"
    return measure_cases(cases, lambda case: run_case(case, rivals, args.budget_ms, str(device)), [], stamp, path)
