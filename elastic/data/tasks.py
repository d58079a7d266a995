"""The task classes of the mixtures (docs/design.md section 9). A task's index is its position in `TASKS`."""

SENSITIVE = ("single_qa", "multihop_qa")
ROBUST = ("summarization", "code", "in_context")
TASKS = (*SENSITIVE, *ROBUST)
BY_LOSS = ("summarization", "code")  # tasks whose answers are running text


def task_index(name: str) -> int:
    """Index of a task class.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks are {', '.join(TASKS)}")
    return TASKS.index(name)


def bound_score(task: str) -> str:
    """The score that tells whether answers of this task are as good as the dense model's, `exact` or `loss`."""
    return "loss" if task in BY_LOSS else "exact"
