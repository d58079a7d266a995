"""Rules of the code base that a machine can check: layers, file and function sizes, imports of CuPy, settings that
nobody reads.
"""

import ast
import dataclasses
from pathlib import Path

import pytest

from elastic import config
from elastic.training import config as training_config

ROOT = Path(__file__).parent.parent
SOURCES = sorted((*ROOT.glob("elastic/**/*.py"), *ROOT.glob("data_prep/**/*.py")))
IDS = [str(path.relative_to(ROOT)) for path in SOURCES]
# Lower layers never import higher ones; modules of one layer may import each other where there is no cycle.
LAYERS = {
    0: (
        "_version",
        "prompts",
        "config",
        "training_config",
        "tasks",
        "visibility",
        "reference",
        "console",
        "cache",
        "kernels",
        "schedules",
    ),
    1: ("chunking", "families", "rows", "records", "router", "relaxation", "patterns"),
    2: ("packed", "shards", "head_plan", "sparsity", "kv_pool", "route_record"),
    3: (
        *("selection", "torch_attention", "attention", "cache_layer", "context", "deciding", "decoding"),
        "routing",
    ),
    4: ("elastic_cache", "interface", "backbone", "backbones", "plots"),
    5: ("decode_graph", "losses", "objective", "checkpoint", "report", "bench"),
    6: ("context_parallel", "distributed", "inference", "data", "methods", "metrics", "resumable"),
    7: ("routed_module", "lit_module", "callbacks", "results", "serving"),
    8: ("cli", "commands", "training_cli", "__main__", "evaluation"),
}
LEVEL = {name: level for level, names in LAYERS.items() for name in names}
MAX_LINES, MAX_FUNCTION = 300, 60


def unit(path: Path) -> str:
    return path.relative_to(ROOT / "elastic").parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    """Units of `elastic` that the file imports, inside functions too; imports for type checking do not count."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "elastic":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("elastic.")}
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if "elastic" in p.relative_to(ROOT).parts[:1]], ids=str)
def test_imports_go_downward(path):
    name = unit(path)
    if name == "__init__":
        return
    assert name in LEVEL, f"{name} has no layer yet; add it to LAYERS"
    for other in imported_units(path) - {name}:
        if other in LEVEL:
            assert LEVEL[other] <= LEVEL[name], f"{name} (layer {LEVEL[name]}) imports {other} (layer {LEVEL[other]})"


def test_no_import_cycles():
    graph = {}
    for path in ROOT.glob("elastic/**/*.py"):
        if unit(path) != "__init__":
            graph.setdefault(unit(path), set()).update(imported_units(path) - {unit(path)})
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_LINES
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
