"""LongBench-E and LongBench-v2 from lm-evaluation-harness' tasks, corrected by the files in configs/eval, on the
official files or the hub's.

Official record of LongBench-E: input, context, answers, all_classes, length (words), _id; one file per set,
`<set>_e.jsonl`. Of LongBench-v2: _id, domain, difficulty, length, question, choice_A to choice_D, answer, context; one
file, `data.json`.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from elastic.rows import ENDINGS, ReadReport, read_rows

CONFIGS = Path(__file__).parents[2] / "configs" / "eval"
E, V2 = "longbench_e", "longbench2"
HUB = {E: "Xnhyacinth/LongBench", V2: "THUDM/LongBench-v2"}
BUCKETS = ((4000, "0-4k"), (8000, "4-8k"))  # in words; from the last bound on: 8k+
V2_FILES = ("data", "longbench_v2", "longbench2")
COMMON = (
    "over-long prompts lose their middle after the chat template is applied (the official run cuts before)",
    "thinking is off where the chat template knows enable_thinking",
)


class MissingDataError(Exception):
    """Data of a task that cannot be had: the task is named and left out of the means."""


def tasks(group: str) -> tuple[str, ...]:
    """Task names of a group: `longbench_e/<set>`, or `longbench2` itself."""
    if group == V2:
        return (V2,)
    return tuple(f"{E}/{name}" for name in read_config(CONFIGS / f"{E}.yaml")["task"])


@lru_cache
def task_config(task: str) -> Mapping[str, Any]:
    """The harness' task under our corrections.

    Raises:
        FileNotFoundError: no task files beside the installed package.
        ValueError: an unknown task.
    """
    if task not in (*tasks(E), V2):
        raise ValueError(f"unknown task {task!r}; expected {E} ({', '.join(tasks(E))}) or {V2}")
    file = CONFIGS / f"{task}.yaml"
    return read_config(file) if file.is_file() else _harness_file(f"longbench/{task.partition('/')[2]}_e.yaml")


def read_config(file: Path) -> dict[str, Any]:
    """A task or group file, on top of the harness' file that it includes.

    Raises:
        FileNotFoundError: no such file.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    if not file.is_file():
        raise FileNotFoundError(
            f"no task file {file}; install from a clone of the repository: pip install -e '.[eval]'"
        )
    config = load_yaml(file, recursive=False)
    base = _harness_file(config.pop("include")) if "include" in config else {}
    return {**base, **config}


def _harness_file(name: str) -> dict[str, Any]:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(Path(lm_eval.tasks.__file__).parent / name)


def corrections(task: str) -> list[str]:
    """What differs from the harness' task, or from the official run, in words."""
    own = list((task_config(task).get("metadata") or {}).get("corrections", ()))
    group = read_config(CONFIGS / f"{E}.yaml")["metadata"]["corrections"] if task != V2 else []
    return [" ".join(line.split()) for line in (*group, *own, *COMMON)]


def chat_allowed(task: str) -> bool:
    """Whether prompts may go into a chat template: not those of few-shot and code sets."""
    return bool((task_config(task).get("metadata") or {}).get("chat_template", True))


def new_tokens(task: str) -> int:
    """Length limit of an answer."""
    return int(task_config(task)["generation_kwargs"]["max_gen_toks"])


def documents(task: str, data: Path | None, count: int | None, report: ReadReport) -> list[dict[str, Any]]:
    """The first `count` documents of a task (None: all), checked; bad rows are named in the report.

    Args:
        data: folder of official files, as they are or in a folder `data` of it; None: the hub.

    Raises:
        MissingDataError: no file of this task there, or the hub has it not.
        ValueError: files that cannot be read or hold no usable row.
    """
    found: list[dict[str, Any]] = []
    for where, row in _from_hub(task) if data is None else read_rows(_file(task, data), report):
        try:
            found.append({"index": len(found), **_document(task, row)})
        except (KeyError, TypeError, ValueError) as error:
            report.bad.append(f"{where}: {f'no field {error}' if isinstance(error, KeyError) else error}")
        if count is not None and len(found) == count:
            break
    report.good += len(found)
    if not found:
        raise ValueError(f"task {task} has no usable row; {report}")
    return found


def _file(task: str, data: Path) -> Path:
    stems = V2_FILES if task == V2 else (f"{task.partition('/')[2]}_e",)
    folders = (data, data / "data", data / "LongBench-v2", data / task.partition("/")[0])
    files = [folder / f"{stem}{ending}" for folder in folders for stem in stems for ending in ENDINGS]
    if found := next((file for file in files if file.is_file()), None):
        return found
    raise MissingDataError(f"no {' or '.join(stems)}{{{','.join(ENDINGS)}}} in {data}")


def _from_hub(task: str) -> Any:
    from datasets import load_dataset

    group, _, name = task.partition("/")
    arguments = (HUB[V2],) if task == V2 else (HUB[group], f"{name}_e")
    try:
        rows = load_dataset(*arguments, split="train" if task == V2 else "test")
    except Exception as error:  # the hub's client, arrow and json share no base
        raise MissingDataError(
            f"{' '.join(arguments)} cannot be had from the hub ({type(error).__name__}); name the folder of the "
            "official files with --data"
        ) from error
    return ((f"{' '.join(arguments)}: row {number}", row) for number, row in enumerate(rows, 1))


def _document(task: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """What the templates and metrics read, and the splits that results are told by."""
    if not isinstance(row, Mapping):
        raise TypeError(f"a row is a {type(row).__name__}, expected an object")
    if task == V2:
        texts = {name: row[name] for name in ("context", "question", *(f"choice_{c}" for c in "ABCD"), "answer")}
        splits = {"difficulty": row["difficulty"], "length": row["length"]}
        if row["answer"] not in tuple("ABCD"):
            raise ValueError(f"answer {row['answer']!r}; expected A, B, C or D")
        made = {**texts, "id": str(row["_id"]), "splits": splits}
    else:
        texts = {"context": row["context"], "question": row["input"] if "input" in row else row["question"]}
        answers, length = row["answers"], row["length"]
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise TypeError(f"answers {answers!r}; expected a list of texts")
        if not isinstance(length, int) or length < 0:
            raise TypeError(f"length {length!r}; expected a number of words")
        classes = row.get("all_classes") or []
        splits = {"length": bucket(length)}
        made = {**texts, "answers": answers, "all_classes": classes, "id": str(row["_id"]), "splits": splits}
    for name, text in (*texts.items(), *splits.items()):
        if not isinstance(text, str):
            raise TypeError(f"field {name!r} is a {type(text).__name__}, expected text")
    return made


def bucket(words: int) -> str:
    """LongBench-E's length bucket."""
    return next((name for bound, name in BUCKETS if words < bound), "8k+")


def harness_task(task: str, docs: list[dict[str, Any]]) -> Any:
    """The harness' task over these documents; the metric is `score`."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = {key: value for key, value in task_config(task).items() if key not in ("tag", "dataset_name", "metadata")}
    config |= {
        "task": task,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "dataset_path": "",
        "test_split": "test",
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    return ConfigurableTask(config=config)
