"""Raw records of a mixture (docs/design.md section 9) and how they are read: bad ones are counted, named, skipped."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from elastic.data.file_rows import ReadReport, read_rows
from elastic.data.tasks import task_index


@dataclass(frozen=True)
class Record:
    """One example before tokenisation.

    Attributes:
        task: a name of `elastic.data.tasks.TASKS`.
        context: the long input; the prompt is the context, a blank line and the question.
        question: what is asked; may be empty where the context asks it already.
        answer: what the model should say.
        source: where the record came from: the name of a generator or data set, then a slash and an id if wanted.
        answer_prefix: how the assistant's turn begins, up to the answer; given, not asked for. Models answer in
            sentences, so a bare value is judged fairly only as the end of one.
        system: the system prompt; None leaves the chat template's own, an empty text asks for none.
        turns: earlier turns of the conversation, (what the user said, what the assistant answered).
    """

    task: str
    context: str
    question: str
    answer: str
    source: str = ""
    answer_prefix: str = ""
    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", _turns(self.turns))
        for name in ("task", "context", "question", "answer", "source", "answer_prefix"):
            _check_text(name, getattr(self, name))
        if self.system is not None:
            _check_text("system", self.system)
        task_index(self.task)
        for name in ("context", "answer"):
            if not getattr(self, name).strip():
                raise ValueError(f"field {name!r} is empty; a record needs a context and an answer")

    @property
    def prompt(self) -> str:
        """What the user says."""
        return f"{self.context}\n\n{self.question}" if self.question else self.context

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation up to the answer, as chat templates take it."""
        said = [] if self.system is None else [("system", self.system)]
        for user, assistant in self.turns:
            said += [("user", user), ("assistant", assistant)]
        return [{"role": role, "content": text} for role, text in (*said, ("user", self.prompt))]

    @property
    def source_name(self) -> str:
        """Generator or data set, without the id; `unknown` where the record does not say."""
        return self.source.partition("/")[0] or "unknown"

    @classmethod
    def from_dict(cls, values: Any) -> "Record":
        """Check and build; keys that no field has are refused, so that nothing a user wrote is lost. An optional field
        that is null, as parquet has it where other rows have a value, is left out.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a record is a {type(values).__name__}, expected an object with task, context, answer")
        names, required = [f.name for f in fields(cls)], ("task", "context", "question", "answer")
        missing = [name for name in required if name not in values]
        unknown = [name for name in values if name not in names]
        if missing or unknown:
            raise ValueError(
                f"record fields do not fit: missing {missing or 'none'}, unknown {unknown or 'none'}; expected {names}"
            )
        return cls(**{name: value for name, value in values.items() if value is not None or name in required})


def _turns(value: Any) -> tuple[tuple[str, str], ...]:
    """Earlier turns as tuples; in a file they are lists."""
    pairs = value if isinstance(value, list | tuple) else None
    if pairs is None or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"field 'turns' is {value!r:.80}, expected a list of [user text, assistant text]")
    for user, assistant in pairs:
        for text in (user, assistant):
            _check_text("turns", text)
            if not text.strip():
                raise ValueError("field 'turns' holds an empty text; leave that turn out")
    return tuple((user, assistant) for user, assistant in pairs)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"field {name!r} is a {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"field {name!r} has half a surrogate pair at character {error.start}; write valid Unicode"
        ) from error


def read_records(
    path: str | Path, report: ReadReport | None = None, every: int = 1, first: int = 0
) -> Iterator[Record]:
    """Records of a `.jsonl`, `.json` or `.parquet` file, in order; bad ones go to `report` and are skipped.

    Args:
        path: the file.
        report: what was met.
        every, first: take only each `every`-th line or row, from the place `first` (from 0) on.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another file type, a parquet or JSON file that cannot be read, or a file without one good record.
    """
    path, report = Path(path), report if report is not None else ReadReport()
    if not path.is_file():
        raise FileNotFoundError(f"no record file at {path}; `elastic data_prep build_mixture` writes them")
    before = report.good
    for where, values in read_rows(path, report, every, first):
        try:
            record = Record.from_dict(values)
        except ValueError as error:
            report.bad.append(f"{where}: {error}")
            continue
        report.good += 1
        yield record
    if report.good == before:
        raise ValueError(f"{path} holds no usable record; {report}")


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """Write JSON Lines in UTF-8, one record a line, as they come; returns their number. A system prompt and earlier
    turns are written where there are any.
    """
    count = 0
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            values = asdict(record)
            for name in ("system", "turns"):
                if not getattr(record, name) and values[name] != "":
                    del values[name]
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
            count += 1
    return count
