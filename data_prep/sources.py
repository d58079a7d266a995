"""Text for the generators: a user's folders, or what every Python installation carries, the language reference and
docstrings as prose and the library's code.

A document belongs to a split by the hash of its name, and a paragraph that several documents repeat stays in one split
only, so train, validation and test never share text. Read when building, never vendored.
"""

import ast
import os
import re
import sysconfig
import warnings
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from elastic.data.shards import SPLITS
from elastic.files import text_sha256

T = TypeVar("T")
MIN_WORDS = 150
PIECE = 20_000  # words; a longer document of the user is cut, so that one book fills all splits
TEXT_ENDINGS = (".txt", ".md", ".rst")
CODE_ENDINGS = (
    ".py",
    ".js",
    ".ts",
    ".java",
    ".c",
    ".h",
    ".cc",
    ".cpp",
    ".hpp",
    ".cu",
    ".cuh",
    ".go",
    ".rs",
    ".rb",
    ".kt",
    ".swift",
    ".scala",
    ".cs",
    ".php",
    ".sh",
)
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
_SKIPPED = ("test", "tests", "site-packages", "dist-packages", "idlelib", "idle_test", "lib2to3", "__pycache__")


def split_of(name: str) -> str:
    """Split of a document: about 80 % train, 10 % validation, 10 % test, by the hash of its name."""
    bucket = int(text_sha256(name)[:2], 16) % 10
    return {0: "validation", 1: "test"}.get(bucket, "train")


@lru_cache(maxsize=6)
def prose(split: str, folder: Path | None = None) -> tuple[str, ...]:
    """Passages of at least 150 words, in a fixed order: of the user's folder, or of the language reference and, by
    module, of docstrings.

    Raises:
        FileNotFoundError: a folder, or a Python, without such text for this split.
        ValueError: a file that is not UTF-8.
    """
    passages = [text for text in _prose(folder)[split] if len(text.split()) >= MIN_WORDS]
    return _some(passages, f"prose for the {split} split in {folder or 'the Python library'}")


@lru_cache(maxsize=6)
def code(split: str, folder: Path | None = None) -> tuple[tuple[str, str], ...]:
    """(name, text) of source files of 60 to 3,000 lines, in a fixed order: of the user's tree or the Python library.
    Files of one top-level package are of one split.

    Raises:
        FileNotFoundError: a tree without source files for this split.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    files = []
    for path in _files(root, (".py",) if folder is None else CODE_ENDINGS):
        name = path.relative_to(root)
        package = name.parts[0] if folder is None else str(name.parent)
        if split_of(package if len(name.parts) > 1 else name.name) == split:
            text = path.read_text(encoding="utf-8", errors="replace")
            if 60 <= text.count("\n") <= 3000:
                files.append((name.as_posix(), text.rstrip()))
    return _some(files, f"source code for the {split} split in {root}")


@lru_cache(maxsize=6)
def summaries(split: str, folder: Path | None = None) -> tuple[tuple[str, str], ...]:
    """(summary, document) pairs: the first paragraph of a docstring with the rest and the docstrings of its members, or
    the first paragraph of a user's document and the rest, which does not hold that paragraph again.

    Raises:
        FileNotFoundError: no document with an opening paragraph of 6 to 150 words and at least 40 words below it.
    """
    pairs = _documented(split) if folder is None else [_opening(text) for text in prose(split, folder)]
    fitting = [(s, d) for s, d in pairs if 6 <= len(s.split()) <= 150 and len(d.split()) >= 40]
    fitting = [(s, d) for s, d in fitting if s not in " ".join(d.split())]
    return _some(fitting, f"documents with an opening paragraph for the {split} split in {folder or 'Python'}")


@lru_cache(maxsize=4096)
def sentences(passage: str) -> tuple[str, ...]:
    """The sentences of a passage, each on one line."""
    return tuple(" ".join(part.split()) for part in re.split(r"(?<=[.:!?])\s+", passage) if part.split())


@lru_cache(maxsize=2)
def _prose(folder: Path | None) -> dict[str, list[str]]:
    documents = _library() if folder is None else _user_documents(folder)
    return _without_repeats({s: [text for name, text in documents if split_of(name) == s] for s in SPLITS})


def _library() -> list[tuple[str, str]]:
    """Topics of the language reference and the docstrings of each module; the code's name decides their split."""
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise FileNotFoundError(
            "this Python has no pydoc_data (the language reference); install the full standard library, "
            "for example apt's libpython3-stdlib or python.org's build, or name a folder of your own text"
        ) from error
    found = [(name, re.sub(r"(?m)^ *[|+].*\n|[*=\-~^]{3,}\n?", "", text)) for name, text in sorted(topics.items())]
    for split in SPLITS:
        for name, text in code(split):
            texts = [own for own, _ in _docstrings(text) if len(own.split()) >= 30]
            found.append((name.split("/")[0], "\n\n".join(texts)))
    return found


def _user_documents(folder: Path) -> list[tuple[str, str]]:
    found = []
    for path in _files(folder, TEXT_ENDINGS):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 (byte {error.start}); convert it or take it out") from error
        words = [match.start() for match in re.finditer(r"\S+", text)]
        starts = [0, *words[PIECE::PIECE], len(text)]
        name = path.relative_to(folder).as_posix()
        found += [(f"{name}#{i}", text[a:b]) for i, (a, b) in enumerate(pairwise(starts))]
    return found


def _without_repeats(documents: dict[str, list[str]]) -> dict[str, list[str]]:
    """A paragraph that was seen in a held-out split, or earlier in the same one, is dropped."""
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for split in reversed(SPLITS):
        found[split] = []
        for text in documents[split]:
            kept = []
            for part in re.split(r"\n\s*\n", text.strip()):
                key = " ".join(part.split())
                if key and key not in seen:
                    kept.append(part)
                    seen.add(key)
            found[split].append("\n\n".join(kept))
    return found


def _documented(split: str) -> list[tuple[str, str]]:
    """First paragraphs of docstrings, each with the rest and, for modules and classes, the docstrings of members."""
    pairs = []
    for _, text in code(split):
        for own, members in _docstrings(text):
            first, rest = _opening(own)
            pairs.append((first, "\n\n".join(part for part in (rest, *members) if part)))
    return pairs


def _opening(text: str) -> tuple[str, str]:
    first, _, rest = text.strip().partition("\n\n")
    return " ".join(first.split()), rest.strip()


@lru_cache(maxsize=2048)
def _docstrings(source: str) -> list[tuple[str, list[str]]]:
    """Docstrings of a module, its classes and functions, each with those of its members; without doctests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes of old sources
        try:
            nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, _DOCUMENTED)]
        except SyntaxError:
            return []
    texts = {node: ast.get_docstring(node) or "" for node in nodes}
    return [
        (text, [texts[member] for member in node.body if isinstance(member, _DOCUMENTED) and texts[member]])
        for node, text in texts.items()
        if text and ">>>" not in text
    ]


def _files(root: Path, endings: tuple[str, ...]) -> list[Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder; name one with files ending in {', '.join(endings[:4])} …")
    found: list[Path] = []
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in _SKIPPED]  # a library has far more below site-packages
        found += [path for name in names if (path := Path(folder, name)).suffix.lower() in endings and path.is_file()]
    return sorted(found)


def _some(items: list[T], what: str) -> tuple[T, ...]:
    if not items:
        raise FileNotFoundError(
            f"found no {what}; a Python with its sources and documentation is needed, or a folder with more documents "
            "(every tenth goes to validation and to test)"
        )
    return tuple(items)
