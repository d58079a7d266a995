"""`elastic bench selection` without a GPU: its figures, its sizes, its messages."""

import argparse

import pytest
import torch
from torch.nn.attention import SDPBackend

from elastic import cli
from elastic.bench import records, selection, tables, xattention
from elastic.bench.timing import Timing
from elastic.config import CHOOSING
from elastic.routing.methods import parse_method


@pytest.fixture
def small_on_cpu(monkeypatch):
    monkeypatch.setattr(xattention, "HEADS", 4)
    monkeypatch.setattr(xattention, "KV_HEADS", 2)
    monkeypatch.setattr(xattention, "DENSE", SDPBackend.MATH)
    for name, size in (("HIDDEN", 64), ("MLP", 96), ("CHUNK", 512)):
        monkeypatch.setattr(selection, name, size)
    monkeypatch.setattr(selection, "kernel_device", lambda args, why: torch.device("cpu"))
    monkeypatch.setattr(selection, "extra_bytes", lambda call: sum(x.numel() for x in call()))
    monkeypatch.setattr(selection, "measure", lambda call, _budget: Timing(2.0 + 0.0 * call().sum().item(), 3))


def test_figures_of_a_run(small_on_cpu, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    selection.add_arguments(parser)
    words = ["--lengths", "1024", "--commit", "abc", "--out", str(tmp_path)]
    assert selection.run(parser.parse_args(words), "elastic bench selection") == 0
    found = records.load(tmp_path / "selection.json")
    value = {(r["case"], r["who"], r["metric"]): r["value"] for r in found}
    assert value["rest-of-layer-1k", "cublas", "time"] == value["attention-1k", "cudnn", "time"] == 2.0
    for name in selection.METHODS:
        assert value["choice-1k", name, "time"] == value["attention-1k", name, "time"] == 2.0
        assert value["layer-1k", name, "choice, share of the layer"] == pytest.approx(1 / 3, rel=1e-4)
        assert value["layer-1k", name, "choice, share of its attention"] == 0.5
        assert 0 < value["layer-1k", name, "density"] <= 1
        words = 8  # a word of bits for each query block
        assert value["layer-1k", name, "extra memory, choice"] == pytest.approx(4 * words / 1e6, rel=1e-4)
    assert all(r["commit"] == "abc" and r["length"] == 1024 for r in found)
    assert "share of the layer" in capsys.readouterr()[0] and "density" in tables.terminal(found)


def test_every_method_that_chooses_is_timed_at_its_published_sizes():
    assert {parse_method(name).kind for name in selection.METHODS} == set(CHOOSING)
    sizes = {parse_method(name).kind: selection.sizes_of(parse_method(name)) for name in selection.METHODS}
    assert (sizes["infllm"].block, sizes["infllm"].sink, sizes["infllm"].window) == (64, 64, 2048)
    assert (sizes["nsa"].block, sizes["nsa"].window, sizes["moba"].chunk) == (64, 512, 512)
    assert (sizes["flashprefill"].sink, sizes["flashprefill"].window, sizes["flexprefill"].min_budget) == (
        256,
        512,
        1024,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "100"], "length 100 is not a positive multiple of 128; use 65536"),
        (["--methods", "streaming"], "method streaming chooses no key blocks; use some of xattention:0.9, moba:3"),
        (["--methods", "moba"], "is not of the form moba:<top_k>[:<chunk>]"),
        ([], "needs an NVIDIA GPU"),
    ],
)
def test_bad_options(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "selection", *options]) == 2
    assert message in capsys.readouterr().err
