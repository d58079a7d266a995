"""Checks of the plugin on a GPU, with small random models: attention in every step against PyTorch, the decided routes
and every token of every answer against transformers in fp32.

All of them with prompts that share a prefix and are asked twice, more requests than fit, which join while others
decode, and so few pages that some are preempted; with whole prompts and with chunks, eagerly and with CUDA graphs.
`gpu_engine.py` runs them.
"""

import math
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from elastic.bench.records import LEFT_OUT, Measurement
from elastic.config import SparseConfig
from elastic.data.prompts import EncodedPrompt
from elastic.engines.vllm import step as steps
from elastic.engines.vllm.paged import PagedStep, attend_launches, attend_spans
from elastic.engines.vllm.table import RoutedRequest
from tests.helpers import vllm_gpu
from tests.helpers.vllm_engine import Routed, routed, sampling
from tests.helpers.vllm_reference import DenseThenRouted
from tests.helpers.vllm_schedules import count_preemptions, remember

SHARE, ERROR, NATS = "share", "of the largest output", "nats"
LARGEST = {ERROR: 0.01, NATS: 0.02}  # in fp16; by vLLM's CPU engine they are 0.0005 and 0.003
LEAST = {SHARE: 0.9}

CHECKED = [("llama", "paper", 64), ("qwen3", "level", 128)]  # family, routers, head dim
SPARSE = SparseConfig(sink=4, window=60, block=4)  # requests may share four pages of a prefix, which has ten
TOKENS, PAGES = 24, 40  # of an answer; for all requests
_CHUNKS = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}
_GRAPHS = {"enforce_eager": False}
WAYS: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "chunks": _CHUNKS,
    "whole prompts, CUDA graphs": _GRAPHS,
    "chunks, CUDA graphs": _CHUNKS | _GRAPHS,
}


def failed(record: Measurement) -> bool:
    """Whether a check's record says that it failed: also one whose engine ended with an error, or whose value is not a
    number.
    """
    value, unit = record["value"], record["unit"]
    return value is None or not (value >= LEAST[unit] if unit in LEAST else value <= LARGEST[unit])


def prompts() -> list[list[int]]:
    """Of one token to some hundred, so that streaming heads hide keys from most; four of them share their beginning,
    and all come twice.
    """
    rng = random.Random(0)
    shared, *rest = (
        [rng.randrange(4, 64) for _ in range(n)] for n in (160, 1, 2, 64, 90, 120, 150, 220, 1, 17, 33, 70)
    )
    return [*rest[:7], *(shared + ids for ids in rest[7:])] * 2


def check(folder: str, checkpoint: str, way: str) -> Iterator[dict[str, Any]]:
    """Of one engine, yielded once: the answer, routes and dense tokens of every request; where it is eager, the largest
    error of attention over all layers and steps; counts of what happened; and the scheduler's class.

    Raises:
        RuntimeError: something that the check is about did not happen, such as a preemption.
    """
    torch.set_num_threads(1)  # several run at once
    errors, counts = [0.0], Counter[str]()
    settings = {"dtype": "float16", "max_model_len": 256, "max_num_seqs": 8, "enable_prefix_caching": True}
    room = {"num_gpu_blocks_override": PAGES, "gpu_memory_utilization": 0.1}
    eager = WAYS[way].get("enforce_eager", True)
    judge = patch.object(steps, "attend_step", _judged(errors, counts)) if eager else nullcontext()
    with vllm_gpu.started(folder, checkpoint, **settings | room | WAYS[way]) as llm:
        seen = remember(llm)
        count_preemptions(llm.llm_engine, counts)
        scheduler = type(llm.llm_engine.engine_core.engine_core.scheduler).__name__
        with judge:
            answers = ask(llm.llm_engine, counts)
        requests = [_told(answers[str(number)], seen[str(number)]) for number in range(len(answers))]
    counts["prompts that began dense"] = sum(bool(request["dense"]) for request in requests)
    wanted = ["preempted", "prefix cache hits", "steps in which requests waited"]
    if way.startswith("chunks"):
        wanted += ["prompts that began dense", *(["steps of both kinds"] if eager else [])]
    if missing := [name for name in wanted if not counts[name]]:
        raise RuntimeError(f"{way}: no {' and no '.join(missing)}, of {dict(counts)}; the check is about them too")
    yield {
        "requests": requests,
        "error": max(errors) if eager else None,
        "counts": dict(counts),
        "scheduler": scheduler,
    }


def _told(answer: list[int], request: RoutedRequest) -> dict[str, Any]:
    routes = [route_K.int().tolist() for route_K in request.layers]
    return {"answer": answer, "routes": routes, "dense": request.dense_tokens}


def _judged(errors: list[float], counts: Counter[str]) -> Any:
    """`attend_step` by the kernels, which notes how far each of its calls is from PyTorch."""

    def judged(q: Tensor, cache: Tensor, step: PagedStep, mode: Tensor, sparse: Any, scale: float, out: Tensor) -> None:
        attend_launches(q, cache, step, mode, sparse, scale, out)
        there = PagedStep(step.table.cpu(), step.lengths.cpu(), step.bounds, step.ends, ())
        want, stop = torch.empty(out.shape), step.bounds[-1]
        attend_spans(q.float().cpu(), cache.float().cpu(), there, mode.cpu(), sparse, scale, want)
        error = float((out[:stop].float().cpu() - want[:stop]).abs().max() / want[:stop].abs().max())
        errors.append(math.inf if math.isnan(error) else error)  # `max` would overlook it
        counts["steps of both kinds"] += len({launch.starts is None for launch in step.launches}) > 1

    return judged


def ask(engine: Any, counts: Counter[str]) -> dict[str, list[int]]:
    """Greedy answers to all prompts by their numbers: four are there when the first step begins, then one joins in each
    step.
    """
    asked, waiting, found = sampling(TOKENS), list(enumerate(prompts())), {}
    asked.detokenize = False  # there is no tokenizer
    new = 4
    while waiting or engine.has_unfinished_requests():
        for number, ids in waiting[:new]:
            engine.add_request(str(number), {"prompt_token_ids": ids}, asked)
        waiting, new = waiting[new:], 1
        for output in engine.step():
            found[output.request_id] = list(output.outputs[0].token_ids)
            counts["prefix cache hits"] += bool(output.num_cached_tokens)
        counts["steps in which requests waited"] += engine.engine_core.engine_core.scheduler.get_request_counts()[1] > 0
    return found


def judge(model: Routed, found: list[dict[str, Any]]) -> tuple[float, float]:
    """Share of routes as transformers decides them; and how much less likely, in nats, any token of any answer is than
    the likeliest one, to transformers under the routes that the engine decided.
    """
    reference, same, gaps = DenseThenRouted(model), [], [0.0]
    for ids, request in zip(prompts(), found, strict=True):
        _, wanted = reference.answer(EncodedPrompt.whole(ids), request["dense"], 0)
        for layer, expected in zip(request["routes"], wanted, strict=True):
            same += [a == b for a, b in zip(layer, expected, strict=True)]
        if len(request["answer"]) != TOKENS:
            raise RuntimeError(f"an answer has {len(request['answer'])} tokens, {TOKENS} were asked for")
        gaps += reference.gaps(ids, request["dense"], request["routes"], request["answer"])
    return sum(same) / len(same), max(gaps)


def checks() -> Iterator[Measurement]:
    """Records of all checks, whose engines run at once; one that fails does not keep the others from being told."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(CHECKED) * len(WAYS)) as pool:
        models = [
            routed(Path(folder, family), family, kind, head_dim=head_dim, sparse=SPARSE)
            for family, kind, head_dim in CHECKED
        ]
        given = [(number, way) for number in range(len(models)) for way in WAYS]
        ran = pool.map(lambda of: _ran(models[of[0]], of[1]), given)
        for (number, way), found in zip(given, ran, strict=True):
            family, kind, head_dim = CHECKED[number]
            about = {"case": f"check {family}, {kind} routers, head dim {head_dim}: {way}", "who": "plugin"}
            if isinstance(found, str):
                yield {**about, "metric": LEFT_OUT, "value": None, "unit": "", "why": found}
                continue
            about |= {name: found[name] for name in ("counts", "scheduler")}
            same, gap = judge(models[number], found["requests"])
            if found["error"] is not None:
                yield {**about, "metric": "largest error of attention", "value": found["error"], "unit": ERROR}
            yield {**about, "metric": "routes as transformers decides in fp32", "value": same, "unit": SHARE}
            yield {**about, "metric": "largest gap to transformers' token in fp32", "value": gap, "unit": NATS}


def _ran(model: Routed, way: str) -> dict[str, Any] | str:
    """What `check` found in a process of its own, or why it found nothing."""
    try:
        (found,) = vllm_gpu.apart(check, str(model.folder), str(model.checkpoint), way)
    except RuntimeError as error:
        return str(error)
    return dict(found)
