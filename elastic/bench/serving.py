"""`elastic bench serve`: a real `elastic serve` under load, and a short request beside a long one.

Clients are threads of this process and stream their answers over the loopback address. After as many requests as there
are clients, which nobody times, come those that count: requests per second over the whole run, its ragged end
included, and the median times to first text and to the end. Then, with the server otherwise idle, a short request
alone, beside a client whose answers are long, and beside one whose prompts are.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from elastic.bench import records, tables
from elastic.bench.load import Answered, Load, RequestFailedError, ask, body_of, repeated, run_load, served
from elastic.bench.options import add_output_options
from elastic.bench.records import Measurement
from elastic.console import say

SUMMARY = "elastic serve: requests per second, time to first text, a short request beside a long one"
RATE, FIRST, BESIDE = "requests", "first text, median", "of its time alone"
SHORT_TOKENS, TURNS = 8, 9  # of a short answer; how often it is asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    shipped = "checkpoints/smollm2-135m-fa-ssa"
    parser.add_argument("--checkpoint", default=shipped, metavar="DIR", help=f"as of elastic serve (default {shipped})")
    parser.add_argument("--backbone", metavar="NAME", help="default: what the checkpoint was trained on")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")
    parser.add_argument("--max-batch", type=int, metavar="N", help="as of elastic serve (default: its own)")
    parser.add_argument("--clients", type=int, default=64, metavar="N", help="at a time (default 64)")
    parser.add_argument("--requests", type=int, default=1024, metavar="N", help="of all clients (default 1024)")
    parser.add_argument("--seconds", type=float, default=120.0, metavar="S",
                        help="after which no client sends another request (default 120)")  # fmt: skip
    parser.add_argument("--words", type=int, nargs=2, default=(16, 4096), metavar="N",
                        help="fewest and most of a prompt, log-uniform (default 16 4096)")  # fmt: skip
    parser.add_argument("--new-tokens", type=int, nargs=2, default=(8, 128), metavar="N",
                        help="fewest and most of an answer, log-uniform (default 8 128)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the requests (default 0)")
    add_output_options(parser, "serve")


def run(args: argparse.Namespace, command: str) -> int:
    """Start a server, load it, show the figures, write `<out>/<tag>.json`.

    Raises:
        ValueError: options that do not fit, a server that does not start, or a request without its answer.
    """
    load = Load(args.clients, args.requests, args.seconds, tuple(args.words), tuple(args.new_tokens), args.seed)
    device = torch.device(args.device)
    path, found = Path(args.out) / f"{args.tag}.json", list[Measurement]()
    shared = {"clients": load.clients, "words": list(load.words), "new_tokens": list(load.new_tokens),
              "seed": load.seed, "checkpoint": args.checkpoint, "dtype": args.dtype}  # fmt: skip
    stamp = records.stamp(command, args.commit, device)
    try:
        with served(_options(args)) as port:
            for case, figures in (under_load(port, load), short_beside_long(port, load)):
                for metric, value, unit in figures:
                    say(f"{case:24s} {metric}: {value:.4g} {unit}")
                    found.append({"case": case, "who": "elastic", "metric": metric, "value": value, "unit": unit,
                                  **shared, **stamp})  # fmt: skip
                records.save(path, found)
    except (RequestFailedError, OSError) as error:
        raise ValueError(f"a request was not answered: {error}") from error
    say(f"\n{tables.terminal(found)}\n\nWritten: {path}")
    return 0


def _options(args: argparse.Namespace) -> list[str]:
    """Those of `elastic serve`."""
    longest = max(args.new_tokens[1], SHORT_TOKENS)
    given: dict[str, Any] = {"checkpoint": args.checkpoint, "backbone": args.backbone, "device": args.device,
                             "dtype": args.dtype, "max_batch": args.max_batch, "max_queue": max(64, args.clients),
                             "max_new_tokens": longest}  # fmt: skip
    named = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if value is not None]
    return [word for pair in named for word in pair]


Figures = list[tuple[str, float, str]]


def under_load(port: int, load: Load) -> tuple[str, Figures]:
    """Case, and metric, value and unit of each figure with all clients at work."""
    run_load(port, replace(load, requests=load.clients, seed=load.seed + 1))
    answers, seconds = run_load(port, load)
    return f"{load.clients} clients", [
        (RATE, len(answers) / seconds, "1/s"),
        ("new tokens", sum(one.new_tokens for one in answers) / seconds, "1/s"),
        (FIRST, _median(answers, lambda one: one.first_s), "s"),
        ("first text, 95 %", _late(answers, lambda one: one.first_s), "s"),
        ("whole answer, median", _median(answers, lambda one: one.whole_s), "s"),
        ("answers", float(len(answers)), ""),
        ("prompt, mean", statistics.mean(one.prompt_tokens for one in answers), "tokens"),
        ("answer, mean", statistics.mean(one.new_tokens for one in answers), "tokens"),
    ]


def short_beside_long(port: int, load: Load) -> tuple[str, Figures]:
    """Seconds of a short request alone, and what it takes of them beside long answers and beside long prompts."""
    (few, many), most = load.words, load.new_tokens[1]
    beside: dict[str, Any] = {
        "alone": nullcontext(),
        "beside a long answer": repeated(port, lambda number: body_of(few, most, number)),
        "beside a long prompt": repeated(port, lambda number: body_of(many, 1, number)),
    }
    median: dict[str, float] = {}
    for name, company in beside.items():
        with company:
            took = [ask(port, body_of(few, SHORT_TOKENS, 1000 + turn)) for turn in range(TURNS)]
        median[name] = _median(took, lambda one: one.whole_s)
    others = list(beside)[1:]
    figures: Figures = [("alone", median["alone"], "s")]
    return f"{SHORT_TOKENS} new tokens", figures + [
        (f"{name}, {BESIDE}", median[name] / median["alone"], "x") for name in others
    ]


def _median(answers: list[Answered], figure: Callable[[Answered], float]) -> float:
    return statistics.median(map(figure, answers))


def _late(answers: list[Answered], figure: Callable[[Answered], float]) -> float:
    """What 95 % of them stay below."""
    return sorted(map(figure, answers))[math.ceil(0.95 * len(answers)) - 1]
