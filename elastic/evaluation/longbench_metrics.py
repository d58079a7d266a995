"""LongBench's official post-processing of answers before the harness' own metrics; named by the task files in
configs/eval. Each function takes a document and the harness' list of one answer and returns {"score": 0 to 1}.
"""

import re
from collections.abc import Callable
from typing import Any

from fuzzywuzzy import fuzz
from lm_eval.tasks.longbench import metrics

MATCHER = fuzz.SequenceMatcher.__module__  # difflib, or python-Levenshtein's, whose ratios differ a little
Document = dict[str, Any]
Scored = dict[str, float]
LETTERS = (re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])"))


def first_line(answer: str) -> str:
    """The first line after leading line feeds: few-shot prompts make models continue with further examples."""
    return answer.lstrip("\n").split("\n")[0]


def classification(doc: Document, results: list[str]) -> Scored:
    """One divided by the number of classes that the first line names, if the right one is among them; names that are
    part of the right one do not count.
    """
    return _of_first_line(metrics.get_classification_score, doc, results)


def qa_f1(doc: Document, results: list[str]) -> Scored:
    """Best F1 of the first line's words over the references."""
    return _of_first_line(metrics.get_qa_f1_score, doc, results)


def rouge(doc: Document, results: list[str]) -> Scored:
    """Best ROUGE-L of the first line over the references; an empty line has none."""
    return _of_first_line(metrics.get_rouge_score, doc, results)


def code_similarity(doc: Document, results: list[str]) -> Scored:
    """Best edit similarity over the references of the first line that is neither a comment nor a fence."""
    lines = results[0].lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return {"score": max(fuzz.ratio(line, reference) / 100 for reference in doc["answers"])}


def choice(doc: Document, results: list[str]) -> Scored:
    """1 where the letter is the right one."""
    return {"score": float(letter(results[0]) == doc["answer"])}


def letter(answer: str) -> str | None:
    """The letter that an answer chooses, in brackets first, then bare; asterisks (bold type) are left out."""
    plain = answer.replace("*", "")
    found = next((match for pattern in LETTERS if (match := pattern.search(plain))), None)
    return found.group(1) if found else None


def _of_first_line(
    score: Callable[[Document, list[str]], dict[str, float]], doc: Document, results: list[str]
) -> Scored:
    return {"score": float(max(score(doc, [first_line(results[0])]).values()))}
