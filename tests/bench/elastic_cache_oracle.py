"""Greedy answers of a real small backbone over the elastic KV cache, beside the oracle that keeps and masks every key.

    python -m tests.bench.elastic_cache_oracle [--prompts 200] [--out tests/bench/results]

SmolLM2-135M in fp32 on the CPU with untrained routers whose decisions vary; prompts are passages of Python's own
documentation, of different lengths, in left-padded batches. Also: with all heads full, the logits of a whole generation
beside the stock model's, bit for bit.
"""

import argparse
import pydoc_data.topics
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from elastic.bench import records
from elastic.cache import decode_attention
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.console import say
from elastic.data.prompts import left_pad
from elastic.inference.generate import new_cache
from elastic.model.attach import attach, override_routes, route_of
from elastic.model.loading import load_backbone
from tests.helpers.masked import masked_oracle
from tests.helpers.models import varied_routers

CONFIG = ElasticConfig(RouterConfig(pool_tokens=16), SparseConfig(sink=16, window=32, block=16), kv_cache="elastic")
ROW_BYTES = 2 * 64 * 4  # key and value of a token and head


def passages(tokenizer, count: int) -> list[list[int]]:
    """Token ids of `count` passages of 64 to 120 tokens, each from another place."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text)["input_ids"]
    stride = len(ids) // count
    return [ids[n * stride : n * stride + 64 + 8 * (n % 8)] for n in range(count)]


def answers(model, ids: Tensor, mask: Tensor, pad: int, steps: int, cache=None) -> tuple[Tensor, Tensor]:
    """New tokens [B, steps] and their logits [steps, B, V]."""
    out = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
        pad_token_id=pad, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("tests/bench/results"))
    parser.add_argument("--commit")
    args = parser.parse_args(argv)
    model, tokenizer = load_backbone("smollm2-135m")
    model.requires_grad_(False)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    prompts = passages(tokenizer, args.prompts)
    batches = [left_pad(prompts[n : n + args.batch], pad, model.device) for n in range(0, len(prompts), args.batch)]
    stock = answers(model, *batches[0], pad, args.new_tokens)
    attach(model, CONFIG)
    varied_routers(model)
    found = []

    def add(metric: str, value: float, unit: str) -> None:
        figure = {"metric": metric, "value": value, "unit": unit, "competitors": ["masked oracle"]}
        shared = {"case": f"smollm2-135m-{len(prompts)}-prompts", "who": "elastic", "new_tokens": args.new_tokens}
        found.append({**shared, **figure, "config": CONFIG.to_dict(), **stamp})
        say(f"{metric}: {value:.6g} {unit}")

    command = f"python -m tests.bench.elastic_cache_oracle --prompts {args.prompts} --new-tokens {args.new_tokens}"
    stamp = records.stamp(command, args.commit, torch.device("cpu"))
    with override_routes(model, 0):
        full = answers(model, *batches[0], pad, args.new_tokens, new_cache(model))
    add("all heads full: logits that differ from the stock model's", int((full[1] != stock[1]).sum()), "logits")
    same = {"pytorch": 0, "operator": 0}
    worst, share, kept, whole = dict.fromkeys(same, 0.0), 0.0, 0, 0
    for number, (ids, mask) in enumerate(batches):
        with masked_oracle(model):
            expected = answers(model, ids, mask, pad, args.new_tokens)
        for path in same:
            cache = new_cache(model, args.new_tokens)
            cache.step = 1  # no reserved room beyond the answer, so that the bytes can be compared
            with patch.object(
                decode_attention,
                "unsupported_reason",
                (lambda *_: None) if path == "operator" else decode_attention.unsupported_reason,
            ):
                tokens, logits = answers(model, ids, mask, pad, args.new_tokens, cache)
            same[path] += int((tokens == expected[0]).all(1).sum())
            worst[path] = max(worst[path], float((logits - expected[1]).abs().max()))
        share += float(route_of(cache).route.float().mean()) * len(ids) / len(prompts)
        kept += cache.nbytes
        whole += (int(mask.sum()) + len(ids) * args.new_tokens) * route_of(cache).route[:, 0].numel() * ROW_BYTES
        say(f"batch {number}: {same} of {(number + 1) * len(ids)}")
    for path in same:
        add(f"prompts with the oracle's tokens, decode by {path}", same[path], "prompts")
        add(f"largest difference of a logit, decode by {path}", worst[path], "")
    add("MSR", share, "")
    add("KV bytes held, of a full cache", kept / whole, "")
    records.save(args.out / "elastic-cache.json", found)
    return 0 if min(same.values()) == len(prompts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
