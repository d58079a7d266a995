"""Plain English: four habits that read as translated stay out of code, messages, pages and training questions."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HABITS = {
    r"\bbehind\b": "after, past, following, or what it is part of",
    r"\b(?:goes|go|going|went) on\b": "continues, resumes",
    r"\bstands?\b(?!-in)(?! alone)(?! out)": "is, appears, lies, comes",
    r"\b(?<!there )(?:is|are) no (?!longer|more|less|fewer|better|worse|wider|larger)\w+": "is not a ..., has no ...",
}
FOLDERS = ("elastic", "cuda_src", "configs", "data_prep", "docs", "tests")
ENDINGS = {".py", ".yaml", ".md", ".cu", ".cuh", ".cpp"}
FILES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*")))
    if path.suffix in ENDINGS
    and "results" not in path.parts
    and path.name not in ("test_words.py", "RESULTS.md", "ABLATION.md")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_words(path):
    text = path.read_text(encoding="utf-8")
    for habit, better in HABITS.items():
        found = [text[max(0, m.start() - 40) : m.end() + 30].replace("\n", " ") for m in re.finditer(habit, text)]
        assert not found, f"{path.relative_to(ROOT)}: {found}; write {better}"
