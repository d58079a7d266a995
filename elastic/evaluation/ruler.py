"""RULER at any length from lm-evaluation-harness' own generators, templates and metric: the six tasks that need no
outside data. Samples are cached by task, length, tokenizer, seed and number.

Corrections to the harness, by RULER's protocol: `fwe` leaves room for its answer, `cwe` shows its worked example.
"""

import contextlib
import hashlib
import io
import json
import os
import random
from collections.abc import Callable
from typing import Any

from elastic.cache import cache_folder
from elastic.evaluation.benchmark import Request
from elastic.shards import tokenizer_hash

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
OUTSIDE = {
    **dict.fromkeys(
        ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"),
        "needs the essays of the official haystack",
    ),
    "ruler_qa_squad": "needs SQuAD",
    "ruler_qa_hotpot": "needs HotpotQA",
}
NEW_TOKENS = {"ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50}  # the others: 128
CORRECTIONS = (
    "ruler_fwe: prompt and answer fit into the length (the harness fills it with the prompt alone)",
    "ruler_cwe: the worked example stands before the question (the harness leaves it out)",
)


def new_tokens(task: str) -> int:
    """Length limit of an answer."""
    return NEW_TOKENS.get(task, 128)


def documents(task: str, length: int, count: int, tokenizer: Any, seed: int) -> list[dict[str, Any]]:
    """`count` samples whose prompt and answer together have at most `length` tokens.

    Raises:
        ValueError: a task that is unknown or needs outside data, or a length too short for it.
    """
    if task in OUTSIDE:
        raise ValueError(f"task {task} {OUTSIDE[task]}, which this version cannot read; use {', '.join(OFFLINE)}")
    if task not in OFFLINE:
        raise ValueError(f"unknown RULER task {task!r}; expected some of {', '.join(OFFLINE)}")
    if length < 768:
        raise ValueError(f"length {length} is too short for RULER's templates; use 768 or more")
    key = hashlib.sha256(json.dumps([task, length, tokenizer_hash(tokenizer), seed, count]).encode()).hexdigest()[:24]
    file = cache_folder() / "ruler" / f"{task}-{length}-{key}.jsonl"
    if not file.is_file():
        made = _generate(task, length, count, tokenizer, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        writing = file.with_name(f".{file.name}.{os.getpid()}")
        writing.write_text("".join(json.dumps(doc) + "\n" for doc in made), encoding="utf-8")
        os.replace(writing, file)
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _generate(task: str, length: int, count: int, tokenizer: Any, seed: int) -> list[dict[str, Any]]:
    """The harness' generators draw from the global generators and write to the terminal."""
    import numpy as np

    state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return _maker(task)(length, count, tokenizer)
    finally:
        random.setstate(state[0])
        np.random.set_state(state[1])


def _maker(task: str) -> Callable[[int, int, Any], list[dict[str, Any]]]:
    if task.startswith("niah"):
        return lambda length, count, tokenizer: _needles(task, length, count, tokenizer)
    return {"ruler_vt": _variables, "ruler_cwe": _common_words, "ruler_fwe": _frequent_words}[task]


def _needles(task: str, length: int, count: int, tokenizer: Any) -> list[dict[str, Any]]:
    _without_download()
    from lm_eval.tasks.ruler.niah_utils import TEMPLATE
    from lm_eval.tasks.ruler.prepare_niah import generate_samples, get_haystack

    haystack, key, value = {
        "niah_single_1": ("repeat", "words", "numbers"),
        "niah_multikey_2": ("needle", "words", "numbers"),
        "niah_multikey_3": ("needle", "uuids", "uuids"),
    }[task]
    return generate_samples(
        get_haystack(type_haystack=haystack),
        TOKENIZER=tokenizer,
        max_seq_length=length - 48,  # the answer's beginning and the template come on top
        type_haystack=haystack,
        type_needle_k=key,
        type_needle_v=value,
        template=TEMPLATE,
        num_samples=count,
    )


def _variables(length: int, count: int, tokenizer: Any) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.vt_utils import sys_vartrack_w_noise_random

    example = sys_vartrack_w_noise_random(tokenizer, num_samples=1, max_seq_length=500, incremental=5)[0]
    return sys_vartrack_w_noise_random(
        tokenizer, num_samples=count, max_seq_length=length - 48, icl_example=example, incremental=5
    )


def _common_words(length: int, count: int, tokenizer: Any) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.cwe_utils import sys_word_pair_random

    made = sys_word_pair_random(count, length - 48, tokenizer=tokenizer)
    return [{**doc, "input": f"{doc['input_example']}\n{doc['input']}"} for doc in made]


def _frequent_words(length: int, count: int, tokenizer: Any) -> list[dict[str, Any]]:
    from lm_eval.tasks.ruler.fwe_utils import sys_kwext

    return sys_kwext(tokenizer, length - 50 - 48, num_samples=count, vocab_size=length // 50)


def _without_download() -> None:
    """The harness fetches a sentence splitter when its module is imported; tasks without essays need none."""
    import nltk

    nltk.download = lambda *_, **__: False


class Ruler:
    """RULER as the runner sees it."""

    name = "ruler"
    by_length = True
    corrections: tuple[str, ...] = CORRECTIONS

    def tasks(self) -> tuple[str, ...]:
        """All thirteen."""
        return (*OFFLINE, *OUTSIDE)

    def left_out(self) -> dict[str, str]:
        """Tasks whose data is not here."""
        return OUTSIDE

    def takes_chat(self, task: str) -> bool:
        """RULER's prompts are written for chat models and base models alike."""
        return task in self.tasks()

    def identity(self, task: str) -> Any:
        """Nothing but the request decides the samples."""
        return task

    def describe(self, doc: dict[str, Any]) -> dict[str, Any]:
        """Number and references of a sample."""
        return {"index": doc["index"], "references": doc["outputs"]}

    def harness_task(self, request: Request) -> Any:
        """The harness' task over these samples, with its metric: the share of references that the answer contains."""
        from datasets import Dataset
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

        assert request.length is not None and request.samples is not None  # the runner's plan has both
        docs = documents(request.task, request.length, request.samples, request.tokenizer, request.seed)

        def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
            return {"score": string_match_all(postprocess_pred(results), [doc["outputs"]])}

        return ConfigurableTask(
            config={
                "task": f"{request.task}@{request.length}",
                "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
                "dataset_path": "",
                "test_split": "test",
                "output_type": "generate_until",
                "doc_to_text": "{{input}}",
                "doc_to_target": "{{outputs}}",
                "gen_prefix": "{{gen_prefix}}",
                "target_delimiter": "\n\n" if request.task == "ruler_cwe" else " ",
                "process_results": score,
                "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
                "generation_kwargs": {"do_sample": False, "max_gen_toks": new_tokens(request.task), "until": []},
                "metadata": {"version": 1.0},
            }
        )
