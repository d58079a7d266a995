"""Text that every Python installation carries: the language reference as prose, and the library's own source code.

Documents are assigned to splits by name, so train, validation and test never share text. Read when building, never
vendored.
"""

import hashlib
import re
import sysconfig
from functools import lru_cache
from pathlib import Path


def split_of(name: str) -> str:
    """Split of a document: about 80 % train, 10 % validation, 10 % test, by the hash of its name."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


@lru_cache(maxsize=3)
def prose(split: str) -> tuple[str, ...]:
    """Passages of the language reference, each at least 200 words, in a fixed order."""
    from pydoc_data.topics import topics

    texts = [
        re.sub(r"(?m)^ *[|+].*\n|[*=\-~^]{3,}\n?", "", text)
        for name, text in sorted(topics.items())
        if split_of(name) == split
    ]
    return tuple(text.strip() for text in texts if len(text.split()) >= 200)


@lru_cache(maxsize=3)
def code(split: str) -> tuple[str, ...]:
    """Source files of the standard library's top level, each between 100 and 3,000 lines."""
    root = Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(root.glob("*.py")):
        if split_of(path.name) == split:
            text = path.read_text(encoding="utf-8", errors="replace")
            if 100 <= text.count("\n") <= 3000:
                texts.append(text)
    return tuple(texts)
