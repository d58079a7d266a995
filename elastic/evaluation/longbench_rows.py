"""Rows of LongBench's official files, checked.

Of LongBench-E: input, context, answers, all_classes, length (words), _id. Of LongBench-v2: _id, difficulty, length,
question, choice_A to choice_D, answer, context. Copies of the files have more habits: lengths as text, null where a set
has no classes, `question` for `input`, answers that are empty.
"""

import re
from collections.abc import Mapping
from typing import Any

V2 = "longbench2"
BUCKETS = ((4000, "0-4k"), (8000, "4-8k"))  # in words; from the last bound on: 8k+
CHOOSING = ("longbench_trec_e",)  # sets whose answer is one of the classes that a row lists
PARAGRAPHS = ("longbench_passage_retrieval_en_e",)  # sets whose answer is the number of a paragraph
PARAGRAPH = re.compile(r"Paragraph (\d+)")


def bucket(words: int) -> str:
    """LongBench-E's length bucket."""
    return next((name for bound, name in BUCKETS if words < bound), "8k+")


def document(task: str, row: Any) -> dict[str, Any]:
    """What templates and metrics read of a row, its references, and the groups that scores are told by."""
    if not isinstance(row, Mapping):
        raise TypeError(f"a row is a {type(row).__name__}, expected an object")
    made: dict[str, Any]
    if task == V2:
        texts = {name: row[name] for name in ("context", "question", *(f"choice_{c}" for c in "ABCD"), "answer")}
        groups = [row["difficulty"], row["length"]]
        if row["answer"] not in tuple("ABCD"):
            raise ValueError(f"answer {row['answer']!r}; expected A, B, C or D")
        made = {"references": [row["answer"]]}
    else:
        texts = {"context": row["context"], "question": row["input"] if "input" in row else row["question"]}
        answers = _answers(task, row["answers"])
        groups = [bucket(_length(row["length"]))]
        made = {"references": answers, "answers": answers, "all_classes": _classes(task, row.get("all_classes"))}
    for name, text in (*texts.items(), *((f"group {n}", group) for n, group in enumerate(groups, 1))):
        if not isinstance(text, str):
            raise TypeError(f"field {name!r} is a {type(text).__name__}, expected text")
    return {**texts, **made, "id": str(row["_id"]), "groups": groups}


def _answers(task: str, answers: Any) -> list[str]:
    """Texts, of which one at least can be given."""
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise TypeError(f"answers {answers!r}; expected a list of texts")
    if not any(answer.strip() for answer in answers):
        raise ValueError(f"answers {answers!r}; expected one that is not empty")
    if task in PARAGRAPHS and not any(PARAGRAPH.search(answer) for answer in answers):
        raise ValueError(f"answers {answers!r}; expected 'Paragraph <number>'")
    return answers


def _length(length: Any) -> int:
    """A number of words; some copies of the files have it as text."""
    if isinstance(length, str) and length.isascii() and length.isdecimal():
        return int(length)
    if not isinstance(length, int) or isinstance(length, bool) or length < 0:
        raise TypeError(f"length {length!r}; expected a number of words")
    return length


def _classes(task: str, classes: Any) -> list[str]:
    """Names of classes; null where the set has none."""
    if classes is None and task not in CHOOSING:
        return []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"all_classes {classes!r}; expected a list of texts")
    if task in CHOOSING and not classes:
        raise ValueError("all_classes []; expected the classes that the answer is one of")
    return classes
