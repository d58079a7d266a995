"""What prompts that come in chunks cost: routes decided at the prompt's end after dense chunks (what the vLLM plugin
does), and routes decided by a probe of the prompt's two ends before any chunk runs, both beside the whole prompt routed
at once. Questions of the foreign test split, answers judged with the right one before them.

    python tests/bench/chunked_prefill.py shipped=checkpoints/smollm2-135m-fa-ssa \\
        static=static:tests/bench/results/sweep-heads.tsv@0.7@smollm2-135m --lengths 2000 4000 --out tests/bench/results

Legend: L layers, N = 1 samples, K KV heads.
"""

import argparse
import copy
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, its neighbours are found too

from data_prep.draw import token_count
from data_prep.foreign import generate_foreign
from elastic.bench.records import Measurement, save, stamp
from elastic.bench.tables import terminal
from elastic.console import say
from elastic.data.packing import Sample, tokenise
from elastic.inference.generate import load
from elastic.model.attach import last_routes, override_routes

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


@torch.no_grad()
def judge(model: Any, sample: Sample, cache: DynamicCache, route: int | Tensor | None) -> tuple[Tensor, bool]:
    """Read what the cache does not hold yet, under routes or, with None, the router's own: routes [L, K], and whether
    every answer token would have been chosen.
    """
    past, ids = cache.get_seq_length(), torch.tensor([sample.input_ids])
    spans = {"prompt_spans": [[0, sample.prompt_length]], "user_spans": [list(sample.user_span)]}
    given: Any = {name: torch.tensor(span) for name, span in spans.items()}
    asked = ids.shape[1] - sample.answer_start
    with override_routes(model, route):
        logits = model(ids[:, past:], past_key_values=cache, logits_to_keep=asked + 1, **given).logits[0, :-1]
    found = last_routes(model).route[:, 0] if route is None else torch.empty(0)
    return found, bool((logits.argmax(-1) == ids[0, -asked:]).all())


@torch.no_grad()
def after_dense(model: Any, sample: Sample, chunk: int) -> DynamicCache:
    """A cache with all whole chunks before the prompt's end, read dense."""
    cut = (sample.prompt_length - 1) // chunk * chunk
    cache, (begin, _) = DynamicCache(config=model.config), sample.user_span
    with override_routes(model, 0):
        for first in range(0, cut, chunk):
            ids = torch.tensor([sample.input_ids[first : first + chunk]])
            model(ids, past_key_values=cache, logits_to_keep=1, user_spans=torch.tensor([[begin, first + chunk]]))
    return cache


@torch.no_grad()
def probe(model: Any, sample: Sample, size: int) -> Tensor:
    """Routes [L, K] of the prompt's first and last `size` tokens alone."""
    begin, end, prompt = *sample.user_span, sample.prompt_length
    kept = [*range(min(size, prompt)), *range(max(size, prompt - size), prompt)]
    span = torch.tensor([[kept.index(begin), kept.index(end - 1) + 1]])
    model(torch.tensor([[sample.input_ids[place] for place in kept]]), user_spans=span, logits_to_keep=1)
    return last_routes(model).route[:, 0]


def measured(model: Any, sample: Sample, chunk: int, size: int) -> dict[str, tuple[Tensor, bool]]:
    """Routes and verdict of every way."""
    empty = DynamicCache(config=model.config)
    routes, right = judge(model, sample, empty, None)
    found = {WHOLE: (routes, right)}
    chunks = after_dense(model, sample, chunk)
    found["dense"] = torch.zeros_like(routes), judge(model, sample, copy.deepcopy(chunks), 0)[1]
    found[CHUNKS] = judge(model, sample, chunks, None)
    probed = probe(model, sample, size)
    same = torch.equal(probed, routes)
    found[PROBE] = probed, right if same else judge(model, sample, DynamicCache(config=model.config), probed)[1]
    return found


def records(
    name: str, model: Any, asked: Sequence[Sample], length: int, chunk: int, size: int
) -> Iterator[Measurement]:
    """Figures of one model at one length."""
    found: dict[str, list[tuple[Tensor, bool]]] = defaultdict(list)
    for number, sample in enumerate(asked):
        for way, of_way in measured(model, sample, chunk, size).items():
            found[way].append(of_way)
        say(f"{name}, {length} tokens: {number + 1} of {len(asked)}")
    whole = torch.stack([routes for routes, _ in found[WHOLE]]).float()
    for way in WAYS:
        about = {
            "case": f"{length} tokens",
            "who": f"{name}, {way}",
            "unit": "share",
            "length": length,
            "n": len(asked),
        }
        yield {**about, "metric": "exact answers", "value": sum(right for _, right in found[way]) / len(asked)}
        if way == "dense":
            continue
        kept = sum(right for (_, right), (_, first) in zip(found[way], found[WHOLE], strict=True) if first)
        routes = torch.stack([routes for routes, _ in found[way]]).float()
        yield {**about, "metric": "MSR", "value": float(routes.mean())}
        yield {**about, "metric": "decisions kept", "value": float((routes == whole).float().mean())}
        right = sum(right for _, right in found[WHOLE])
        yield {**about, "metric": "right answers kept", "value": kept / max(1, right), "n": right}


def main(argv: Sequence[str]) -> int:
    """Measure every checkpoint, write the records, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=METHOD[@BACKBONE]", help="what `elastic.load` takes")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2000, 4000, 8000])
    parser.add_argument("--count", type=int, nargs="+", default=[8], help="prompts, for all lengths or for each")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a chunk (default 1024)")
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
