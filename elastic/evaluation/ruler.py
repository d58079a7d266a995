"""RULER at any length from lm-evaluation-harness' own generators, templates and metrics. Samples are cached by task,
length, tokenizer, data, seed and number.
"""

import json
from collections.abc import Sequence
from typing import Any

from elastic.data.prompts import render
from elastic.data.shards import tokenizer_hash
from elastic.evaluation.benchmark import Found, Request, Routed, Share
from elastic.evaluation.generated import PROTOCOL, generate
from elastic.evaluation.ruler_data import RulerData
from elastic.evaluation.ruler_samples import NEEDLES, Doc, make_samples, new_tokens
from elastic.files import alone, cache_folder, text_sha256, write_atomic
from elastic.protocols import Tokenizer

QA = {"ruler_qa_squad": "squad", "ruler_qa_hotpot": "hotpotqa"}
SYNTHETIC = (*NEEDLES, "ruler_vt", "ruler_cwe", "ruler_fwe")
CORRECTIONS = (
    "every task: the haystack's size is searched sample by sample, so that prompt and answer fill the length to 97 % "
    "and never overrun it (the harness steps coarsely); niah_multikey_3 under 4K may draw identifiers of fewer tokens",
    "ruler_fwe: prompt and answer fit into the length (the harness fills it with the prompt alone)",
    "ruler_cwe: the worked example precedes the question (the harness leaves it out), and where the short word "
    "list has not enough words, a longer one is used, as RULER does (the harness stops growing)",
    "ruler_qa_*: right if any reference is found (the harness takes the share of references found)",
)
_VERSION = 3  # of the cached samples


# `--preset`: the benchmark and samples per task and length. The paper speaks of eleven tasks: those without questions.
PRESETS = {"official": ("ruler", 500), "paper": ("ruler-paper", 50)}


class Ruler:
    """RULER as the runner sees it: all thirteen tasks, or as `ruler-paper` the eleven without questions."""

    usual_samples: int | None = 50
    protocol: str = PROTOCOL
    corrections: tuple[str, ...] = CORRECTIONS

    def __init__(self, data: RulerData | None = None, paper: bool = False) -> None:
        self.data, self.name = data or RulerData(), "ruler-paper" if paper else "ruler"
        self.skipped: list[str] = []

    def tasks(self) -> tuple[str, ...]:
        """The synthetic tasks, then the questions."""
        return SYNTHETIC if self.name == "ruler-paper" else (*SYNTHETIC, *QA)

    def left_out(self) -> dict[str, str]:
        """Tasks whose data was not given."""
        missing = self._missing()
        return {task: missing[task] for task in self.tasks() if task in missing}

    def _missing(self) -> dict[str, str]:
        missing: dict[str, str] = {}
        if self.data.essays is None:
            reason = "needs the essays of the haystack; give them with --essays FILE|FOLDER|hub"
            missing |= {task: reason for task, (haystack, *_) in NEEDLES.items() if haystack == "essay"}
        if self.data.squad is None:
            missing["ruler_qa_squad"] = "needs SQuAD; give it with --squad dev-v2.0.json|hub"
        if self.data.hotpotqa is None:
            missing["ruler_qa_hotpot"] = "needs HotpotQA; give it with --hotpotqa hotpot_dev_distractor_v1.json|hub"
        return missing

    def lengths(self, _task: str, asked: Sequence[int], /) -> tuple[int, ...]:
        """Samples are made for any length."""
        return tuple(asked)

    def takes_chat(self, task: str) -> bool:
        """RULER wraps every task in the model's template where it has one."""
        return task in self.tasks()

    def identity(self, task: str) -> Any:
        """Checksum of the outside data of the task."""
        if task in QA:
            return {QA[task]: self.data.checksum(QA[task])}
        if task == "ruler_cwe":
            return {"words": self.data.checksum("words")}
        return {"essays": self.data.checksum("essays")} if NEEDLES.get(task, ("",))[0] == "essay" else {}

    def describe(self, doc: Doc) -> dict[str, Any]:
        """Number and references of a sample."""
        return {"index": doc["index"], "references": doc["outputs"]}

    def documents(self, request: Request) -> list[Doc]:
        """Samples from the cache, made where they are missing.

        Raises:
            ValueError: a task without its data, or a length too short for it.
        """
        task, length = request.task, request.length
        if task in self.left_out():
            raise ValueError(f"task {task} {self.left_out()[task]}")
        if length is None or request.samples is None or length < 768:
            raise ValueError(f"length {length} is too short for RULER's templates; use 768 or more")
        asked = [_VERSION, task, length, tokenizer_hash(request.tokenizer), request.seed, request.samples]
        key = text_sha256(json.dumps([*asked, request.chat, self.identity(task)]))[:24]
        file = cache_folder() / "ruler" / f"{task}-{length}-{key}.jsonl"
        if not file.is_file():
            with alone(file.with_name(f".{file.name}.lock")):
                if not file.is_file():  # another process may have made it meanwhile
                    made = self._generate(request, length, request.samples)
                    write_atomic(file, "".join(json.dumps(doc) + "\n" for doc in made))
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def _generate(self, request: Request, length: int, count: int) -> list[Doc]:
        task, tokenizer = request.task, request.tokenizer
        made = make_samples(
            task,
            length,
            count,
            lambda doc: prompt_tokens(doc, task, tokenizer, request.chat),
            tokenizer,
            self.data,
            request.seed,
        )
        self._check_words(task, length, made)
        return made

    def _check_words(self, task: str, length: int, made: list[Doc]) -> None:
        short = min(doc["length"] for doc in made)
        if task == "ruler_cwe" and short < 0.9 * length:
            raise ValueError(
                f"ruler_cwe at {length} needs more different words than there are (its prompts end at {short} tokens); "
                "give RULER's own list with --words english_words.json or run `pip install english-words`"
            )

    def measure(self, routed: Routed, requests: Sequence[Request], share: Share) -> list[Found]:
        """Answers generated by the harness."""
        return generate(self, routed, requests, share)

    def harness_task(self, request: Request) -> Any:
        """The harness' task over these samples, with RULER's metric."""
        from datasets import Dataset
        from lm_eval.api.task import ConfigurableTask

        task = request.task
        docs = self.documents(request)
        return ConfigurableTask(
            config={
                "task": f"{task}@{request.length}",
                "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
                "dataset_path": "",
                "test_split": "test",
                "output_type": "generate_until",
                "doc_to_text": "{{input}}",
                "doc_to_target": "{{outputs}}",
                "gen_prefix": "{{gen_prefix}}",
                "target_delimiter": _delimiter(task),
                "process_results": lambda doc, results: {"score": score(task, results[0], doc["outputs"])},
                "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
                "generation_kwargs": {"do_sample": False, "max_gen_toks": new_tokens(task), "until": []},
                "metadata": {"version": 1.0},
            }
        )


def score(task: str, prediction: str, references: list[str]) -> float:
    """RULER's metric: the share of references that the answer contains; for questions, whether it contains any."""
    from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all

    answer = postprocess_pred([prediction])
    if task in QA:
        return max(float(string_match_all(answer, [[reference]])) for reference in references)
    return float(string_match_all(answer, [references]))


def prompt_tokens(doc: Doc, task: str, tokenizer: Tokenizer, chat: bool) -> int:
    """Length of the prompt that the harness makes of a sample."""
    text, prefix = doc["input"], doc["gen_prefix"]
    if not chat:
        return len(tokenizer(f"{text}{_delimiter(task)}{prefix}")["input_ids"])
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": prefix}]
    return len(tokenizer(render(messages, tokenizer, begun=True), add_special_tokens=False)["input_ids"])


def _delimiter(task: str) -> str:
    return "\n\n" if task == "ruler_cwe" else " "
