"""`import elastic` stays light, and every module imports on its own."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for folder in ("elastic", "data_prep")
    for path in (ROOT / folder).rglob("*.py")
)
# What a module imports that the package itself does not need.
NEEDS = {f"elastic.engines.vllm.{name}": "vllm" for name in ("backend", "cpu", "engine", "gpu")}
NEEDS |= {name: "triton" for name in MODULES if name.endswith("_triton")}  # comes with torch's builds for GPUs
HEAVY = ("torch", "cupy", "lightning", "transformers", "datasets", "matplotlib")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_elastic_is_light():
    loaded = run("import sys, elastic; elastic.ElasticConfig(); print(' '.join(sys.modules))").split()
    assert not [name for name in HEAVY if name in loaded]


def test_modules_import_in_one_process_without_cuda():
    lines = "\n".join(f"import {name}" for name in MODULES if name not in NEEDS or find_spec(NEEDS[name]))
    checks = "import torch, sys\nassert not torch.cuda.is_initialized()\nassert 'cupy' not in sys.modules\nprint('ok')"
    assert run(f"{lines}\n{checks}").strip() == "ok"


def test_lazy_names_exist():
    import elastic

    for name in elastic.__all__:
        assert getattr(elastic, name) is not None
    with pytest.raises(AttributeError, match="module 'elastic' has no attribute 'atach'; it offers"):
        _ = elastic.atach
