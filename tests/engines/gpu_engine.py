"""The routed engine of vLLM on a GPU beside stock vLLM, with random weights. First the checks of `gpu_checks.py`, some
two minutes; then time to first token and tokens/s of a Llama-3.1-8B shape, without chunked prefill and prefix cache.

    python tests/engines/gpu_engine.py --out tests/bench/results
    python tests/engines/gpu_engine.py --cases --out tests/bench/results     # the checks alone
    python tests/engines/gpu_engine.py --cases 8192x1 --layers 4             # a first look
    python tests/engines/gpu_engine.py --unchecked                           # times alone, after a run that has checked

Each engine has a process of its own. Records are written as each case of each contestant ends, so that a run that is
cut short keeps what it has.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, its neighbours are found too

from elastic.bench.records import Measurement, save, stamp
from elastic.console import say
from tests.engines.gpu_checks import checks, failed
from tests.helpers import vllm_gpu
from tests.helpers.vllm_engine import sampling

DECODED = 128
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "vocab_size": 128256, "max_position_embeddings": 1 << 18}  # fmt: skip
CONTESTANTS = {"vLLM": None, "plugin, MSR 0.7": "random:0.7", "plugin, all heads full": "dense"}
CASES = [(8192, 1), (8192, 8), (32768, 1), (32768, 8), (131072, 1)]  # 8 of 131072 tokens need more than an H200 has


def times(
    folder: str, checkpoint: str | None, cases: list[tuple[int, int]], repeats: int
) -> Iterator[tuple[float, float]]:
    """Of every case (length, batch): seconds until all its requests have a first token, and decoded tokens a second
    from then on; medians, of two runs the better one.
    """
    longest, most = max(length for length, _ in cases) + DECODED + 16, max(batch for _, batch in cases)
    sizes = {"max_model_len": longest, "max_num_batched_tokens": max(longest, 8192), "max_num_seqs": most}
    own = {"load_format": "dummy", "dtype": "bfloat16", "enforce_eager": False, "kv_cache_memory_bytes": None}
    with vllm_gpu.started(folder, checkpoint, **sizes, **own) as llm:
        run(llm, _prompts(*min(cases)), 2)  # compiles what a step needs
        for case in cases:
            firsts, speeds = zip(*(run(llm, _prompts(*case), 1 + DECODED) for _ in range(repeats)), strict=True)
            yield statistics.median_low(firsts), statistics.median_high(speeds)


def _prompts(length: int, batch: int) -> list[list[int]]:
    rng = random.Random(length)
    return [[rng.randrange(10, SHAPE["vocab_size"]) for _ in range(length)] for _ in range(batch)]


def run(llm: Any, prompts: list[list[int]], tokens: int) -> tuple[float, float]:
    """Seconds until every request has its first token, and tokens a second after that."""
    from vllm.sampling_params import RequestOutputKind

    asked, have, first, early = sampling(tokens), Counter[str](), 0.0, 0
    asked.detokenize, asked.output_kind = False, RequestOutputKind.DELTA
    begun = time.perf_counter()
    for number, ids in enumerate(prompts):
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, asked)
    while llm.llm_engine.has_unfinished_requests():
        have.update({output.request_id: len(output.outputs[0].token_ids) for output in llm.llm_engine.step()})
        if not first and all(have[str(number)] for number in range(len(prompts))):
            first, early = time.perf_counter() - begun, have.total()
    return first, (have.total() - early) / (time.perf_counter() - begun - first)


def races(cases: list[tuple[int, int]], layers: int, repeats: int) -> Iterator[Measurement]:
    """Records of all contestants."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**SHAPE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        for who, checkpoint in CONTESTANTS.items():
            found = vllm_gpu.apart(times, folder, checkpoint, cases, repeats)
            for (length, batch), (first, speed) in zip(cases, found, strict=True):
                about = {"case": f"{length} tokens, batch {batch}, {layers} layers", "who": who, "n": repeats}
                yield {**about, "metric": "time to first token", "value": first, "unit": "s"}
                yield {**about, "metric": "decoding", "value": speed, "unit": "tokens/s"}


def main(argv: Sequence[str]) -> int:
    """Check, measure, write the records, print them; 1 where a check fails, and then nothing is timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=_case, nargs="*", default=CASES, help="tokens of a prompt x requests at once")
    parser.add_argument("--layers", type=int, default=32, help="of the 8B shape (default 32, all of it)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--unchecked", action="store_true", help="leave out the checks, which another run has passed")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args(argv)
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # answers are greedy; FlashInfer may be missing
    cases = " ".join(f"{length}x{batch}" for length, batch in args.cases)
    command = f"python tests/engines/gpu_engine.py --cases {cases} --layers {args.layers} --repeats {args.repeats}"
    made_by = stamp(command, args.commit, torch.device("cuda"))
    made_by["versions"]["vllm"] = version("vllm")
    found: list[Measurement] = []
    if not args.unchecked:
        _keep(checks(), found, made_by, args.out)
    bad = list(filter(failed, found))
    for record in bad:
        say(f"failed: {record['case']}, {record['metric']}: {record['value']}")
    if not bad and args.cases:
        _keep(races(args.cases, args.layers, args.repeats), found, made_by, args.out)
    return int(bool(bad))


def _case(text: str) -> tuple[int, int]:
    length, batch = map(int, text.split("x"))
    return length, batch


def _keep(records: Iterator[Measurement], found: list[Measurement], made_by: Measurement, out: Path) -> None:
    """Add records to those that are there, and write all whenever one comes."""
    for record in records:
        found.append(record)
        say(" ".join(str(record[name]) for name in ("case", "who", "metric", "value", "unit")))
        save(out / "vllm-gpu.json", [{**record, **made_by} for record in found])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
