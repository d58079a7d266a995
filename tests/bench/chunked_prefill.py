"""What prompts that are read in pieces cost, in decisions, answers and time: routes decided in the last piece, after
dense ones (`prefill_chunk_size`), and routes decided by a probe of the prompt's two ends, which then hold for all
pieces. Both beside the whole prompt read in one pass, routed and dense. Questions of the foreign test split.

    python tests/bench/chunked_prefill.py levels=checkpoints/smollm2-135m-fa-ssa --lengths 2000 4000 --out runs/bench

Seconds are processor time until the prompt was read, the probe included. Answers are judged token by token with the
right ones before them, as decode steps read them.
Legend: L layers, N = 1 samples, K KV heads.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, its neighbours are found too

from data_prep.draw import token_count
from data_prep.foreign import generate_foreign
from elastic.bench.records import Measurement, save, stamp
from elastic.bench.tables import terminal
from elastic.console import say
from elastic.data.packing import Sample, tokenise
from elastic.inference.generate import load
from elastic.model.attach import handle_of, last_routes, override_routes, route_of
from elastic.model.pass_state import generating, reading

KINDS = ("foreign_pass_key", "foreign_needle", "foreign_json", "foreign_multi_needle")
WAYS = ("dense", "whole prompt", "dense chunks, last chunk routed", "probe of both ends")
WHOLE, CHUNKS, PROBE = WAYS[1:]


def samples(length: int, count: int, tokenizer: Any) -> list[Sample]:
    """`count` questions in contexts of about `length` tokens, all kinds in turn."""
    measure, each = token_count(tokenizer), -(-count // len(KINDS))
    by_kind = [
        list(generate_foreign(kind, "test", each, length, 0, measure, shortest=length - 100, system="none"))
        for kind in KINDS
    ]
    return [tokenise(record, tokenizer) for records in zip(*by_kind, strict=True) for record in records][:count]


@dataclass
class Outcome:
    """What one way made of one sample.

    Attributes:
        route: [L, K].
        right: whether every answer token was the likeliest.
        nll: mean over the answer's tokens, in nats.
        seconds: processor time until the prompt was read.
    """

    route: Tensor
    right: bool
    nll: float
    seconds: float


@torch.no_grad()
def read(model: Any, sample: Sample, chunk: int | None, route: int | Tensor | None = None) -> Outcome:
    """Read the prompt, in pieces of `chunk` tokens or at once, under routes or, with None, the routers' own."""
    state, prompt = handle_of(model).state, sample.prompt_length
    ids, span = torch.tensor([sample.input_ids]), torch.tensor([list(sample.user_span)])
    cache: Any = DynamicCache(config=model.config)
    begun = time.process_time()
    with override_routes(model, route):
        with nullcontext() if chunk is None else reading(state, prompt):
            for piece in ids[:, :prompt].split(chunk or prompt, 1):
                logits = model(piece, past_key_values=cache, logits_to_keep=1, user_spans=span).logits[0]
        seconds = time.process_time() - begun
        if ids.shape[1] > prompt + 1:
            with generating(state, verifying=True):
                logits = torch.cat([logits, model(ids[:, prompt:-1], past_key_values=cache).logits[0]])
    answer = ids[0, prompt:]
    nll = float(functional.cross_entropy(logits.float(), answer))
    return Outcome(route_of(cache).route[:, 0].float(), bool((logits.argmax(-1) == answer).all()), nll, seconds)


@torch.no_grad()
def probe(model: Any, sample: Sample, size: int) -> tuple[Tensor, float]:
    """Routes [L, K] of the prompt's first and last `size` tokens alone, and the seconds they took."""
    begin, end, prompt = *sample.user_span, sample.prompt_length
    kept = [*range(min(size, prompt)), *range(max(size, prompt - size), prompt)]
    span = torch.tensor([[kept.index(begin), kept.index(end - 1) + 1]])
    begun = time.process_time()
    model(torch.tensor([[sample.input_ids[place] for place in kept]]), user_spans=span, logits_to_keep=1)
    return last_routes(model).route[:, 0], time.process_time() - begun


def measured(model: Any, sample: Sample, chunk: int, size: int) -> dict[str, Outcome]:
    """Every way's outcome."""
    found = {"dense": read(model, sample, None, 0), WHOLE: read(model, sample, None)}
    found[CHUNKS] = read(model, sample, chunk)
    route, seconds = probe(model, sample, size)
    probed = read(model, sample, chunk, route)
    found[PROBE] = replace(probed, seconds=probed.seconds + seconds)
    return found


def records(
    name: str, model: Any, asked: Sequence[Sample], length: int, chunk: int, size: int
) -> Iterator[Measurement]:
    """Figures of one model at one length."""
    found: dict[str, list[Outcome]] = defaultdict(list)
    for number, sample in enumerate(asked):
        for way, of_way in measured(model, sample, chunk, size).items():
            found[way].append(of_way)
        say(f"{name}, {length} tokens: {number + 1} of {len(asked)}")
    first = found[WHOLE]
    for way in WAYS:
        about = {"case": f"{length} tokens", "who": f"{name}, {way}", "length": length, "n": len(asked)}
        outcomes = found[way]

        def mean(of: Callable[[Outcome], float], outcomes: Sequence[Outcome] = outcomes) -> float:
            return sum(map(of, outcomes)) / len(outcomes)

        yield {**about, "metric": "exact answers", "unit": "share", "value": mean(lambda o: o.right)}
        yield {**about, "metric": "answer tokens", "unit": "nats", "value": mean(lambda o: o.nll)}
        yield {**about, "metric": "prompt read", "unit": "s", "value": mean(lambda o: o.seconds)}
        if way == "dense":
            continue
        pairs = list(zip(outcomes, first, strict=True))
        same = sum(float((one.route == other.route).float().mean()) for one, other in pairs) / len(pairs)
        right = sum(other.right for _, other in pairs)
        kept = sum(one.right for one, other in pairs if other.right) / max(1, right)
        yield {**about, "metric": "MSR", "unit": "share", "value": mean(lambda o: float(o.route.mean()))}
        yield {**about, "metric": "decisions kept", "unit": "share", "value": same}
        yield {**about, "metric": "right answers kept", "unit": "share", "value": kept, "n": right}


def main(argv: Sequence[str]) -> int:
    """Measure every checkpoint, write the records, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=METHOD[@BACKBONE]", help="what `elastic.load` takes")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000, 8000])
    parser.add_argument("--count", type=int, nargs="+", default=[8], help="prompts, for all lengths or for each")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a piece (default 1024)")
    parser.add_argument("--probe", type=int, default=100, help="tokens of either end (default 100)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args(argv)
    counts = args.count * len(args.lengths) if len(args.count) == 1 else args.count
    words = ["python tests/bench/chunked_prefill.py", *args.checkpoints, "--lengths", *args.lengths]
    words += ["--count", *args.count, "--chunk", args.chunk, "--probe", args.probe]
    made_by = stamp(" ".join(map(str, words)), None, torch.device(args.device))
    found: list[Measurement] = []
    for named in args.checkpoints:
        name, _, method = named.partition("=")
        backbone = method.rpartition("@")[2] if method.count("@") > 1 else None
        model, tokenizer = load(method.removesuffix(f"@{backbone}"), backbone)
        for length, count in zip(args.lengths, counts, strict=True):
            found += records(name, model, samples(length, count, tokenizer), length, args.chunk, args.probe)
            save(args.out / "chunked-prefill.json", [{**record, **made_by} for record in found])
    say(terminal([{**record, **made_by} for record in found]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
