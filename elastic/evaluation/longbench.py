"""LongBench-E and LongBench-v2: lm-evaluation-harness' tasks, corrected by the files in configs/eval, over the official
files or the hub's.

`longbench_rows` has the format of their rows.
"""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from elastic.data.file_rows import ENDINGS, ReadReport, read_rows
from elastic.evaluation.benchmark import Found, Request, Routed, Share
from elastic.evaluation.generated import PROTOCOL, generate
from elastic.evaluation.longbench_rows import V2, document
from elastic.files import file_sha256, shipped, text_sha256

CONFIGS = shipped("configs") / "eval"
E = "longbench_e"
SETS = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
TASKS = {E: tuple(f"longbench_{name}_e" for name in SETS), V2: (V2,)}
HUB = {E: "Xnhyacinth/LongBench", V2: "THUDM/LongBench-v2"}
V2_STEMS = ("data", "longbench_v2", "longbench2")
PACKAGES = ("rouge",)  # of the metrics
CORRECTIONS = {
    E: ("all 13 sets (the harness' group has 9), scores by length in words: 0-4k, 4-8k, 8k+",),
    V2: ("scores by difficulty (easy, hard) and by length (short, medium, long)",),
}
COMMON = (
    "an over-long prompt loses its middle, after the chat template is applied (the harness cuts its beginning, the "
    "official run the middle before the template)",
    "thinking is off where the chat template knows enable_thinking, unless a checkpoint was trained otherwise",
)


class LongBench:
    """`longbench_e` or `longbench2` as the runner sees it.

    Args:
        name: which.
        data: folder of the official files, as they are or in a folder `data` of it; None: the hub.

    Attributes:
        skipped: rows that could not be used, and why, of the tasks that were run.
    """

    usual_samples: int | None = None
    protocol: str = PROTOCOL

    def __init__(self, name: str, data: Path | None) -> None:
        self.name, self.data = name, data
        self.skipped: list[str] = []
        self._identities: dict[str, dict[str, Any]] = {}
        self._left_out: dict[str, str] | None = None

    @property
    def corrections(self) -> tuple[str, ...]:
        """Of all tasks, then of single ones, then what both benchmarks share."""
        own = [f"{task}: {line}" for task in self.tasks() for line in _metadata(task).get("corrections", ())]
        return (*CORRECTIONS[self.name], *own, *COMMON)

    def tasks(self) -> tuple[str, ...]:
        """The 13 sets under their names in the harness, or the one task of LongBench-v2."""
        return TASKS[self.name]

    def left_out(self) -> dict[str, str]:
        """Tasks whose documents, or whose metrics' packages, are not here."""
        if self._left_out is None:
            self._left_out = self._find_left_out()
        return self._left_out

    def _find_left_out(self) -> dict[str, str]:
        missing = [package for package in PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            return dict.fromkeys(self.tasks(), f"needs {', '.join(missing)}: pip install 'elastic-attention[eval]'")
        reasons: dict[str, str] = {}
        for task in self.tasks():
            try:
                _hub_rows(task) if self.data is None else _file(task, self.data)
            except ConnectionError as error:  # each try takes half a minute, so one speaks for all
                return dict.fromkeys(self.tasks(), str(error))
            except ValueError as error:
                reasons[task] = str(error)
        return reasons

    def lengths(self, _task: str, _asked: Sequence[int], /) -> tuple[None, ...]:
        """Once, whatever was asked for: its documents have the lengths that they have."""
        return (None,)

    def takes_chat(self, task: str) -> bool:
        """All but the few-shot and code sets."""
        return bool(_metadata(task).get("chat_template", True))

    def identity(self, task: str) -> dict[str, Any]:
        """Checksum of the documents' file, number of documents, rows that were left out, versions of the metrics."""
        if task not in self._identities:
            report = ReadReport()
            documents(task, self.data, None, report)
            file = None if self.data is None else _file(task, self.data)
            self.skipped += report.bad
            self._identities[task] = {
                "file": f"hub: {HUB[self.name]}" if file is None else file.name,
                "sha256": None if file is None else file_sha256(file),
                "documents": report.good,
                "left out": report.bad,
                "task file": file_sha256(ours) if (ours := CONFIGS / f"{task}.yaml").is_file() else None,
                "metrics": {package: version(package) for package in PACKAGES},
            }
        return self._identities[task]

    def describe(self, doc: dict[str, Any]) -> dict[str, Any]:
        """Number, official id, references, and the groups that scores are told by."""
        return {name: doc[name] for name in ("index", "id", "references", "groups")}

    def measure(self, routed: Routed, requests: Sequence[Request], share: Share) -> list[Found]:
        """Answers generated by the harness."""
        return generate(self, routed, requests, share)

    def harness_task(self, request: Request) -> Any:
        """The corrected task over the first documents."""
        docs = documents(request.task, self.data, request.samples, ReadReport())
        return harness_task(request.task, docs)


@cache
def task_config(task: str) -> dict[str, Any]:
    """The harness' task under our corrections; its metrics are those of `longbench_metrics`.

    Raises:
        ValueError: no task files beside the installed package.
    """
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    from elastic.evaluation.longbench_metrics import OF_HARNESS

    if not (CONFIGS / f"{V2}.yaml").is_file():
        raise ValueError(f"no task files in {CONFIGS}; install from a clone of the repository (pip install -e .[eval])")
    ours = CONFIGS / f"{task}.yaml"
    config = load_yaml(ours, recursive=False) if ours.is_file() else {}
    include = config.pop("include", f"longbench/{task.removeprefix('longbench_')}.yaml")
    merged = {**load_yaml(Path(lm_eval.tasks.__file__).parent / include, resolve_func=False), **config}
    if isinstance(named := merged["process_results"], str):  # not resolved: its file imports fuzzywuzzy
        merged["process_results"] = OF_HARNESS[named.rpartition(".")[2]]
    return merged


def harness_task(task: str, docs: list[dict[str, Any]]) -> Any:
    """The harness' task over these documents; its metric is `score`."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    config = {key: value for key, value in task_config(task).items() if key not in ("tag", "dataset_name")}
    config |= {
        "task": task,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "dataset_path": "",
        "test_split": "test",
        "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    return ConfigurableTask(config=config)


def documents(task: str, data: Path | None, count: int | None, report: ReadReport) -> list[dict[str, Any]]:
    """The first `count` documents of a task (None: all), checked; bad rows are named in the report, as is a row that is
    there a second time. Rows that share their id alone are different documents.

    Raises:
        ValueError: no file of this task, one that cannot be read, or one without a usable row.
    """
    found: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    hub = ((f"row {number}", row) for number, row in enumerate(_hub_rows(task) if data is None else (), 1))
    for where, row in hub if data is None else read_rows(_file(task, data), report):
        try:
            made = document(task, row)
            if (first := seen.setdefault(text_sha256(json.dumps(made)), where)) != where:
                raise ValueError(f"the same document as {first}")
            found.append({"index": len(found), **made})
        except (KeyError, TypeError, ValueError) as error:
            report.bad.append(f"{where}: {f'no field {error}' if isinstance(error, KeyError) else error}")
        if count is not None and len(found) == count:
            break
    report.good += len(found)
    if not found:
        raise ValueError(f"task {task} has no usable row; {report}")
    return found


def _stems(task: str) -> tuple[str, ...]:
    return V2_STEMS if task == V2 else (task.removeprefix("longbench_"),)


def _metadata(task: str) -> Mapping[str, Any]:
    config = task_config(task)
    return (config.get("metadata") or {}) if (CONFIGS / f"{task}.yaml").is_file() else {}


def _file(task: str, data: Path) -> Path:
    """The official file of a task in a folder."""
    folders = (data, data / "data", data / "LongBench-v2", data / "LongBench")
    for file in (folder / f"{stem}{ending}" for folder in folders for stem in _stems(task) for ending in ENDINGS):
        if file.is_file():
            return file
    names = " or ".join(_stems(task)) if task == V2 else "<set>_e"
    raise ValueError(f"has no file {names} with {', '.join(ENDINGS)} in {data}")


@cache
def _hub_rows(task: str) -> Any:
    from datasets import load_dataset

    name = (HUB[V2],) if task == V2 else (HUB[E], *_stems(task))
    try:
        return load_dataset(*name, split="train" if task == V2 else "test")
    except Exception as error:  # the hub's client, arrow and json share no base
        kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
        raise kind(
            f"cannot be had from the hub ({' '.join(name)}: {type(error).__name__}); name the folder of the official "
            "files with --data"
        ) from error
