"""Random schedules of requests on a vLLM engine: joining and leaving at any step, aborted, preempted for want of pages,
with shared prefixes and several answers, each judged against transformers.

    python -m tests.helpers.vllm_schedules --schedules 60 --family llama --kind paper
"""

import argparse
import json
import random
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from elastic.data.prompts import EncodedPrompt, encode
from tests.helpers.vllm_engine import LONGEST, Routed, engine, routed, sampling

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


def run_schedule(engine_: Any, model: Routed, pool: list[EncodedPrompt], rng: random.Random, name: str) -> Counter[str]:
    """One schedule; counts of what happened in it.

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
                expected = model.answer(prompt)[0][:tokens]
                assert len(output.outputs) == n
                for answer in output.outputs:
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


def run(model: Routed, schedules: int, seed: int, **options: Any) -> Counter[str]:
    """Several schedules on one engine, whose prefix cache stays filled between them."""
    rng = random.Random(seed)
    pool = prompts(model.tokenizer, 24, rng)
    counts: Counter[str] = Counter()
    with engine(model.folder, {"checkpoint": str(model.checkpoint)}, num_gpu_blocks_override=PAGES, **options) as llm:
        count_preemptions(llm.llm_engine, counts)
        for number in range(schedules):
            counts += run_schedule(llm.llm_engine, model, pool, rng, str(number))
        llm.generate([{"prompt_token_ids": [5]}], sampling(1), use_tqdm=False)  # so that the worker hears of the last
        counts["requests remembered at the end"] = len(llm.collective_rpc("routes")[0])
    counts["different routes"] = len({str(route) for _, route in model.known.values()})
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--family", default="llama")
    parser.add_argument("--kind", default="paper", help="of the routers")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(routed(Path(folder), given.family, given.kind, given.seed), given.schedules, given.seed)
    print(json.dumps(vars(given) | dict(counts)))  # noqa: T201


if __name__ == "__main__":
    main()
