"""The API reference: pdoc builds it from the docstrings without a warning, every public name has its entry, and the
names that docstrings and messages mention exist.
"""

import ast
import inspect
import re
import shlex
import subprocess
import sys
from functools import cache, reduce
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import elastic
import elastic.protocols

pytest.importorskip("pdoc", reason="needs the extra docs")

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "CONTRIBUTING.md"
SOURCES = sorted(ROOT.glob("elastic/**/*.py"))
PUBLIC = [name for name in elastic.__all__ if not name.startswith("_")]  # `__version__` has no docstring


class Entries(HTMLParser):
    """Of a page of pdoc: the text of every entry's docstring by its name."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self._name, self._depth = "", 0  # the entry we are in, at first the module; <div>s since its docstring began
        self.texts = {self._name: ""}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        identifier = found.get("id") or ""
        if tag in ("section", "div") and re.fullmatch(r"[A-Za-z_][\w.]*", identifier):
            self._name = identifier
            self.texts.setdefault(identifier, "")
        if tag == "div" and (self._depth or found.get("class") == "docstring"):
            self._depth += 1

    def handle_endtag(self, tag: str) -> None:
        self._depth -= tag == "div" and self._depth > 0

    def handle_data(self, data: str) -> None:
        if self._depth:
            self.texts[self._name] += data.strip()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """`elastic.html`, built by the command of the guide into another folder."""
    (command,) = re.findall(r"^python (-m pdoc .*) -o build/api$", GUIDE.read_text(encoding="utf-8"), re.M)
    out = tmp_path_factory.mktemp("api")
    done = subprocess.run(
        [sys.executable, *shlex.split(command), "-o", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not re.search(r"pdoc/\w+\.py:\d+: \w*Warning", done.stderr), done.stderr
    return (out / "elastic.html").read_text(encoding="utf-8")


def test_every_public_name_is_explained(page):
    texts = Entries(page).texts
    assert not [name for name in PUBLIC if not texts.get(name)]
    methods = [
        f"{name}.{method}"
        for name in PUBLIC
        for method, value in vars(getattr(elastic, name)).items()
        if isinstance(getattr(elastic, name), type) and not method.startswith("_") and callable(value)
    ]
    assert "SparseConfig.has" in methods and not [name for name in methods if not texts.get(name)]


def classes_in(hint: Any) -> set[type]:
    """Classes of this package in a type hint."""
    inner = set().union(*(classes_in(part) for part in get_args(hint)))
    own = inspect.isclass(hint) and hint.__module__.split(".")[0] == "elastic"
    return inner | {hint} if own else inner


def test_types_in_public_signatures_have_an_entry():
    """They are public, or protocols of transformers' objects, which have a page of their own."""
    values = {name: getattr(elastic, name) for name in PUBLIC}
    hints = {name: get_type_hints(value) for name, value in values.items() if inspect.isfunction(value)}
    found = {(name, cls) for name, of in hints.items() for hint in of.values() for cls in classes_in(hint)}
    assert ("attach", elastic.ElasticConfig) in found
    public = (cls for _, cls in found if cls.__module__ != elastic.protocols.__name__)
    assert not [cls.__qualname__ for cls in public if cls not in values.values()]


@cache
def exists(name: str) -> bool:
    """Whether a dotted name is a module, something in one, or a setting of `ElasticConfig`."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for start, rest in ((found, parts[cut:]), (elastic.ElasticConfig(), parts[1:])):
            try:
                reduce(getattr, rest, start)
            except AttributeError:
                continue
            return True
    return False


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_names_in_docstrings_and_messages_exist(path):
    texts = [
        node.value
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    names = {name for text in texts for name in re.findall(r"(?<![\w./-])elastic(?:\.[A-Za-z_]\w*)+", text)}
    assert not [name for name in names - {"elastic.json"} if not exists(name)]  # the one file of such a name
