"""Every YAML of `configs/` parses, is commented key by key, and builds on the tiny backbone."""

import re

import pytest
import yaml

from elastic.commands.catalogue import TRAINING
from tests.helpers.training import ROOT, build_data

CONFIGS = ROOT / "configs"
FILES = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name not in ("mixture", "eval"))  # tested elsewhere
IDS = [str(path.relative_to(CONFIGS)) for path in FILES]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def build(*arguments):
    """An ElasticCLI that parsed and built everything but ran nothing."""
    from elastic.commands import training

    class Built(training.ElasticCLI):
        def _run_subcommand(self, subcommand):
            assert subcommand in TRAINING

    return training.command_line(Built, "fit", list(arguments))


def test_the_promised_files_exist():
    models = ("smollm2-135m", "qwen3-4b", "qwen3-8b", "llama-3.1-8b-instruct")
    expected = {"train.yaml", "tiny.yaml", "debug.yaml", *(f"model/{name}.yaml" for name in models)}
    expected |= {f"sparse/{name}.yaml" for name in ("fa_ssa", "fa_xa", "xa_ssa")}
    expected |= {"objective/quality.yaml", "router/static.yaml", "strategy/fsdp.yaml", "strategy/context.yaml"}
    assert expected <= set(IDS)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_file_builds_alone_over_the_tiny_data(path, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = {"seed_everything", "trainer", "model", "data", "resume_checkpoint", "elastic_checkpoint"}
    assert set(yaml.safe_load(path.read_text())) <= known
    flags = ["--trainer.devices", "1", "--trainer.accelerator", "cpu", "--data.data_dir", str(data)]
    cli = build("-c", str(path), *flags)
    wanted = yaml.safe_load(path.read_text()).get("model", {}).get("backbone")
    assert wanted is None or cli.model.backbone == wanted
    assert cli.trainer.max_steps == yaml.safe_load(path.read_text()).get("trainer", {}).get("max_steps", -1)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name != "data"], ids=str)
def test_every_setting_has_a_comment(path):
    text = path.read_text()
    assert text.startswith("# ")
    for line in text.splitlines():
        value = re.match(r"^\s+[\w.-]+:\s*[^\s#]", line)
        assert not value or "#" in line or _inside_commented_block(line), f"{path.name}: {line}"


def _inside_commented_block(line: str) -> bool:
    """Entries of `targets:` are explained at their head."""
    return line.startswith("    ") and line.strip().split(":")[0] in (
        "single_qa",
        "multihop_qa",
        "summarization",
        "code",
        "in_context",
    )


def test_train_yaml_holds_the_papers_numbers():
    cli = build("-c", str(CONFIGS / "train.yaml"), "-c", str(CONFIGS / "data" / "paper.yaml"), "--trainer.devices", "1")
    optimiser, sparse = cli.model.optimiser, cli.model.elastic.sparse
    assert (optimiser.lr, optimiser.betas, optimiser.weight_decay) == (5e-4, (0.9, 0.95), 0.1)
    assert (optimiser.multiplier_lr, optimiser.warmup) == (1e-3, 0.2)
    assert (sparse.sink, sparse.window, sparse.block, cli.model.elastic.router.pool_tokens) == (128, 2048, 128, 100)
    assert cli.trainer.max_steps == 300 and cli.model.dtype_name == "bfloat16"
    assert cli.model.objective.intervals == [(0.7, 0.7)] * 2 + [(1.0, 1.0)] * 3
    assert cli.datamodule.rows_per_step * 8 == 48


def test_layers_combine():
    names = ("train.yaml", "model/qwen3-8b.yaml", "sparse/fa_ssa.yaml", "data/paper.yaml")
    cli = build(*(word for name in names for word in ("-c", str(CONFIGS / name))), "--trainer.devices", "1")
    assert cli.model.backbone == "Qwen/Qwen3-8B" and cli.model.elastic.sparse.name == "FA-SSA"


def test_defaults_named_in_the_comments_are_the_real_ones():
    """`default X` after a key of train.yaml's model section equals the constructor's."""
    from elastic.config import ElasticConfig
    from elastic.training.config import ObjectiveConfig, OptimiserConfig, TemperatureConfig

    elastic = ElasticConfig()
    sections = (OptimiserConfig(), TemperatureConfig(), ObjectiveConfig(), elastic.sparse, elastic.router, elastic)
    checked = 0
    for line in (CONFIGS / "train.yaml").read_text().splitlines():
        found = re.match(r"^\s+(\w+):.*; default (\S+)$", line)
        real = [vars(section)[found[1]] for section in sections if found and found[1] in vars(section)]
        if found and real:
            named = yaml.safe_load(found[2].lower())
            assert named in real or float(named) in real, line
            checked += 1
    assert checked >= 12
