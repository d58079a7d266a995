"""Records of `elastic bench`: on disk, as a picture, as the page of recorded results."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from elastic import cli
from elastic.bench import records, tables
from elastic.bench.cases import Case
from elastic.bench.pictures import attention_figure, speedups
from elastic.plots import save_png

RESULTS = Path(__file__).parent / "results"
STAMP = {"gpu": "a GPU", "kernel": "a kernel", "versions": {"torch": "2"}, "commit": "abc", "command": "elastic bench"}


def given_records() -> list[records.Record]:
    """Records as a run with two lengths would write them."""
    found = []
    for length in (8192, 65536):
        for streaming in (0, 4, 8):
            case = Case(length, streaming)
            for speed, who in ((600, "ours"), (500, "cudnn"), (400, "flex")):
                if who == "cudnn" and streaming:
                    continue
                ms = case.flops() / speed / 1e9
                shared = {"case": case.name, "who": who, "repeats": 5, **case.facts(), **STAMP}
                found += [
                    {**shared, "metric": "time", "value": ms, "unit": "ms"},
                    {**shared, "metric": "eff", "value": case.flops() / ms / 1e9, "unit": "TFLOP/s"},
                ]
    return [*found, {"case": "host", "who": "ours", "metric": "host time", "value": 30.0, "unit": "us", **STAMP}]


def test_picture(tmp_path):
    found = given_records()
    figure = attention_figure(found)
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles[:3] == ["time at MSR 0", "time at MSR 0.5", "time at MSR 1"] and len(titles) == 8
    assert titles[6:] == ["speed-up at 8K tokens", "speed-up at 64K tokens"]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[3].lines}
    assert lines["ours"] == pytest.approx([600, 600]) and lines["cudnn"] == pytest.approx([500, 500])
    baseline, ratios = speedups(found, 65536)
    assert baseline == "cudnn" and set(ratios) == {"ours", "flex"} and ratios["ours"][0] == (0.0, pytest.approx(1.2))
    assert ratios["flex"][1][1] == pytest.approx(Case(65536).flops() / Case(65536, 4).flops() * 400 / 500)
    assert save_png(figure, tmp_path / "p.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no timings with a length and an MSR"):
        attention_figure([found[-1]])


def test_records_survive_the_disk_and_bad_ones_are_named(tmp_path):
    found = given_records()
    path = records.save(tmp_path / "new" / "run.json", found)
    assert records.load(path) == found and records.load_folder(path.parent) == {"run": found}
    for broken, message in (
        ("{", "is not JSON"),
        ("[]", "holds no records"),
        ("[1]", "record 0 of .*'case' is nothing, expected str"),
        (
            json.dumps([*found[:2], {**found[0], "value": "fast"}]),
            "record 2 .*'value' is 'fast', expected int or float",
        ),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message):
            records.load(path)
    with pytest.raises(ValueError, match=r"no \*.json in"):
        records.load_folder(tmp_path)


def test_stamp_states_the_run():
    stamp = records.stamp("elastic bench attention", "abc1234", torch.device("cpu"))
    assert stamp["commit"] == "abc1234" and stamp["versions"]["torch"] == torch.__version__
    record = {"case": "a", "who": "b", "metric": "c", "value": 1.0, "unit": "ms", **stamp}
    assert all(isinstance(record[name], kinds) for name, kinds in records.REQUIRED.items())


def test_commit_of_another_checkout_is_not_ours(tmp_path):
    assert records.git_commit(tmp_path) == "unknown"
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    assert records.git_commit(tmp_path) == "unknown"


def test_command_line_leaves_the_folder_out():
    argv = ["attention", "--out", "/tmp/a b", "--msr", "0", "--out=x", "--tag", "a b"]
    assert records.command_line(argv) == "elastic bench attention --msr 0 --tag 'a b'"


def test_recorded_results_are_the_page():
    """RESULTS.md is what the generator makes of the records, so no figure in it was typed."""
    page = RESULTS.parent / "RESULTS.md"
    pictures = [f"results/{file.name}" for file in sorted(RESULTS.glob("*.png"))]
    text = tables.markdown(records.load_folder(RESULTS), pictures)
    assert text == page.read_text(), "run `elastic bench table tests/bench/results --out tests/bench/RESULTS.md`"


def test_page_of_given_records(tmp_path):
    records.save(tmp_path / "run.json", given_records())
    save_png(attention_figure(given_records()), tmp_path / "run.png")
    assert cli.main(["bench", "table", str(tmp_path), "--out", str(tmp_path / "sub" / "page.md")]) == 0
    text = (tmp_path / "sub" / "page.md").read_text()
    assert "| case | ours ms (TFLOP/s) | cudnn ms (TFLOP/s) | flex ms (TFLOP/s) |\n|---|---|---|---|\n" in text
    assert "(600) |" in text and "- host, ours, host time: 30 us" in text and "../run.png" in text
    assert "H 32, 8 KV heads, D 128, bf16." in text
