"""What the runner asks of a benchmark: names of its tasks, and lm-evaluation-harness tasks over their documents."""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from elastic.protocols import Tokenizer


@dataclass(frozen=True)
class Request:
    """Documents that the runner asks for.

    Attributes:
        task: one of the benchmark's tasks.
        length: tokens of prompt and answer; None for a benchmark without lengths.
        samples: how many documents; None takes all of them.
        tokenizer: of the backbone.
        seed: of what is drawn.
        chat: whether prompts go into the chat template.
    """

    task: str
    length: int | None
    samples: int | None
    tokenizer: Tokenizer
    seed: int
    chat: bool


class Benchmark(Protocol):
    """A family of tasks.

    Attributes:
        name: `--tasks` takes it for all tasks that can run.
        by_length: whether every task runs once per length; otherwise once, its documents as they are, prompts over the
            model's limit cut in the middle.
    """

    name: str
    by_length: bool

    @property
    def corrections(self) -> tuple[str, ...]:
        """Where its tasks differ from the harness' own, one sentence each. One that begins with a task's name, or a
        pattern such as `ruler_qa_*`, and a colon is about these tasks alone.
        """
        ...

    def tasks(self) -> Sequence[str]:
        """Names of all its tasks, in the order of the table."""
        ...

    def left_out(self) -> Mapping[str, str]:
        """Tasks that cannot run here, and what they need."""
        ...

    def takes_chat(self, task: str) -> bool:
        """Whether the official protocol allows the chat template."""
        ...

    def identity(self, task: str) -> Any:
        """What its documents depend on beyond the request (checksums of local files), as JSON; results made from other
        documents are not used again.
        """
        ...

    def harness_task(self, request: Request) -> Any:
        """A `ConfigurableTask` that generates, whose `process_results` gives {"score": between 0 and 1}.

        Raises:
            ValueError: documents that cannot be made or read.
        """
        ...

    def describe(self, doc: dict[str, Any]) -> dict[str, Any]:
        """What the result file keeps of a document: `index`, `references`, and where the summary shows parts of a task
        apart (by length or difficulty), `groups`: their names.
        """
        ...


def choose(benchmarks: Sequence[Benchmark], names: Sequence[str]) -> list[tuple[Benchmark, str]]:
    """Tasks by the names of benchmarks and of single tasks, each once, in order.

    Raises:
        ValueError: an unknown name, or a task that cannot run here; nothing left to run.
    """
    chosen: list[tuple[Benchmark, str]] = []
    for name in names:
        family = next((b for b in benchmarks if b.name == name), None)
        owner = next((b for b in benchmarks if name in b.tasks()), None)
        if family is not None:
            found = [(family, task) for task in family.tasks() if task not in family.left_out()]
            if not found:
                raise ValueError(f"no task of {name} can run here: {reasons(family.left_out())}")
        elif owner is None:
            known = ", ".join([b.name for b in benchmarks] + [task for b in benchmarks for task in b.tasks()])
            raise ValueError(f"unknown task {name!r}; expected some of {known}")
        elif name in owner.left_out():
            raise ValueError(f"task {name} {owner.left_out()[name]}")
        else:
            found = [(owner, name)]
        chosen += [pair for pair in found if pair not in chosen]
    return chosen


def corrections_of(benchmark: Benchmark, tasks: Sequence[str]) -> list[str]:
    """The benchmark's corrections that concern some of these tasks."""

    def concerns(correction: str) -> bool:
        subject, colon, _ = correction.partition(": ")
        return not colon or " " in subject or bool(fnmatch.filter(tasks, subject))

    return [correction for correction in benchmark.corrections if concerns(correction)]


def reasons(left_out: Mapping[str, str]) -> str:
    """Tasks and what they need, those with the same reason together."""
    together: dict[str, list[str]] = {}
    for task, reason in left_out.items():
        together.setdefault(reason, []).append(task)
    return "; ".join(f"{', '.join(tasks)} ({reason})" for reason, tasks in together.items())
