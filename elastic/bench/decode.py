"""`elastic bench decode`: attention of one new token, streaming heads keeping sink and window only, beside dense SDPA.

Times are those of calls in a CUDA graph, and copies of the cache take turns, so that it is read from memory as between
the layers of a model. Legend: B samples, L cached tokens, H query heads, K KV heads, D head dim.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from elastic.bench import records
from elastic.bench.cases import DTYPES, SINK, WINDOW, Case
from elastic.bench.options import add_shape_options, kernel_device, streaming_heads
from elastic.bench.race import DISAGREED, TOLERANCE, largest_difference, measure_cases
from elastic.bench.records import LEFT_OUT, Measurement
from elastic.bench.replay import copies_beyond_cache, in_turn, replayed
from elastic.bench.timing import host_microseconds, measure
from elastic.console import say
from elastic.kernels import attention_decode, unsupported_reason

SUMMARY = "decode attention with an elastic cache beside dense SDPA"
LENGTHS, RATIOS = (8192, 32768, 131072), (0.0, 0.5, 0.75, 1.0)
PEAKED = 4.0  # deviation of the queries: few keys dominate, so outputs are of order one and errors show


class DecodeInputs(NamedTuple):
    """Tensors of a case: q [B, H, D]; copies of a pool of rows, keys and values [R, D]; base, begin, end [B, K]."""

    q: Tensor
    pools: list[tuple[Tensor, Tensor]]
    base: Tensor
    begin: Tensor
    end: Tensor


@dataclass(frozen=True)
class DecodeCase(Case):
    """One line of the table: `batch` samples of `length` cached tokens; streaming heads keep sink + window rows."""

    batch: int = 1

    @property
    def name(self) -> str:
        """As the table calls it: streaming-6of8-128k, dense-32k-b8."""
        return super().name + (f"-b{self.batch}" if self.batch > 1 else "")

    def properties(self) -> dict[str, object]:
        """What a record says about its case."""
        return {**super().properties(), "batch": self.batch}

    @property
    def kept(self) -> list[int]:
        """Rows that each KV head of a sample keeps, streaming heads first."""
        few = min(SINK + WINDOW, self.length)
        return [few] * self.streaming + [self.length] * (self.kv_heads - self.streaming)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that one call reads."""
        return 2 * self.batch * sum(self.kept) * self.head_dim * DTYPES[self.dtype].itemsize

    def decode_inputs(self, device: str) -> DecodeInputs:
        """Random operands on a device; sample after sample, head after head in the pool."""
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=DTYPES[self.dtype])

        kept = torch.tensor([self.kept] * self.batch, device=device)
        last = kept.flatten().cumsum(0).view_as(kept)
        rows = self.batch * sum(self.kept)
        q = PEAKED * normal(self.batch, self.heads, self.head_dim)
        first = normal(rows, self.head_dim), normal(rows, self.head_dim)
        copies = 1 if device == "cpu" else copies_beyond_cache(self.nbytes)
        pools = [first, *((first[0].clone(), first[1].clone()) for _ in range(copies - 1))]
        return DecodeInputs(q, pools, last - kept, torch.zeros_like(kept, dtype=torch.int32), kept.int())


Call = Callable[[], tuple[Tensor, ...]]


def ours(_case: DecodeCase, inputs: DecodeInputs) -> Call:
    """Our operator on each copy of the pool in turn; [B, H, D]."""
    q, pools, base, begin, end = inputs

    def call(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (attention_decode(q, k, v, base, begin, begin, end),)

    return in_turn([partial(call, k, v) for k, v in pools])


def _dense(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    """[B, H, D] of caches [B, K, L, D]."""
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def sdpa(backend: SDPBackend, case: DecodeCase, inputs: DecodeInputs) -> Call:
    """One SDPA call on a dense cache."""
    shape = (case.batch, case.kv_heads, case.length, case.head_dim)

    def call(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return (_dense(inputs.q, k.view(shape), v.view(shape), backend),)

    return in_turn([partial(call, k, v) for k, v in inputs.pools])


def serial(backend: SDPBackend, case: DecodeCase, inputs: DecodeInputs) -> Call:
    """What the elastic cache costs without our kernel: SDPA on the streaming heads' rows, SDPA on the full heads'."""
    group, few = case.heads // case.kv_heads, case.streaming
    whole = sum(case.kept)

    def part(pool: Tensor, heads: slice) -> Tensor:
        """[B, heads, rows, D] view of a pool."""
        kept = case.kept[heads]
        per_sample = pool.view(case.batch, whole, case.head_dim)
        begin = sum(case.kept[: heads.start])
        heads_BKSD: Tensor = per_sample[:, begin : begin + sum(kept)].unflatten(1, (len(kept), kept[0]))
        return heads_BKSD

    def call(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty_like(inputs.q)
        for heads in (slice(0, few), slice(few, case.kv_heads)):
            if heads.start < heads.stop:
                queries = slice(heads.start * group, heads.stop * group)
                out[:, queries] = _dense(inputs.q[:, queries], part(k, heads), part(v, heads), backend)
        return (out,)

    return in_turn([partial(call, k, v) for k, v in inputs.pools])


class Rival(NamedTuple):
    """A competitor: what it is, which cases it can compute, and how its call is built."""

    about: str
    takes: Callable[[DecodeCase], bool]
    build: Callable[[DecodeCase, DecodeInputs], Call]


RIVALS = {
    "cudnn": Rival(
        "SDPA, cuDNN (dense)", lambda case: not case.streaming, partial(sdpa, SDPBackend.CUDNN_ATTENTION)
    ),
    "flash2": Rival(
        "SDPA, FlashAttention-2 (dense)", lambda case: not case.streaming, partial(sdpa, SDPBackend.FLASH_ATTENTION)
    ),
    "serial": Rival(
        "cuDNN on the streaming heads' rows, then on the full heads'", lambda case: case.streaming > 0,
        partial(serial, SDPBackend.CUDNN_ATTENTION),
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    listed = "; ".join(f"{name}: {rival.about}" for name, rival in RIVALS.items())
    add_shape_options(parser, LENGTHS, RATIOS, "decode")
    parser.add_argument("--batch", type=int, nargs="+", default=(1, 8), metavar="B", help="samples (default 1 8)")
    parser.add_argument("--contestants", nargs="*", choices=list(RIVALS), default=list(RIVALS), metavar="NAME",
                        help=f"who runs beside our kernel (default all). {listed}")  # fmt: skip


def cases_of(args: argparse.Namespace) -> list[DecodeCase]:
    """The cases that the options ask for.

    Raises:
        ValueError: a length, ratio, batch or head shape that does not fit.
    """
    if min(args.batch) < 1:
        raise ValueError(f"--batch {min(args.batch)}; expected at least 1 sample")
    shape = {name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim", "dtype")}
    return [
        DecodeCase(length, streaming_heads(ratio, args.kv_heads), batch=batch, **shape)
        for batch in args.batch
        for length in args.lengths
        for ratio in args.msr
    ]


def run_case(case: DecodeCase, rivals: dict[str, Rival], budget_ms: float, device: str) -> list[Measurement]:
    """Records of our kernel and of every rival that takes the case and agrees with it."""
    inputs = case.decode_inputs(device)
    call = ours(case, inputs)
    reference = call()
    found = replayed(case.name, case.properties(), "ours", call, budget_ms, case.nbytes)
    for name, rival in rivals.items():
        if not rival.takes(case):
            continue
        left_out: Measurement = {
            "case": case.name,
            "who": name,
            **case.properties(),
            "metric": LEFT_OUT,
            "value": None,
            "unit": "",
        }
        try:
            other = rival.build(case, inputs)
            difference = largest_difference(other(), reference)
            if difference <= TOLERANCE:
                found += replayed(case.name, case.properties(), name, other, budget_ms, case.nbytes)
                continue
            why = f"{DISAGREED} by {difference:.3g}, allowed is {TOLERANCE}"
        except Exception as error:  # noqa: BLE001 - a competitor that cannot run is a result, stated in the table
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        say(f"{case.name:28s} {name:8s} left out: {why}")
        found.append({**left_out, "why": why})
    return found


def machine_records(cases: list[DecodeCase]) -> list[Measurement]:
    """Host time of a call, and what a large copy reaches: the ceiling that TB/s are read against."""
    inputs = cases[0].decode_inputs("cuda")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rate = 2 * source.numel() / measure(lambda: target.copy_(source)).ms / 1e9
    host = host_microseconds(ours(cases[0], inputs))
    return [
        {"case": "host", "who": "ours", "metric": "host time", "value": host, "unit": "us"},
        {"case": "copy-1GiB", "who": "cuda", "metric": "eff", "value": rate, "unit": "TB/s"},
    ]


def run(args: argparse.Namespace, command: str) -> int:
    """Time every case, show the table, write `<out>/<tag>.json`.

    Returns:
        0, or 1 where a rival's output differs from ours.

    Raises:
        ValueError: options that do not fit, or no GPU that runs the kernel.
    """
    cases = cases_of(args)
    device = kernel_device(args, unsupported_reason)
    stamp, path = records.stamp(command, args.commit, device), Path(args.out) / f"{args.tag}.json"
    stamp["kernel"] = "attention_decode"
    found = [{**record, **stamp} for record in machine_records(cases)]
    rivals = {name: RIVALS[name] for name in RIVALS if name in args.contestants}
    return measure_cases(cases, lambda case: run_case(case, rivals, args.budget_ms, str(device)), found, stamp, path)
