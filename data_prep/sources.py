"""Text that every Python installation carries: the language reference and docstrings as prose, and the library's code.

Documents belong to a split by the hash of their name, and a paragraph of the reference that several documents repeat
stays in one split only, so train, validation and test never share text. Read when building, never vendored.
"""

import hashlib
import re
import sysconfig
from functools import lru_cache
from pathlib import Path

from elastic.shards import SPLITS

MIN_WORDS = 150


def split_of(name: str) -> str:
    """Split of a document: about 80 % train, 10 % validation, 10 % test, by the hash of its name."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


@lru_cache(maxsize=3)
def prose(split: str) -> tuple[str, ...]:
    """Passages of at least 150 words, in a fixed order: topics of the language reference, then docstrings by file.

    Raises:
        FileNotFoundError: a Python without its documentation or sources.
    """
    docstrings = ["\n\n".join(_docstrings(text)) for text in code(split)]
    passages = tuple(text for text in [*_topics()[split], *docstrings] if len(text.split()) >= MIN_WORDS)
    return _some(passages, f"prose for {split}")


@lru_cache(maxsize=3)
def code(split: str) -> tuple[str, ...]:
    """Source files of the standard library's top level, each between 100 and 3,000 lines, in a fixed order.

    Raises:
        FileNotFoundError: a Python without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.glob("*.py")):
        if split_of(path.name) == split:
            text = path.read_text(encoding="utf-8", errors="replace")
            if 100 <= text.count("\n") <= 3000:
                texts.append(text)
    return _some(tuple(texts), f"source code for {split} in {root}")


@lru_cache(maxsize=1)
def _topics() -> dict[str, list[str]]:
    """The language reference by split; topics quote each other, so a repeated paragraph stays where it is held out."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "this Python has no pydoc_data (the language reference); install the full standard library, "
            "for example apt's libpython3-stdlib or python.org's build"
        ) from error
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for split in reversed(SPLITS):
        found[split] = []
        fresh: set[str] = set()
        for _, text in sorted((name, text) for name, text in topics.items() if split_of(name) == split):
            text = re.sub(r"(?m)^ *[|+].*\n|[*=\-~^]{3,}\n?", "", text)
            paragraphs = [part for part in re.split(r"\n\s*\n", text.strip()) if " ".join(part.split()) not in seen]
            fresh |= {" ".join(part.split()) for part in paragraphs}
            found[split].append("\n\n".join(paragraphs))
        seen |= fresh
    return found


def _docstrings(source: str) -> list[str]:
    """Triple-quoted texts of at least 30 words."""
    texts = re.findall(r'(?ms)^[ \t]*[rR]?"""(.*?)"""', source)
    return [text.strip() for text in texts if len(text.split()) >= 30 and ">>>" not in text]


def _some(texts: tuple[str, ...], what: str) -> tuple[str, ...]:
    if not texts:
        raise FileNotFoundError(f"found no {what}; a Python with its sources and documentation is needed")
    return texts
