"""A run that names no data: the mixture is packed for its backbone once, and the settings name it."""

import shutil
from pathlib import Path

import pytest
import yaml

from elastic.commands import training_data
from elastic.commands.data_prep import part
from elastic.data.shards import read_manifest
from elastic.model.loading import ASSETS, load_tokenizer
from elastic.training.resume import check_tokenizer
from tests.test_configs import build

SMALL = {
    "backbone": "smollm2-135m", "seq_length": 512, "tokens": dict.fromkeys(("train", "validation", "test"), 3000),
    "context": [64, 300], "sources": {"needle_single": {"weight": 1}, "continuation": {"weight": 1}},
}  # fmt: skip
CPU = ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A mixture of seconds, and a cache of its own."""
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.setattr(training_data, "MIXTURE", str(tmp_path / "small.yaml"))
    return tmp_path


def test_data_is_packed_once_for_the_backbone(small, capsys):
    for told in (1, 0):
        cli = build("--model.backbone", "tiny", *CPU)
        folder = cli.config["fit"]["data"]["data_dir"]
        assert cli.datamodule.data_dir == folder and folder.startswith(str(small / "cache" / "data" / "tiny-"))
        assert capsys.readouterr().out.count("no data.data_dir is given: packing") == told
    assert sorted(read_manifest(folder)["splits"]) == ["test", "train", "validation"]
    (small / "own").mkdir()
    assert build("--data.data_dir", str(small / "own"), *CPU).datamodule.data_dir == str(small / "own")


def test_a_folder_that_holds_another_model_now_has_its_own_data(small):
    folder = Path(shutil.copytree(ASSETS / "tiny", small / "mine"))
    first = training_data.own_data("mine")
    tokenizer = load_tokenizer("mine")
    tokenizer.chat_template = f"{tokenizer.chat_template} "
    tokenizer.save_pretrained(folder)
    part("pack_mixture")._tokenizer.cache_clear()  # as in a process of its own
    second = training_data.own_data("mine")
    assert first != second and training_data.own_data("mine") == second
    check_tokenizer(read_manifest(second), load_tokenizer("mine"), "mine")


def test_backbones_that_cannot_read_its_rows_are_refused(small):
    (small / "small.yaml").write_text(yaml.safe_dump({**SMALL, "seq_length": 2048}))
    with pytest.raises(
        ValueError, match=r"tiny reads 1024 tokens, but rows of .* have 2048; pack data with shorter ones"
    ):
        training_data.own_data("tiny")
    with pytest.raises(ValueError, match="not packed for GGUF files; pack data yourself"):
        training_data.own_data("tiny", "a.gguf")
