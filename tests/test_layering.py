"""Rules of the code base that a machine can check: layers, file and function sizes, imports of CuPy, settings that
nobody reads.
"""

import ast
import dataclasses
import warnings
from pathlib import Path

import pytest

from elastic import config
from elastic.training import config as training_config

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "elastic"
SOURCES = sorted((*PACKAGE.rglob("*.py"), *ROOT.glob("data_prep/**/*.py")))
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]
# A room imports rooms of lower levels and itself, never upward or sideways.
ROOMS = {
    "files of the package": 0,
    "data": 1,
    "kernels": 1,
    "attention": 2,
    "routing": 3,
    "cache": 3,
    "model": 4,
    "training": 5,
    "inference": 5,
    "data_prep": 5,  # lies beside elastic/ in a clone and inside it once installed; not counted below
    "engines": 6,
    "evaluation": 6,
    "bench": 6,
    "commands": 7,
    "cli": 8,
}
WORKSHOPS = {"evaluation", "bench"}
DOORS = {"__init__", "__main__"}  # what users import and run; they lead to every room
MAX_PRODUCT_ROOMS, MAX_WORKSHOPS, MAX_FILES = 10, 2, 10
USUAL_LINES, MAX_FUNCTION = 300, 60


def module_of(path: Path) -> str:
    """Dotted name below `elastic`, such as `kernels.jit`; a package's own name for its `__init__`."""
    parts = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_of(path): path for path in SOURCES}


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return first if first in ROOMS or first in DOORS else "files of the package"


def imported_modules(path: Path) -> set[str]:
    """Modules of `elastic` that the file imports, inside functions, for type checking and by `importlib` too. An
    f-string counts as the package that it begins with.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            origin = f"{path.parent.name}.{node.module or ''}" if node.level else node.module or ""
            found |= {f"{origin}.{alias.name}".replace("..", ".") for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "import_module":
            found |= {leading_text(choice) for choice in choices(node.args[0])}
    own = {name for name in found if name.split(".")[0] in ("elastic", "data_prep") and "." in name}
    return {nearest(name.removeprefix("elastic.")) for name in own}


def choices(argument: ast.expr) -> list[ast.expr]:
    """Both arms of a conditional expression; anything else alone."""
    return [argument.body, argument.orelse] if isinstance(argument, ast.IfExp) else [argument]


def leading_text(argument: ast.expr) -> str:
    """The constant text that a string or f-string begins with; empty for anything else."""
    first = argument.values[0] if isinstance(argument, ast.JoinedStr) else argument
    return str(first.value) if isinstance(first, ast.Constant) else ""


def nearest(dotted: str) -> str:
    """The module that a dotted name lies in: itself, or the longest prefix that is one."""
    parts = dotted.strip(".").split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((name for name in names if name in MODULES), "__init__")


@pytest.mark.parametrize("module", [name for name in MODULES if name not in DOORS])
def test_imports_go_downward(module):
    room = room_of(module)
    for other in imported_modules(MODULES[module]):
        if other == "__init__" or room_of(other) == room:
            continue
        assert room_of(other) not in DOORS, f"{module} imports {other}"
        assert ROOMS[room_of(other)] < ROOMS[room], (
            f"{module} ({room}, level {ROOMS[room]}) imports {other} ({room_of(other)}, level {ROOMS[room_of(other)]})"
        )


def test_the_house_stays_small():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(ROOMS), "a new room needs a level in ROOMS"
    assert len(rooms - WORKSHOPS) <= MAX_PRODUCT_ROOMS
    assert len(rooms & WORKSHOPS) <= MAX_WORKSHOPS
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_FILES


def test_no_import_cycles():
    graph = {name: imported_modules(path) - {name} for name, path in MODULES.items() if name not in DOORS}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_importlib_is_seen(tmp_path):
    file = tmp_path / "hidden.py"
    file.write_text(
        'import importlib\nimportlib.import_module("elastic.cli")\nimport_module(f"elastic.bench.{name}")\n'
    )
    assert imported_modules(file) == {"cli", "bench"}


def test_relative_imports_and_both_places_of_data_prep_are_seen():
    assert {"data_prep.draw", "data_prep.sources", "data.records"} <= set().union(
        *(imported_modules(path) for name, path in MODULES.items() if name.startswith("data_prep."))
    )
    assert "data_prep" in imported_modules(MODULES["commands.data_prep"])
    relative = [
        path
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative, "only data_prep, which has two places, imports relatively"


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_files_and_functions_are_short(path):
    """A function has at most 60 lines. A file over 300 lines may hold two ideas, which only a reader can tell."""
    text = path.read_text()
    if len(text.splitlines()) > USUAL_LINES:
        warnings.warn(f"{path.relative_to(ROOT)} has over {USUAL_LINES} lines: two ideas?", stacklevel=1)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, (
                f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
            )


def test_cupy_is_imported_in_one_place():
    for path in SOURCES:
        if path.name != "jit.py" or path.parent.name != "kernels":
            roots = {
                name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
            }
            assert "cupy" not in roots, f"{path} imports CuPy; only elastic/kernels/jit.py may"


def test_every_setting_and_argument_is_read():
    """No dead flags: each config field is an attribute somewhere, each function argument is used in its body."""
    read = set()
    unused = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            if isinstance(node, ast.FunctionDef) and not node.name.endswith("_fake"):  # operator schemas
                unused += [f"{path.relative_to(ROOT)}: {node.name}({name})" for name in unread_arguments(node)]
    fields = {
        f.name
        for cls in (
            *(config.RouterConfig, config.SparseConfig, config.ElasticConfig),
            *(training_config.OptimiserConfig, training_config.TemperatureConfig, training_config.ObjectiveConfig),
        )
        for f in dataclasses.fields(cls)
    }
    assert fields <= read
    assert not unused


def unread_arguments(function: ast.FunctionDef) -> list[str]:
    """Arguments of a function that its body never names; an interface, whose body is `...`, has none to name."""
    if ast.unparse(function.body[-1]) == "...":
        return []
    names = {n.id for statement in function.body for n in ast.walk(statement) if isinstance(n, ast.Name)}
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [a.arg for a in arguments if a.arg not in names and a.arg not in PROTOCOL and not a.arg.startswith("_")]


# Argument names that a framework's signature dictates.
PROTOCOL = {
    "self",
    "cls",
    "trainer",
    "pl_module",
    "batch_idx",
    "dataloader_idx",
    "outputs",
    "stage",
    "attn",
    "decoder",
    "args",
    "module",
    "attention_mask",
    "dropout",
    "disable_tqdm",
    "checkpoint",
}
