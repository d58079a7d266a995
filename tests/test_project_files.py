"""Files that say how the project is cited, reported on and contributed to: they parse, and what they name exists."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import elastic
from elastic._version import __version__
from elastic.cli import main
from tests.helpers.pages import PAGES, blocks

ROOT = Path(__file__).parent.parent
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def paths_in(text: str) -> set[str]:
    """Files and folders of the repository that a text names."""
    return set(re.findall(r"(?<![\w./-])(?:docs|tests|elastic|configs|cuda_src)/[\w./-]*\w", text))


def test_the_version_is_written_once():
    project = tomllib.loads(read("pyproject.toml"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "elastic._version.__version__"}
    assert elastic.__version__ == __version__


def test_citation():
    citation, project = yaml.safe_load(read("CITATION.cff")), tomllib.loads(read("pyproject.toml"))["project"]
    assert citation["version"] == __version__ and citation["license"] == project["license"]
    paper = citation["preferred-citation"]
    assert paper["url"] == project["urls"]["Paper"] and paper["url"] in read("README.md")
    assert all({"family-names", "given-names"} == set(author) for author in paper["authors"])


def test_hooks_run_tools_of_the_extra_dev():
    hooks = [hook for repo in yaml.safe_load(read(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    wanted = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]["dev"]
    packages = {re.split(r"[\[>=]", requirement)[0] for requirement in wanted}
    assert {hook["id"] for hook in hooks} == {"ruff-check", "ruff-format", "mypy"}
    for hook in hooks:
        assert hook["language"] == "system" and hook["entry"].split()[0] in packages & {"ruff", "mypy"}
    assert "pre-commit" in packages


@pytest.mark.parametrize("path", FORMS, ids=[path.stem for path in FORMS])
def test_issue_form(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form["name"] and form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(set(ids)) == len(ids) and any(part.get("validations", {}).get("required") for part in form["body"])
    for part in form["body"]:
        assert part["type"] in ("textarea", "dropdown", "input", "markdown") and part["attributes"]["label"]
    text = path.read_text(encoding="utf-8")
    assert not [name for name in paths_in(text) if not (ROOT / name).exists()]
    assert not [name for name in re.findall(r"elastic\.(\w+)", text) if not hasattr(elastic, name)]


def test_issue_forms_and_the_pull_request_template_name_what_exists(capsys):
    assert [path.stem for path in FORMS] == ["bug", "feature"]
    assert isinstance(yaml.safe_load(read(".github/ISSUE_TEMPLATE/config.yml"))["blank_issues_enabled"], bool)
    template = read(".github/PULL_REQUEST_TEMPLATE.md")
    named = paths_in(template)
    assert named and not [name for name in named if not (ROOT / name).exists()]
    assert main(["--help"]) == 0
    commands = capsys.readouterr().out
    texts = [template, *(path.read_text(encoding="utf-8") for path in FORMS)]
    for command in {name for text in texts for name in re.findall(r"`elastic (\w+)", text)}:
        assert re.search(rf"^\s+{command}\b", commands, re.M), command


def test_kinds_of_a_feature_request_have_their_recipes():
    form = yaml.safe_load(read(".github/ISSUE_TEMPLATE/feature.yml"))
    (kinds,) = [part["attributes"]["options"] for part in form["body"] if part["type"] == "dropdown"]
    recipes = re.findall(r"^### A (.+)$", read("docs/CONTRIBUTING.md"), re.M)
    assert [kind.lower() for kind in kinds[: len(recipes)]] == recipes and len(recipes) == 5


def test_guide_names_what_exists():
    guide = re.sub(r"`[^`]*<name>[^`]*`", "", read("docs/CONTRIBUTING.md"))  # files that a recipe is to create
    assert not [name for name in paths_in(guide) if not (ROOT / name).exists()]
    assert not [link for link in re.findall(r"\]\(([\w./-]+)\)", guide) if not (ROOT / "docs" / link).exists()]
    tests = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    assert not [name for name in re.findall(r"\btest_\w+\.py", guide) if name not in tests]
    functions = re.findall(r"`(test_\w+)`", guide)
    assert functions and all(any(f"def {name}(" in text for text in tests.values()) for name in functions)


def test_wheels_hold_the_version(tmp_path):
    """setuptools reads it from the file, without importing the package."""
    config = pytest.importorskip("setuptools.config.pyprojecttoml")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "elastic", tmp_path / "elastic", ignore=lambda *_: ["assets"])
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    found = config.read_configuration(tmp_path / "pyproject.toml", expand=True)
    assert found["project"]["version"] == __version__


def test_git_ignores_what_the_pages_write():
    """Files and folders that users make by copying commands and snippets into a clone."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    written = r'(?:--(?:out|picture|heatmap|report-json|sweep|trainer.default_root_dir)|save_elastic\()[ "]*([\w./-]+)'
    made = {path for page in PAGES for block in blocks(page) for path in re.findall(written, block.text)}
    made |= {block.file for page in PAGES for block in blocks(page) if block.file}
    assert {"data/small", "routes.json", "routes.png", "shares.png", "heads.tsv", "my-routers", "runs/smollm2"} <= made
    paths = [f"{path}{'' if Path(path).suffix else '/'}" for path in sorted(made)]
    done = subprocess.run(["git", "check-ignore", "--no-index", *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == paths, done.stderr
