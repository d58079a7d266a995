"""What the runner asks of a benchmark: names of its tasks, and what a model under one method makes of their samples."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from elastic.config import SparseConfig
from elastic.protocols import CausalLM, Tokenizer

Share = Callable[[Sequence[int]], list[int]]  # places of samples to those that this process evaluates
Found = list[tuple[int, dict[str, Any]]]  # place of a sample, and the line of its result file


@dataclass(frozen=True)
class Request:
    """Samples that the runner asks for.

    Attributes:
        task: one of the benchmark's tasks.
        length: tokens of prompt and answer; None for a benchmark without lengths.
        samples: how many; None takes all of them.
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


@dataclass(frozen=True)
class Routed:
    """A model under one method.

    Attributes:
        backbone: its name.
        model: attached, in eval mode, at the method's bias.
        tokenizer: of the backbone.
        route: what `override_routes` takes; None leaves the decision to the routers.
        sparse: modes and pattern sizes.
        batch_size: samples in one forward pass.
    """

    backbone: str
    model: CausalLM
    tokenizer: Tokenizer
    route: int | Tensor | None
    sparse: SparseConfig
    batch_size: int


class Benchmark(Protocol):
    """A family of tasks.

    Attributes:
        name: `--tasks` takes it for all tasks that can run; without spaces.
        usual_samples: per task and length, where nobody says how many; None: all that there are.
        protocol: how its samples are judged, in a few words.
        skipped: documents of the tasks that were run that could not be used, and why.
    """

    name: str
    usual_samples: int | None
    protocol: str
    skipped: list[str]

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

    def lengths(self, task: str, asked: Sequence[int], /) -> tuple[int | None, ...]:
        """Those of the asked lengths that it has samples of. (None,) for a benchmark without lengths, whose documents
        are taken as they are, prompts over the model's limit cut in the middle.
        """
        ...

    def takes_chat(self, task: str, /) -> bool:
        """Whether the official protocol allows the chat template."""
        ...

    def identity(self, task: str, /) -> Any:
        """What its documents depend on beyond the request (checksums of local files), as JSON; results made from other
        documents are not used again.
        """
        ...

    def measure(self, routed: Routed, requests: Sequence[Request], share: Share) -> list[Found]:
        """Per request, what the model makes of this process's samples: `index`, `score` (0 to 1), what
        `elastic.evaluation.scores.MEASURED` names, and where the summary shows parts of a task apart (by length or
        difficulty), `groups`: their names.

        Raises:
            ValueError: samples that cannot be made or read.
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
