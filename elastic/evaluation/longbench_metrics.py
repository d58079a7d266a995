"""LongBench's metrics with its official post-processing of answers; named by the task files in configs/eval, and put in
the place of the harness' own (`OF_HARNESS`). Each function takes a document and the harness' list of one answer and
returns {"score": 0 to 1}.

Written here because the harness' file imports fuzzywuzzy, which is GPL. Its ratio is that of Python's difflib in whole
percent, unless python-Levenshtein is installed, which the benchmark does not ask for; rapidfuzz has another ratio.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from difflib import SequenceMatcher
from functools import cache
from typing import Any

from rouge import Rouge

from elastic.evaluation.longbench_rows import PARAGRAPH

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
    answer = first_line(results[0]).strip()
    return {"score": max(class_share(answer, reference, doc["all_classes"]) for reference in doc["answers"])}


def qa_f1(doc: Document, results: list[str]) -> Scored:
    """Best F1 of the first line's words over the references."""
    return _best(word_f1, doc, first_line(results[0]))


def rouge(doc: Document, results: list[str]) -> Scored:
    """Best ROUGE-L of the first line over the references; an empty line has none."""
    return _best(rouge_l, doc, first_line(results[0]))


def code_similarity(doc: Document, results: list[str]) -> Scored:
    """Best edit similarity over the references of the first line that is neither a comment nor a fence."""
    lines = results[0].lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return {"score": max(ratio(line, reference) / 100 for reference in doc["answers"])}


def choice(doc: Document, results: list[str]) -> Scored:
    """1 where the letter is the right one."""
    return {"score": float(letter(results[0]) == doc["answer"])}


def letter(answer: str) -> str | None:
    """The letter that an answer chooses, in brackets first, then bare; asterisks (bold type) are left out."""
    plain = answer.replace("*", "")
    found = next((match for pattern in LETTERS if (match := pattern.search(plain))), None)
    return found.group(1) if found else None


def ratio(line: str, reference: str) -> int:
    """Twice the matching characters as a share of both lines' in percent; equal lines have 100, one empty line 0."""
    if line == reference:
        return 100
    return round(100 * SequenceMatcher(None, line, reference).ratio()) if line and reference else 0


def class_share(answer: str, reference: str, classes: list[str]) -> float:
    """One divided by the number of classes that an answer names, 0 where the right one is not among them."""
    named = [name for name in classes if name in answer]
    for name in named:  # the list shrinks under the loop in the official metric too, which passes over the next name
        if name in reference and name != reference:
            named.remove(name)
    return 1 / len(named) if reference in named else 0.0


def word_f1(answer: str, reference: str) -> float:
    """F1 of two texts' words: lower case, without punctuation and articles."""
    found, wanted = Counter(_words(answer)), Counter(_words(reference))
    common = (found & wanted).total()
    if not common:
        return 0.0
    precision, recall = common / found.total(), common / wanted.total()
    return 2 * precision * recall / (precision + recall)


def rouge_l(answer: str, reference: str) -> float:
    """F of ROUGE-L; 0 where a text is empty, or has a sentence too long for the package's recursion, as officially."""
    try:
        return float(_rouge().get_scores([answer], [reference], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):
        return 0.0


def number_share(answer: str, reference: str) -> float:
    """The share of an answer's numbers that are the reference."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def paragraph_share(answer: str, reference: str) -> float:
    """The share of an answer's numbers that are that of the reference, `Paragraph <number>`; 0 of one without."""
    found = PARAGRAPH.search(reference)
    return number_share(answer, found[1]) if found else 0.0


def _of_answer(score: Callable[[str, str], float]) -> Callable[[Document, list[str]], Scored]:
    return lambda doc, results: _best(score, doc, results[0])


# In place of the harness' functions, by their names; the whole answer is scored, and the best reference counts.
OF_HARNESS = {
    "get_qa_f1_with_score": _of_answer(word_f1),
    "get_rouge_with_score": _of_answer(rouge_l),
    "get_count_with_score": _of_answer(number_share),
    "get_retrieval_with_score": _of_answer(paragraph_share),
}


def _best(score: Callable[[str, str], float], doc: Document, answer: str) -> Scored:
    return {"score": max(score(answer.strip(), reference) for reference in doc["answers"])}


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


@cache
def _rouge() -> Any:
    return Rouge(metrics=["rouge-l"])
