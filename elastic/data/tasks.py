"""The task classes of the mixtures (docs/design.md section 9). A task's index is its position in `TASKS`."""

SENSITIVE = ("single_qa", "multihop_qa")
ROBUST = ("summarization", "code", "in_context")
TASKS = (*SENSITIVE, *ROBUST)


def task_index(name: str) -> int:
    """Index of a task class.

    Raises:
        ValueError: an unknown name, with the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known tasks are {', '.join(TASKS)}")
    return TASKS.index(name)
