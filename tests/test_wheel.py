"""What users install: one top-level package, complete, that works from an empty folder and needs no clone.

Three environments that borrow the dependencies of this one: a wheel (built from an sdist, so that is whole too), an
editable installation, and a clone that is not installed but on the path.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

pytest.importorskip("setuptools", minversion="77", reason="needs the extra dev")
pytest.importorskip("pip", reason="the installations are pip's")

ROOT = Path(__file__).parent.parent
CODE = ("elastic", "data_prep", "configs", "cuda_src")
SHIPPED = {"data_prep": "elastic/data_prep", "configs": "elastic/_configs", "cuda_src": "elastic/_cuda_src"}
# In every process of the wheel's environment: reading a file of the clone's code is an error.
GUARD = """import sys
def refuse(event, arguments, folders={folders!r}):
    if event == "open" and str(arguments[0]).startswith(folders):
        raise RuntimeError(f"a file of the clone was opened: {{arguments[0]}}")
sys.addaudithook(refuse)
"""
RESOURCES = """
from elastic.commands.data_prep import part
from elastic.evaluation.longbench import CONFIGS
from elastic.files import config_names, find_config
from elastic.kernels.jit import CUDA_SRC
from elastic.model.loading import ASSETS
import elastic

print(elastic.__file__)
print(part("pack_mixture").__name__)
print(find_config("model/smollm2-135m"), find_config("mixture/offline", "mixture"))
print(len([*CUDA_SRC.rglob("*.cu*")]), len([*CONFIGS.glob("*.yaml")]))
print(len(config_names()), len([*ASSETS.glob("tiny/*")]))
"""

# Commands one after the other in one process: importing takes longer than most of them. NEXT is the one that the
# command before has named as the next.
COMMANDS = """
import contextlib, io, json, re, shlex, sys
from elastic import cli

said = []
for words in json.loads(sys.argv[1]):
    if words == ["NEXT"]:
        words = shlex.split(re.findall("Next: (.*)", said[-1])[0])
        words = words[words.index("generate"):]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(words)
    assert code == 0, (words, out.getvalue())
    said.append(out.getvalue())
print(json.dumps(said))
"""


class Place(NamedTuple):
    """A virtual environment, and an empty folder to work in."""

    folder: Path
    work: Path

    @property
    def site_packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def run(self, program: str, *arguments: str, **environment: str) -> str:
        """Standard output of `bin/<program>`; what the caller's environment says about Python's path is left out."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=self.work,
            env={**kept, "PYTHONNOUSERSITE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def elastic(self, *lines: str) -> list[str]:
        """What `elastic <line>` says on standard output, for each line."""
        words = json.dumps([shlex.split(line) for line in lines])
        said: list[str] = json.loads(self.run("python", "-c", COMMANDS, words).splitlines()[-1])
        return said


def new_place(folder: Path) -> Place:
    """An environment that sees this one's dependencies, but not through their .pth files: no editable installation."""
    venv.create(folder / "venv", symlinks=True)
    (folder / "work").mkdir()
    place = Place(folder / "venv", folder / "work")
    borrowed = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (place.site_packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return place


def pip(*arguments: str | Path, python: Path | None = None) -> None:
    chosen = [] if python is None else ["--python", python]
    command = [sys.executable, "-m", "pip", *chosen, *arguments, "--no-deps", "--no-index", "-q"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def install(place: Place, *what: str | Path) -> set[str]:
    """Install; returns what is new at the top of site-packages."""
    before = set(os.listdir(place.site_packages))
    pip("install", "--ignore-installed", "--no-build-isolation", *what, python=place.folder / "bin" / "python")
    return set(os.listdir(place.site_packages)) - before


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the repository, so that building leaves nothing in it."""
    copy = tmp_path_factory.mktemp("source")
    for name in CODE:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CITATION.cff"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    (sdist,) = out.glob("*.tar.gz")
    pip("wheel", "--no-build-isolation", "-w", out, sdist)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Place:
    """The wheel, in an environment that may not read the clone."""
    place = new_place(tmp_path_factory.mktemp("installed"))
    added = install(place, wheel)
    assert {name.split("-")[0] for name in added} == {"elastic", "elastic_attention"} and len(added) == 2
    assert any(name.endswith(".dist-info") for name in added)
    guarded = tuple(f"{ROOT / name}{os.sep}" for name in CODE)
    (place.site_packages / "clone_guard.py").write_text(GUARD.format(folders=guarded))
    (place.site_packages / "clone_guard.pth").write_text("import clone_guard\n")
    return place


def test_the_wheel_holds_every_file_and_nothing_else(wheel):
    expected = set()
    for name in CODE:
        files = [path for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix != ".pyc"]
        expected |= {f"{SHIPPED.get(name, name)}/{path.relative_to(ROOT / name).as_posix()}" for path in files}
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


def test_an_installed_wheel_finds_its_files(installed):
    file, module, configs, *counts = installed.run("python", "-c", RESOURCES).splitlines()
    package = installed.site_packages / "elastic"
    assert file == str(package / "__init__.py") and module == "elastic.data_prep.pack_mixture"
    assert configs == f"{package}/_configs/model/smollm2-135m.yaml {package}/_configs/mixture/offline.yaml"
    assert counts == expected_counts()


def test_an_editable_installation_finds_its_files(source, tmp_path):
    place = new_place(tmp_path)
    install(place, "-e", source)
    file, module, configs, *counts = place.run("python", "-c", RESOURCES).splitlines()
    assert file == str(source / "elastic" / "__init__.py") and module == "elastic.data_prep.pack_mixture"
    assert configs == f"{source}/configs/model/smollm2-135m.yaml {source}/configs/mixture/offline.yaml"
    assert counts == expected_counts()


def test_a_clone_on_the_path_finds_its_files(tmp_path):
    place = new_place(tmp_path)
    file, module, configs, *counts = place.run("python", "-c", RESOURCES, PYTHONPATH=str(ROOT)).splitlines()
    assert file == str(ROOT / "elastic" / "__init__.py") and module == "data_prep.pack_mixture"
    assert configs == f"{ROOT}/configs/model/smollm2-135m.yaml {ROOT}/configs/mixture/offline.yaml"
    assert counts == expected_counts()
    shown = place.run("python", "-m", "data_prep.inspect_shards", "--help", PYTHONPATH=str(ROOT))
    assert shown.startswith("usage: python -m data_prep.inspect_shards ")


def expected_counts() -> list[str]:
    """Of CUDA files, corrections of benchmarks, configurations of training, files of the tiny backbone."""
    configs = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.yaml")}
    corrections = {path for path in configs if path.parts[0] == "eval"}
    mixtures = {path for path in configs if path.parts[0] == "mixture"}
    sources, backbone = [*(ROOT / "cuda_src").rglob("*.cu*")], [*(ROOT / "elastic" / "assets").glob("tiny/*")]
    return [f"{len(sources)} {len(corrections)}", f"{len(configs - corrections - mixtures)} {len(backbone)}"]


def test_every_module_of_data_prep_imports_from_its_second_place(installed):
    code = (
        "import importlib, pkgutil, elastic.data_prep as home\n"
        "names = [info.name for info in pkgutil.iter_modules(home.__path__, 'elastic.data_prep.')]\n"
        "print(*(importlib.import_module(name).__file__ for name in names), sep='\\n')\n"
        "import sys; print('data_prep' in sys.modules)\n"
    )
    *files, outside = installed.run("python", "-c", code).splitlines()
    assert outside == "False" and len(files) == len([*(ROOT / "data_prep").glob("*.py")]) - 1  # __init__
    assert all(file.startswith(str(installed.site_packages)) for file in files)


def test_a_clone_may_not_be_read_in_the_wheels_environment(installed):
    """The guard that the other tests rely on does refuse."""
    with pytest.raises(AssertionError, match="a file of the clone was opened"):
        installed.run("python", "-c", f"open({str(ROOT / 'configs' / 'tiny.yaml')!r})")


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_folder(installed):
    from elastic import __version__

    assert installed.run("elastic", "--version") == f"elastic {__version__}\n"
    doctor, demo, *_, packed, _ = installed.elastic(
        "doctor",
        "demo --tiny --samples 2",
        "NEXT",
        "data_prep build_mixture --language tiny --tasks single_qa in_context --per-task 16 --words 160 --out records",
        "data_prep tokenize_and_pack --records records --backbone tiny --seq-length 256 --out data/pair",
        "fit -c tiny --trainer.max_steps 2 --trainer.val_check_interval 2 --trainer.limit_val_batches 2",
    )
    assert "self-check" in doctor
    (after,) = re.findall("Next: (.*)", demo)
    assert " generate --checkpoint runs/demo-tiny/checkpoint --prompt " in after
    assert "train/single_qa: " in packed
    run = installed.work / "runs" / "tiny"
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["backbone"] == "tiny"
    assert (run / "checkpoint" / "router.safetensors").is_file()
