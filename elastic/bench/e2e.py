"""`elastic bench e2e`: prompt to decode of a whole model with random weights, beside the same stock model.

Time to first token, decode tokens a second, peak memory and bytes of the KV cache, and what the prompt's time is spent
on. Routes are random heads of a given MSR; the routers do their work all the same. The stock model runs through
transformers' own cache and SDPA; its decode steps also as a CUDA graph over a cache written in place, like ours. With
`--prefill-chunk-size` prompts are read in pieces too: by the routers, which decide in the last one after dense ones;
under the same routes as static ones, which hold from the first; and by the stock model.

    elastic bench e2e --shapes llama-3.1-8b --lengths 131072 --msr 0.7 --prefill-chunk-size 8192 --tag e2e-pieces
"""

import argparse
import gc
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from elastic.bench import drawing, records
from elastic.bench.e2e_models import SHAPES, random_model, route_at_random
from elastic.bench.e2e_runs import STOCK, Run, Sizes, elastic_runs, given_runs, stock_runs
from elastic.bench.e2e_tables import OUT_OF_MEMORY, e2e_table
from elastic.bench.options import LENGTHS
from elastic.bench.records import LEFT_OUT, Measurement
from elastic.config import ElasticConfig, SparseConfig
from elastic.console import say
from elastic.model.attach import detach

SUMMARY = "prefill and decode of 8B-shaped models beside the same stock models"
RATIOS = (0.0, 0.5, 0.7, 0.9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["llama-3.1-8b", "qwen3-8b"])
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="N", help="tokens (default 8K-256K)")
    parser.add_argument("--msr", type=float, nargs="*", default=RATIOS, metavar="R",
                        help="shares of heads on SA (default 0 0.5 0.7 0.9)")  # fmt: skip
    parser.add_argument("--contestants", nargs="*", choices=list(STOCK), default=list(STOCK),
                        help="SDPA backends that the stock model runs on (default: all)")  # fmt: skip
    parser.add_argument(
        "--layers", type=int, metavar="N", help="decoder layers, for a quick look (default: the shape's)"
    )
    parser.add_argument("--prefill-chunk-size", type=int, nargs="*", default=[], metavar="N",
                        help="read prompts in pieces of so many tokens, too (default: do not)")  # fmt: skip
    parser.add_argument("--new-tokens", type=int, default=32, metavar="N", help="decode steps timed (default 32)")
    parser.add_argument("--batch", type=int, default=1, metavar="B",
                        help="copies of the prompt that decode together (default 1)")  # fmt: skip
    parser.add_argument("--compiled", action="store_true", help="time the stock model under torch.compile, too")
    parser.add_argument("--unfused", action="store_true", help="time the routed model with nothing fused, too")
    parser.add_argument("--decode-max-length", type=int, default=LENGTHS[-1], metavar="N",
                        help="time no decode steps after longer prompts (default 262144)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="timed prompts a case (default 1)")
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="S",
                        help="start no further case after this time (default 3600)")  # fmt: skip
    parser.add_argument("--sink", type=int, default=128, metavar="N", help="tokens (default 128)")
    parser.add_argument("--window", type=int, default=2048, metavar="N", help="tokens (default 2048)")
    parser.add_argument("--block", type=int, default=128, metavar="N", help="tokens (default 128)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the command on a tiny shape")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default runs/bench")
    parser.add_argument("--tag", default="e2e", metavar="NAME", help="name of the files (default e2e)")
    parser.add_argument("--commit", metavar="HASH", help="commit to state where git is not at hand")


def run(args: argparse.Namespace, command: str) -> int:
    """Run every case, show the table, write `<out>/<tag>.json` and `.png`.

    Returns:
        0.

    Raises:
        ValueError: options that do not fit, or no GPU.
    """
    check(args)
    device, started = torch.device(args.device), time.perf_counter()
    path, found = args.out / f"{args.tag}.json", list[Measurement]()
    stamp = records.stamp(command, args.commit, device)

    def add(case: Measurement, runs: Callable[[], Run]) -> None:
        if time.perf_counter() - started > args.seconds:
            timed = [_left_out(f"not started within --seconds {args.seconds:g}")]
        else:
            timed = _measured(runs)
        found.extend({**case, **record, **stamp} for record in timed)
        records.save(path, found)
        say("  ".join([f"{case['case']:28s} {case['who']:12s}", *(_short(r) for r in timed)]))

    for shape in args.shapes:
        _run_shape(args, shape, device, add)
    say(f"\n{e2e_table(found)}\n")
    say(f"Written: {', '.join(map(str, [path, *drawing.draw(path, found)]))}")
    return 0


def _run_shape(
    args: argparse.Namespace, shape: str, device: torch.device, add: Callable[[Measurement, Callable[[], Run]], None]
) -> None:
    """All cases of one shape, the routed ones of a length first; the model's memory is free afterwards."""
    model = random_model(shape, device, getattr(torch, args.dtype), args.layers)
    name = shape if args.layers is None else f"{shape}-{args.layers}layers"
    name += "" if args.batch == 1 else f"-batch{args.batch}"
    sparse = SparseConfig(sink=args.sink, window=args.window, block=args.block)
    for length in args.lengths:
        sizes = Sizes(length, args.new_tokens if length <= args.decode_max_length else 0, args.repeats, args.batch)
        pieces = [piece for piece in args.prefill_chunk_size if piece < length]
        for ratio in args.msr:
            route = route_at_random(model, ratio, ElasticConfig(sparse=sparse, kv_cache="elastic"))
            share = float(route.mean())
            add(_case(name, length, "elastic", share), partial(elastic_runs, model, sizes))
            if args.unfused:
                add(_case(name, length, "elastic unfused", share), partial(elastic_runs, model, sizes, False))
            for piece in pieces:
                cut = replace(sizes, piece=piece)
                add(_case(name, length, f"elastic in {piece}s", share), partial(elastic_runs, model, cut))
                add(_case(name, length, f"static in {piece}s", share), partial(given_runs, model, cut, route))
            detach(model)
        for who in args.contestants:
            add(_case(name, length, who, None), partial(stock_runs, model, who, sizes))
            if args.compiled:
                add(_case(name, length, f"{who} compiled", None), partial(stock_runs, model, who, sizes, True))
            for piece in pieces:
                cut = replace(sizes, piece=piece)
                add(_case(name, length, f"{who} in {piece}s", None), partial(stock_runs, model, who, cut))


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not fit before a model is built."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            "no GPU is at hand; `elastic doctor` shows what this machine can run, --device cpu --shapes tiny tries the "
            "command on a small model"
        )
    for name, values, least in (
        *(("--lengths", args.lengths, 2), ("--new-tokens", [args.new_tokens], 1), ("--repeats", [args.repeats], 1)),
        ("--prefill-chunk-size", args.prefill_chunk_size or [1], 1), ("--batch", [args.batch], 1),
        ("--layers", [1 if args.layers is None else args.layers], 1),
    ):  # fmt: skip
        if min(values) < least:
            raise ValueError(f"{name} {min(values)} is below {least}; use {least} or more")
    if any(not 0 <= ratio <= 1 for ratio in args.msr):
        raise ValueError(f"--msr {args.msr}: expected shares from 0 to 1")


def sizes_of(record: Measurement) -> SparseConfig:
    """Sink, window and block of a record, as its command says.

    Raises:
        ValueError: a record of another command.
    """
    words = shlex.split(record["command"])
    if words[:3] != ["elastic", "bench", "e2e"]:
        raise ValueError(f"{record['case']} was measured by `{record['command']}`; expected `elastic bench e2e`")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(words[3:])
    return SparseConfig(sink=args.sink, window=args.window, block=args.block)


def _case(shape: str, length: int, who: str, msr: float | None) -> Measurement:
    size = f"{length // 1024}k" if length % 1024 == 0 else str(length)
    name = f"{shape}-{size}" + ("" if msr is None else f"-msr{msr:.2f}")
    return {"case": name, "who": who, "shape": shape, "length": length, "msr": msr}


def _measured(runs: Callable[[], Run]) -> list[Measurement]:
    """The records of a case; one that fails, for want of memory say, is a result with its reason."""
    try:
        return runs()
    except torch.OutOfMemoryError as error:
        why = f"{OUT_OF_MEMORY}: {' '.join(str(error).split())[:200]}"
    except Exception as error:  # noqa: BLE001 - hours of other cases must not go with one that cannot run
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    gc.collect()  # what the failed case still holds in cycles of its traceback
    return [_left_out(why)]


def _left_out(why: str) -> Measurement:
    return {"metric": LEFT_OUT, "value": None, "unit": "", "why": why}


def _short(record: Measurement) -> str:
    value: Any = record["value"]
    return f"left out: {record['why']}" if value is None else f"{record['metric']} {value:.4g} {record['unit']}"
