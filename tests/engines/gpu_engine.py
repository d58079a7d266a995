"""The routed engine of vLLM on a GPU beside stock vLLM, with random weights. First the checks, on small models:
attention in every step against PyTorch, the decided routes against transformers', answers with CUDA graphs against
those without, both compiled. Then time to first token and tokens/s of a Llama-3.1-8B shape, without chunked prefill and
prefix cache.

    python tests/engines/gpu_engine.py --out tests/bench/results
    python tests/engines/gpu_engine.py --cases 8192x1 --layers 4     # a first look
    python tests/engines/gpu_engine.py --unchecked                   # times alone, after a run that has checked

No GPU ran it yet: what it finds decides whether the option `untested_gpu` may go. Each engine has a process of its own.
Records are written as each contestant ends, so that a run that is cut short keeps what it has.
"""

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, its neighbours are found too

from elastic.bench.records import Measurement, save, stamp
from elastic.console import say
from elastic.data.prompts import EncodedPrompt
from elastic.engines.vllm import step as steps
from elastic.engines.vllm.paged import PagedStep, attend_launches, attend_spans
from tests.helpers.vllm_engine import engine, routed, sampling

LARGEST_ERROR, LEAST_SAME = 0.01, 0.9  # of attention in fp16; share of routes and of answers
TIE = 0.02  # nats between two tokens that fp16 may take for one another
TOKENS, DECODED = 24, 128
CHECKED = [("llama", "paper"), ("qwen3", "level")]
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "compiled": {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "NONE"}},
    "graphs": {"enforce_eager": False},
}
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
         "vocab_size": 128256, "max_position_embeddings": 1 << 18}  # fmt: skip
CONTESTANTS = {"vLLM": None, "plugin, MSR 0.7": "random:0.7", "plugin, all heads full": "dense"}
CASES = [(8192, 1), (8192, 8), (32768, 1), (32768, 8), (131072, 1)]  # 8 of 131072 tokens need more than an H200 has


def apart(task: Callable[..., Any], *args: Any) -> Any:
    """What a task returns in a process of its own, which gives its GPU memory back.

    Raises:
        RuntimeError: the process ended without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        child = multiprocessing.get_context("spawn").Process(target=_answer, args=(answer, task, args))
        child.start()
        child.join()
        if child.exitcode:
            raise RuntimeError(f"{task.__name__}{args[1:]} ended with {child.exitcode}; its messages are above")
        return json.loads(answer.read_text())


def _answer(path: Path, task: Callable[..., Any], args: tuple[Any, ...]) -> None:
    path.write_text(json.dumps(task(*args)))


def started(folder: str, checkpoint: str | None, **options: Any) -> Any:
    """An engine in this process; without a checkpoint stock vLLM."""
    own = None if checkpoint is None else {"checkpoint": checkpoint, "untested_gpu": True}
    settings = {"enable_prefix_caching": False, "enable_chunked_prefill": False, "skip_tokenizer_init": True}
    return engine(Path(folder), own, **settings | options)


Ranked = list[tuple[int, list[tuple[int, float]]]]


def answers(llm: Any, prompts: list[list[int]], tokens: int) -> list[Ranked]:
    """Greedy tokens, each with the likeliest two and their log-probabilities."""
    asked = sampling(tokens)
    asked.detokenize, asked.logprobs = False, 2  # there is no tokenizer
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    return [
        [(token, [(other, one.logprob) for other, one in ranked.items()])
         for token, ranked in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)]
        for output in found
    ]  # fmt: skip


def alike(found: Ranked, expected: Ranked) -> bool:
    """Whether two answers are the same, or part where the likeliest two tokens are as good as equal: what follows such
    a tie has another beginning.
    """
    for (token, _), (other, ranked) in zip(found, expected, strict=True):
        if token != other:
            chances = dict(ranked)
            return token in chances and abs(chances[token] - chances[other]) <= TIE
    return True


def small_prompts() -> list[list[int]]:
    """Of one token to some hundred, so that streaming heads hide keys from most. A graph for eight runs the seven."""
    rng = random.Random(0)
    return [[rng.randrange(4, 64) for _ in range(length)] for length in (1, 2, 64, 90, 120, 150, 180)]


def check(folder: str, checkpoint: str, way: str) -> dict[str, Any]:
    """Answers, routes and, in the eager way, the largest error of attention over all steps and layers."""
    errors = [0.0]

    def judged(q: Tensor, cache: Tensor, step: PagedStep, mode: Tensor, sparse: Any, scale: float, out: Tensor) -> None:
        attend_launches(q, cache, step, mode, sparse, scale, out)
        there = PagedStep(step.table.cpu(), step.lengths.cpu(), step.bounds, step.ends, ())
        want, stop = torch.empty(out.shape), step.bounds[-1]
        attend_spans(q.float().cpu(), cache.float().cpu(), there, mode.cpu(), sparse, scale, want)
        errors.append(float((out[:stop].float().cpu() - want[:stop]).abs().max() / want[:stop].abs().max()))

    judge = patch.object(steps, "attend_step", judged) if way == "eager" else nullcontext()
    # fp16, whose roundings turn fewer of a small model's tokens; little memory, since several run at once
    settings = {"dtype": "float16", "max_model_len": 256, "max_num_seqs": 16, "gpu_memory_utilization": 0.1}
    with judge, started(folder, checkpoint, **settings | WAYS[way]) as llm:
        found, asked = answers(llm, small_prompts(), TOKENS), sampling(2)
        asked.detokenize = False
        for number, ids in enumerate(small_prompts()):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, asked)
        llm.llm_engine.step()
        routes = {name.split("-")[0]: of for name, of in llm.collective_rpc("routes")[0].items()}
    return {"answers": found, "routes": [routes[str(n)] for n in range(len(found))], "error": max(errors)}


def checks() -> Iterator[Measurement]:
    """Records of the checks on tiny models, whose routers decide differently by prompt; all engines at once."""
    with tempfile.TemporaryDirectory() as folder:
        models = [routed(Path(folder, family), family, kind, head_dim=64) for family, kind in CHECKED]
        expected = [[model.answer(EncodedPrompt.whole(ids))[1] for ids in small_prompts()] for model in models]
        given = [(str(model.folder), str(model.checkpoint), way) for model in models for way in WAYS]
        with ThreadPoolExecutor() as pool:
            found = iter(list(pool.map(lambda case: apart(check, *case), given)))
    for (family, kind), want in zip(CHECKED, expected, strict=True):
        eager, compiled, graphs = (next(found) for _ in WAYS)
        about = {"case": f"check {family}, {kind} routers", "who": "plugin"}
        error = {"metric": "largest error of attention", "value": eager["error"], "unit": "of the largest output"}
        yield {**about, **error}
        same = _share(_flat(eager["routes"]), _flat(want))
        yield {**about, "metric": "routes as transformers decides in fp32", "value": same, "unit": "share"}
        same = statistics.mean(map(alike, graphs["answers"], compiled["answers"]))
        yield {**about, "metric": "answers with graphs as without, but for ties", "value": same, "unit": "share"}


def _flat(nested: Any) -> list[Any]:
    return [x for part in nested for x in _flat(part)] if isinstance(nested, (list, tuple)) else [nested]


def _share(found: list[Any], expected: list[Any]) -> float:
    return sum(a == b for a, b in zip(found, expected, strict=True)) / len(expected)


def times(folder: str, checkpoint: str | None, cases: list[tuple[int, int]], repeats: int) -> list[list[float]]:
    """Of every case (length, batch): seconds until all its requests have a first token, and decoded tokens a second
    from then on; medians, of two runs the better one.
    """
    longest, most = max(length for length, _ in cases) + DECODED + 16, max(batch for _, batch in cases)
    sizes = {"max_model_len": longest, "max_num_batched_tokens": max(longest, 8192), "max_num_seqs": most}
    own = {"load_format": "dummy", "dtype": "bfloat16", "enforce_eager": False, "kv_cache_memory_bytes": None}
    found = []
    with started(folder, checkpoint, **sizes, **own) as llm:
        run(llm, _prompts(*min(cases)), 2)  # compiles what a step needs
        for case in cases:
            firsts, speeds = zip(*(run(llm, _prompts(*case), 1 + DECODED) for _ in range(repeats)), strict=True)
            found.append([statistics.median_low(firsts), statistics.median_high(speeds)])
            say(f"{case}: {found[-1]}")
    return found


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
            found = apart(times, folder, checkpoint, cases, repeats)
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
    bad = [r for r in found if (r["value"] > LARGEST_ERROR if r["unit"] != "share" else r["value"] < LEAST_SAME)]
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
