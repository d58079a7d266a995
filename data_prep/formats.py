"""Rows of published data sets, in their own formats, as common records. A row that lacks what its format has raises
KeyError, TypeError or ValueError.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from elastic.data.records import Record

Row = Mapping[str, Any]
Converter = Callable[[Row], Record]
FIELDS = ("context", "question", "answer")
# What ChatQA2's rows carry of the chat format and tokenizer that their makers trained with.
SPEAKER, REPLY, BEGIN = re.compile(r"^\s*User:\s*"), re.compile(r"\s*Assistant:\s*$"), "<|begin_of_text|>"
SUMMARY = re.compile(r"\bsummar(y|ies|i[sz]e)\b", re.IGNORECASE)


def musique(row: Row) -> Record:
    """All paragraphs of a question, numbered with their titles; unanswerable questions are refused."""
    if row.get("answerable") is False:
        raise ValueError("not answerable")
    paragraphs = [f"Passage {i}: {p['title']}\n{p['paragraph_text']}" for i, p in enumerate(row["paragraphs"], 1)]
    question = f"Answer the question from the passages, as briefly as possible. Question: {row['question']}"
    return Record("multihop_qa", "\n\n".join(paragraphs), question, row["answer"], f"musique/{row['id']}")


def govreport(row: Row) -> Record:
    """A government report and its summary."""
    return Record(
        "summarization", row["report"], "Write a one-page summary of the report.", row["summary"], "govreport"
    )


def xsum(row: Row) -> Record:
    """A news article and its one-sentence summary."""
    question = "Summarise the article in one sentence."
    return Record("summarization", row["document"], question, row["summary"], f"xsum/{row['id']}")


def chatqa2(row: Row) -> Record:
    """ChatQA2-Long-SFT: `sub-paragraphs`, `question`, `answer` (a text or a list of texts), `paragraph_id`.

    The part NarrativeQA_131072 has its document in `sub-paragraphs` and a bare question; the part long_sft has all of
    the prompt in `question`, between "User:" and "Assistant:". Prompts whose last words ask for a summary are
    `summarization`, the others `single_qa`.
    """
    context = _joined(row["sub-paragraphs"]).replace(BEGIN, "").strip()
    question = REPLY.sub("", SPEAKER.sub("", row["question"].replace(BEGIN, ""))).strip()
    answer = row["answer"]
    if not context:
        context, question = question, ""
    task = "summarization" if SUMMARY.search((question or context)[-300:]) else "single_qa"
    source = f"chatqa2/{row.get('paragraph_id') or ''}".rstrip("/")
    return Record(task, context, question, answer[0] if isinstance(answer, list) else answer, source)


def colt(row: Row) -> Record:
    """CoLT-132K: code between `prefix` and `suffix` of a file is `middle`; `cross_file_dependency` holds declarations
    (`code_file_path`, `abstraction`) and `similar_functions` code (`code_file_path`, `code_block`) of its repository.
    """
    parts = []
    for key, text in (("cross_file_dependency", "abstraction"), ("similar_functions", "code_block")):
        parts += [f"File {d['code_file_path']}:\n{d[text]}" for d in row.get(key) or () if (d[text] or "").strip()]
    name = row["code_file_path"]
    if (row["suffix"] or "").strip():
        parts.append(f"End of file {name}:\n{row['suffix']}")
    parts.append(f"Beginning of file {name}:\n{row['prefix']}")
    question = f"Write the code of {name} that comes next, up to where its end begins. Write code only."
    return Record("code", "\n\n".join(parts), question, row["middle"], f"colt/{row.get('namespace') or name}")


CONVERTERS: dict[str, Converter] = {
    "chatqa2": chatqa2,
    "musique": musique,
    "colt": colt,
    "govreport": govreport,
    "xsum": xsum,
}


def mapped(name: str, task: str, fields: Mapping[str, str]) -> Converter:
    """Converter of rows whose columns the user names: {field of the record: column}; without `question` it is empty.

    Raises:
        ValueError: fields that a record does not have, or no context or answer.
    """
    unknown, lacking = [f for f in fields if f not in FIELDS], [f for f in ("context", "answer") if f not in fields]
    if unknown or lacking:
        raise ValueError(
            f"--fields names {', '.join(fields) or 'nothing'}; expected context=COLUMN,question=COLUMN,answer=COLUMN "
            "(question may be left out)"
        )

    def convert(row: Row) -> Record:
        values: dict[str, Any] = {f: row[fields[f]] if f in fields else "" for f in FIELDS}
        if values["question"] is None:
            values["question"] = ""
        return Record(task, **values, source=name)

    return convert


def _joined(value: Any) -> str:
    """Text, or a list of texts as paragraphs; nothing where the row has none."""
    return "\n\n".join(value) if isinstance(value, list) else value or ""
