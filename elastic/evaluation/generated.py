"""Answers that a model generates, by lm-evaluation-harness: what RULER and LongBench measure."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Protocol

from elastic.evaluation.benchmark import Found, Request, Routed, Share

PROTOCOL = "by lm-evaluation-harness"


class Generating(Protocol):
    """A benchmark whose tasks are the harness'."""

    def harness_task(self, request: Request) -> Any:
        """A `ConfigurableTask` that generates, whose `process_results` gives {"score": between 0 and 1}.

        Raises:
            ValueError: documents that cannot be made or read.
        """
        ...

    def describe(self, doc: dict[str, Any]) -> dict[str, Any]:
        """What the result file keeps of a document: `index`, `references`, and perhaps `groups`."""
        ...


def generate(benchmark: Generating, routed: Routed, requests: Sequence[Request], share: Share) -> list[Found]:
    """`Benchmark.measure` of a benchmark that generates; tasks of one call are generated side by side."""
    from elastic.evaluation.routed_lm import RoutedLM

    tasks = [benchmark.harness_task(request) for request in requests]
    lm = RoutedLM(routed.model, routed.tokenizer, routed.route, routed.batch_size, sparse=routed.sparse)
    docs = {task.config.task: share(range(len(task.eval_docs))) for task in tasks}
    some = [task for task in tasks if docs[task.config.task]]
    found = _by_harness(lm, some, requests[0].chat, docs)
    return [
        [(sample["doc_id"], _line(benchmark, sample, lm)) for sample in found.get(task.config.task, ())]
        for task in tasks
    ]


def _line(benchmark: Generating, sample: dict[str, Any], lm: Any) -> dict[str, Any]:
    """What is kept of a sample that the harness has evaluated."""
    return {
        **benchmark.describe(sample["doc"]),
        "prediction": sample["resps"][0][0],
        "score": sample["score"],
        **asdict(lm.prefill_stats[sample["arguments"][0][0]]),
    }


def _by_harness(lm: Any, tasks: list[Any], chat: bool, docs: dict[str, list[int]]) -> dict[str, Any]:
    """What its `simple_evaluate` does between reading thousands of task files (20 s) and collecting facts about the
    machine (seconds for every task, by calling pip and asking the hub).

    Args:
        docs: places of the documents to evaluate, by task; none where there are no tasks.

    Returns:
        the samples by task.
    """
    if not tasks:
        return {}
    import lm_eval
    from lm_eval.tasks import TaskManager

    for task in tasks:
        task.set_config(key="num_fewshot", value=0)
    loaded = TaskManager(include_defaults=False).load(tasks)
    results: dict[str, Any] = lm_eval.evaluate(
        lm=lm, task_dict=loaded, bootstrap_iters=0, apply_chat_template=chat, log_samples=True, verbosity="ERROR",
        samples={task.config.task: docs[task.config.task] for task in tasks},
    )  # fmt: skip
    found: dict[str, Any] = results["samples"]
    return found
