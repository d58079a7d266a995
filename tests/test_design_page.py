"""docs/design.md against the code: every default, every field of a file format, every command that it names."""

import dataclasses
import importlib
import inspect
import json
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

import elastic
from elastic import cli
from elastic.files import SEAL, unsealed

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
SHIPPED = ROOT / "checkpoints" / "smollm2-135m-fa-ssa"
REQUIRED = "required"


def tables(header: str) -> list[tuple[str, dict[str, list[str]]]]:
    """(header's first cell, {first cell without ticks: other cells}) of the tables whose header begins so."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGE, flags=re.MULTILINE):
        first, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        if first[0].startswith(header):
            found.append((first[0], {row[0].strip("`"): row[1:] for row in rows}))
    return found


def fields_of(name: str) -> dict[str, list[str]]:
    """The one table of the fields of `name`."""
    (found,) = [rows for header, rows in tables("field of ") if header.removeprefix("field of ").strip("`") == name]
    return found


@lru_cache
def public(name: str):
    """A class, function or constant of the package by its name alone: modules may move."""
    place = re.compile(rf"^(?:(?:class|def) {name}\b|{name}(?::[^=]+)? = )", flags=re.MULTILINE)
    files = [file for file in (ROOT / "elastic").rglob("*.py") if place.search(file.read_text(encoding="utf-8"))]
    assert len(files) == 1, f"{name} is defined in {files}"
    return getattr(importlib.import_module(".".join(files[0].relative_to(ROOT).with_suffix("").parts)), name)


def beside(function: str, name: str):
    """What a function calls `name`, where several modules have such a name."""
    return public(function).__globals__[name]


def plain(value):
    """As YAML would give it."""
    return list(value) if isinstance(value, tuple) else value


def of_dataclass(cls) -> dict:
    """Defaults by field; nested settings have tables of their own."""
    found = {}
    for f in dataclasses.fields(cls):
        factory = f.default_factory
        value = factory() if factory is not dataclasses.MISSING else f.default
        if not dataclasses.is_dataclass(value):
            found[f.name] = REQUIRED if value is dataclasses.MISSING else plain(value)
    return found


def of_signature(function, *, required: bool = True) -> dict:
    """Defaults by parameter, in the same form."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
    return {
        p.name: REQUIRED if p.default is p.empty else plain(p.default)
        for p in parameters
        if not dataclasses.is_dataclass(p.default) and (required or p.default is not p.empty)
    }


def coded_defaults() -> dict[str, dict]:
    """{group: {setting: default}} as the code has them."""
    intervals = zip(beside("task_index", "TASKS"), public("target_intervals")({}), strict=True)
    return {
        "router": of_dataclass(elastic.RouterConfig),
        "sparse": of_dataclass(elastic.SparseConfig),
        "elastic": of_dataclass(elastic.ElasticConfig),
        "optimiser": of_dataclass(public("OptimiserConfig")),
        "temperature": of_dataclass(public("TemperatureConfig")),
        "objective": of_dataclass(public("ObjectiveConfig")),
        "targets": {task: low for task, (low, high) in intervals if low == high},
        "model": of_signature(public("ElasticModule")),
        "data": of_signature(public("MixtureDataModule")),
        "resume_checkpoint": of_signature(public("ResumeCheckpoint")),
        "elastic_checkpoint": of_signature(public("ElasticCheckpoint")),
        "generate": of_signature(elastic.generate, required=False),
    }


def test_sections_are_those_that_docstrings_cite():
    titles = re.findall(r"^## (\d+)\. \S", PAGE, flags=re.MULTILINE)
    assert titles == [str(number) for number in range(1, 13)]


def test_inline_formulas_end_on_their_line():
    assert [line for line in PAGE.splitlines() if line.count("$") % 2] == []


def test_defaults():
    written: dict[str, dict] = {}
    for _, rows in tables("setting"):
        for name, (value, *_) in rows.items():
            group, _, setting = name.rpartition(".")
            assert setting not in written.get(group, {}), f"{name} has two rows"
            written.setdefault(group, {})[setting] = yaml.safe_load(value.strip("`"))
    constants = written.pop("")
    assert constants == {name: public(name) for name in constants} and constants
    assert written == coded_defaults()


def test_routers_in_a_checkpoint():
    rows = fields_of("router.safetensors")
    sizes = {"D": 8, "K": 3, "T": len(beside("task_index", "TASKS")), "C": len(public("CLASSES")), "F": 2 * 3 + 1}

    def documented(*kinds: str) -> dict[str, tuple[list[int], str]]:
        return {
            name.removeprefix("layers.<l>."): (json.loads(_numbers(shape, sizes)), dtype)
            for name, (shape, dtype, kind) in rows.items()
            if kind.strip("`") in kinds
        }

    def coded(module: torch.nn.Module, prefix: str = "") -> dict[str, tuple[list[int], str]]:
        state = module.state_dict().items()
        return {prefix + name: (list(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in state}

    def router(**settings) -> torch.nn.Module:
        return public("build_router")(sizes["K"], sizes["D"], elastic.RouterConfig(**settings))

    assert coded(router()) == documented("paper")
    assert coded(router(head_offset=True)) == documented("paper", "head_offset")
    level = {
        name: (json.loads(_numbers(*of, sizes)), dtype) for name, (*of, dtype) in fields_of("a level router").items()
    }
    assert coded(router(kind="level")) == level
    assert coded(router(kind="static")) == documented("static")
    assert coded(public("LagrangeMultipliers")(), "multipliers.") == documented("target")
    assert coded(public("BudgetMultipliers")(), "multipliers.") == documented("quality")
    with safe_open(SHIPPED / "router.safetensors", "pt") as file:
        names = {re.sub(r"^layers\.\d+\.", "", name) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert names == level.keys()


def _numbers(shape: str, sizes: dict[str, int]) -> str:
    """`[4D, 2]` with numbers for letters."""
    return re.sub(r"(\d*)([CDFKT])", lambda found: str(int(found[1] or 1) * sizes[found[2]]), shape)


OF_HYBRIDS = {"routed_layers", "decoder_layers"}  # of the architecture, where some layers slide


def test_description_of_a_checkpoint(tmp_path):
    model, _ = public("load_backbone")("tiny")
    saved = public("read_elastic")(elastic.save_elastic(tmp_path / "made", elastic.attach(model), "tiny"))
    shipped = json.loads((SHIPPED / "elastic.json").read_text(encoding="utf-8"))
    rows = fields_of("elastic.json")
    for found in ({**saved, SEAL: ""}, shipped):
        assert set(found) == set(rows)
        assert set(found["architecture"]) == set(fields_of("architecture")) - OF_HYBRIDS
        assert found["config"].keys() == elastic.ElasticConfig().to_dict().keys()
        assert list(found["versions"]) == re.findall("`(.+?)`", rows["versions"][1])
    assert rows["format"][1] == str(saved["format"]) == str(shipped["format"])
    assert set(fields_of("recipe")) == {*public("ElasticModule")().recipe(), "data"}
    assert "data" in shipped["recipe"]


def test_which_differences_a_checkpoint_refuses(tmp_path):
    model, _ = public("load_backbone")("tiny")
    path = elastic.save_elastic(tmp_path / "made", elastic.attach(model), "tiny")
    elastic.detach(model)
    metadata = unsealed((path / "elastic.json").read_text(encoding="utf-8"))
    for name, (_, what) in fields_of("architecture").items():
        other = {**metadata["architecture"], name: "other" if name == "model_type" else 7}
        (path / "elastic.json").write_text(json.dumps({**metadata, "architecture": other}), encoding="utf-8")
        if what.startswith("is refused"):
            with pytest.raises(ValueError, match=f"{name}=7"):
                public("load_into")(model, path)
            continue
        assert what == "warns"
        with pytest.warns(UserWarning, match=name):
            public("load_into")(model, path)
        elastic.detach(model)


def test_route_report():
    assert list(fields_of("RouteReport")) == [f.name for f in dataclasses.fields(public("RouteReport"))]


def test_raw_records():
    written = {name: yaml.safe_load(default.strip("`")) for name, (default, _) in fields_of("Record").items()}
    assert written == of_dataclass(beside("read_records", "Record"))


def test_packed_data(tmp_path):
    rows = fields_of("PackedRow")
    row = public("packed_row")([public("Sample")([5, 6, 7], 2, 0)])
    assert set(rows) == set(row) == set(public("PackedRow").__annotations__)
    assert set(public("collate")([row])) == {*rows, "position_ids", "row_samples"}
    top = fields_of("manifest.json")
    origin = {name: None for name in top if name not in ("format", "splits")}
    origin |= {"seq_length": 8, "tokenizer": {"name": "tiny", "sha256": "0"}}  # which are read
    with public("DataWriter")(tmp_path / "data", origin) as writer:
        entry = writer.add("train", "made", [row])
    manifest = public("read_manifest")(tmp_path / "data")
    assert set(entry) == set(fields_of("a corpus"))
    assert set(manifest) == set(top) and str(manifest["format"]) == top["format"][1]
    types = public("open_corpus")(tmp_path / "data", "train", "made").features
    for name, (kind, _) in rows.items():
        inner = types[name]
        for _ in range(kind.count(",") + 1):  # one list within another per axis
            inner = inner.feature
        assert inner.dtype == kind.split()[0].replace("str", "string")


def test_what_evaluation_writes():
    torch.manual_seed(0)
    module = public("ElasticModule")()
    module.configure_model()
    module.eval()
    batch = public("collate")([public("packed_row")([public("Sample")([5, 6, 7, 8], 2, 0)])])
    with torch.no_grad():
        (sample,) = module.predict_step(batch, 0)
    assert list(sample) == list(fields_of("predictions.jsonl"))
    assert list(public("results_of")(module, "test", None)) == list(fields_of("results_<stage>.json"))
    assert list(fields_of("samples_<stage>.jsonl")) == [*public("ABOUT"), "<method>_<score>", "<ratio>"]
    checkpoint: dict = {"state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    assert list(checkpoint["elastic"]) == list(fields_of("last.ckpt"))
    ((_, rows),) = tables("field of a sample")
    assert list(rows) == [f.name for f in dataclasses.fields(public("PrefillStats"))]


def test_task_classes_and_families():
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    named = re.findall(r"`(\w+)`", section[9].split("Raw records")[0])
    assert tuple(named) == ("task_id", *beside("task_index", "TASKS"))
    listed = section[6].split("Supported model types:")[1].split(", with")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == public("FAMILIES")


def test_commands(capsys):
    cli.main(["--help"])
    shown = re.findall(r"^  (\w+) +\S", capsys.readouterr().out, flags=re.MULTILINE)
    ((_, rows),) = tables("command")
    assert list(rows) == [f"elastic {name}" for name in shown]
