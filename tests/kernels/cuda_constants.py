"""Constants of `cuda_src`, read out of the sources: those of namespaces and structs, and the asserted struct sizes."""

import ast
import operator
import re
from pathlib import Path
from typing import Any

from elastic.kernels.jit import CUDA_SRC

Number = int | float
INCLUDE = re.compile(r'^#include "(elastic/\w+\.cuh)"', re.MULTILINE)
SIZE = re.compile(r"static_assert\(sizeof\((\w+)\) == (\d+),")
STRUCT = re.compile(r"^struct (?:alignas\(\d+\) )?(\w+) \{.*?^\};", re.MULTILINE | re.DOTALL)
DECLARED = re.compile(r"^(?:template <[^>]*>\n)?constexpr \w+ ([^;]+);", re.MULTILINE)
MEMBER = re.compile(r"^  static constexpr \w+ ([^;]+);", re.MULTILINE)
OPERATORS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.LShift: operator.lshift,
    ast.BitOr: operator.or_,
}


def whole_text(file: str, seen: set[str] | None = None) -> str:
    """A file of `cuda_src` after every header that it reaches, each once, without comments."""
    seen = set() if seen is None else seen
    path: Path = CUDA_SRC / "include" / file if file.startswith("elastic/") else CUDA_SRC / file
    text, before = re.sub(r"//[^\n]*", "", path.read_text()), ""
    for header in INCLUDE.findall(text):
        if header not in seen:
            seen.add(header)
            before += whole_text(header, seen)
    return before + text


class Constants:
    """What one file and its headers declare, under the macros it is compiled with.

    Args:
        file: name below `cuda_src`, or `elastic/<header>`.
        macros: values of the ELASTIC_* macros, and of template parameters by name.
    """

    def __init__(self, file: str, **macros: Number) -> None:
        text = whole_text(file)
        self.file, self.macros = file, macros
        self.sizes = {name: int(size) for name, size in SIZE.findall(text)}
        self.namespace = declarations(DECLARED, text)
        self.structs = {match[1]: declarations(MEMBER, match[0]) for match in STRUCT.finditer(text)}

    def value(self, name: str, struct: str = "") -> Number:
        """The value of `name` or `Struct.name`.

        Raises:
            LookupError: it is declared nowhere, or several times.
        """
        if "." in name:
            struct, name = name.split(".")
        scope = self.structs.get(struct, {}).get(name) or self.namespace.get(name)
        if scope is None and name in self.macros:
            return self.macros[name]
        if scope is None or len(scope) > 1:
            found = "is not declared" if scope is None else f"is declared {len(scope)} times"
            raise LookupError(f"{name} {found} in {self.file} and its headers; expected one constexpr")
        return self._evaluate(as_python(scope[0]).body, struct)

    def _evaluate(self, node: ast.expr, struct: str) -> Number:
        if isinstance(node, ast.Constant):
            assert isinstance(node.value, int | float)
            return node.value
        if isinstance(node, ast.Name):
            return self.value(node.id, struct)
        if isinstance(node, ast.IfExp):
            return self._evaluate(node.body if self._evaluate(node.test, struct) else node.orelse, struct)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
            return self._evaluate(node.left, struct) == self._evaluate(node.comparators[0], struct)
        if isinstance(node, ast.BinOp):
            left, right = self._evaluate(node.left, struct), self._evaluate(node.right, struct)
            if isinstance(node.op, ast.Div):
                return left // right if isinstance(left, int) and isinstance(right, int) else left / right
            return OPERATORS[type(node.op)](left, right)
        raise LookupError(f"{self.file}: {ast.unparse(node)} is more than this parser reads")


def declarations(pattern: re.Pattern[str], text: str) -> dict[str, list[str]]:
    """Expressions by name; `constexpr int kA = 1, kB = 2;` declares two."""
    found: dict[str, list[str]] = {}
    for names in pattern.findall(text):
        for one in names.split(","):
            name, _, expression = one.partition("=")
            found.setdefault(name.strip(), []).append(expression.strip())
    return found


def as_python(expression: str) -> ast.Expression:
    """A C++ expression of numbers, names, arithmetic and one condition, as Python's syntax tree."""
    plain = re.sub(r"\b(0x[0-9a-fA-F]+)ull\b|\b([\d.]+(?:e[-+]?\d+)?)(?:f|u)\b", r"\1\2", expression)  # 1e-5f, 1u
    plain = re.sub(r"\b(k\w+)<\w+>", r"\1", plain)  # a template's arguments are among the macros
    condition = re.fullmatch(r"(.+)\?(.+):(.+)", plain)
    if condition:
        plain = f"({condition[2]}) if ({condition[1]}) else ({condition[3]})"
    return ast.parse(plain.strip(), mode="eval")
