"""`elastic bench xattention` without a GPU: its inputs, its figures, its messages."""

import argparse

import pytest
import torch
from torch.nn.attention import SDPBackend

from elastic import cli
from elastic.bench import race, records, tables, xattention
from elastic.bench.structured import structured
from elastic.kernels import Pattern, bits_from_mask, select_blocks


def test_structured_inputs_need_about_a_fifth_of_the_blocks():
    q, k = structured(8192, 2, 1, 128, "cpu")
    assert q.shape == (1, 8192, 2, 128) and k.shape == (1, 8192, 1, 128)
    mode = torch.full((1, 1), 2, dtype=torch.int32)
    bits = select_blocks(q, k, mode, Pattern.without_streaming(128), stride=16, threshold=0.9)
    assert 0.15 < xattention.causal_share(bits, 8192, 128) < 0.3
    again = structured(8192, 2, 1, 128, "cpu")
    assert torch.equal(q, again[0]) and torch.equal(k, again[1])


@pytest.mark.parametrize("block", [64, 128])
def test_share_of_the_causal_blocks(block):
    begin = torch.arange(0, 512, block)
    causal = begin <= torch.arange(127, 512, 128)[:, None]
    assert xattention.causal_share(bits_from_mask(causal[None, None]), 512, block) == 1.0
    diagonal = begin[None] // 128 == torch.arange(4)[:, None]
    assert xattention.causal_share(bits_from_mask(diagonal[None, None]), 512, block) == 0.4


@pytest.fixture
def small_on_cpu(monkeypatch):
    monkeypatch.setattr(xattention, "HEADS", 4)
    monkeypatch.setattr(xattention, "KV_HEADS", 2)
    monkeypatch.setattr(xattention, "DENSE", SDPBackend.MATH)
    monkeypatch.setattr(xattention, "kernel_device", lambda args, why: torch.device("cpu"))
    monkeypatch.setattr(race, "matmul_tflops", lambda: 1.0)
    monkeypatch.setattr(xattention, "extra_bytes", lambda call: sum(x.numel() for x in call()))
    monkeypatch.setattr(
        race,
        "measure_in_turn",
        lambda calls, _: {who: [2.0 + 0.0 * calls[who]().float().sum().item()] for who in calls},
    )


def test_figures_of_a_run(small_on_cpu, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    xattention.add_arguments(parser)
    words = ["--lengths", "512", "--strides", "16", "8", "--layers", "512", "--memory", "256", "--commit", "abc"]
    assert xattention.run(parser.parse_args([*words, "--out", str(tmp_path)]), "elastic bench xattention") == 0
    found = records.load(tmp_path / "xattention.json")
    value = {(r["case"], r["who"], r["metric"]): r["value"] for r in found}
    for stride in (16, 8):
        name = f"select-s{stride}-b128-512"
        assert value[name, "ours", "time"] == value[name, "torch", "time"] == 2.0
        assert value[name, "ours", "rows within 1 block of the oracle"] == 1.0
        rows = 512 // stride
        work = sum(2.0 * 4 * 128 * stride * (row + 1) for row in range(rows))  # row i sees i + 1 cells
        assert value[name, "ours", "eff"] == pytest.approx(work / 2.0 / 1e9, rel=1e-4)
    layer = "layer-s16-b128-512"
    assert value[layer, "ours", "speed over cudnn"] == 1.0 and 0.4 <= value[layer, "ours", "density"] <= 1.0
    bits = 4 * 2 * 4  # heads, query blocks, bytes of the one word
    assert value["layer-s16-b128-256", "ours", "extra memory, selection"] == pytest.approx(
        (4 * 2 + bits) / 1e6, rel=1e-4
    )  # the stand-in: numbers
    beside = value["layer-s16-b128-256", "ours", "extra memory, attention"]
    assert beside == pytest.approx((256 * 4 * 128 + bits) / 1e6, rel=1e-4)
    assert all(r["commit"] == "abc" and r["kernel"].startswith("xattention_select") for r in found)
    assert "speed over cudnn: 1 x" in capsys.readouterr()[0] and "density" in tables.terminal(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--lengths", "100"], "length 100 is not a multiple of 128; use 128"), ([], "needs an NVIDIA GPU")],
)
def test_bad_options(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "xattention", *options]) == 2
    assert message in capsys.readouterr().err
