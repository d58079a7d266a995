"""Records of `elastic bench`: on disk, as a picture, as the page of recorded results."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from elastic import cli
from elastic.bench import records, tables
from elastic.bench.cases import Case
from elastic.bench.drawing import figures
from elastic.bench.pictures import attention_figure, speedups
from elastic.plots import save_png

FIRST_FORMAT = Path(__file__).parent / "first_format.json"
RESULTS = Path(__file__).parent / "results"
STAMP = {"gpu": "a GPU", "kernel": "a kernel", "versions": {"torch": "2"}, "commit": "abc", "command": "elastic bench"}


def given_records() -> list[records.Measurement]:
    """Records as a run with two lengths would write them."""
    found = []
    for length in (8192, 65536):
        for streaming in (0, 4, 8):
            case = Case(length, streaming)
            for speed, who in ((600, "ours"), (500, "cudnn"), (400, "flex")):
                if who == "cudnn" and streaming:
                    continue
                ms = case.flops() / speed / 1e9
                shared = {"case": case.name, "who": who, "repeats": 5, **case.properties(), **STAMP}
                found += [
                    {**shared, "metric": "time", "value": ms, "unit": "ms"},
                    {**shared, "metric": "eff", "value": case.flops() / ms / 1e9, "unit": "TFLOP/s"},
                ]
    return [*found, {"case": "host", "who": "ours", "metric": "host time", "value": 30.0, "unit": "us", **STAMP}]


def test_picture(tmp_path):
    found = given_records()
    figure = attention_figure(found)
    titles = [axis.get_title() for axis in figure.axes if axis.get_visible()]
    assert titles[:3] == ["speed at MSR 0", "speed at MSR 0.5", "speed at MSR 1"] and len(titles) == 5
    assert titles[3:] == ["speed-up at 8K tokens", "speed-up at 64K tokens"]
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert lines["ours"] == pytest.approx([600, 600]) and lines["cudnn"] == pytest.approx([500, 500])
    assert figure.axes[0].get_ylabel() == "TFLOP/s"
    baseline, ratios = speedups(found, 65536)
    assert baseline == "cudnn" and set(ratios) == {"ours", "flex"} and ratios["ours"][0] == (0.0, pytest.approx(1.2))
    assert ratios["flex"][1][1] == pytest.approx(Case(65536).flops() / Case(65536, 4).flops() * 400 / 500)
    assert save_png(figure, tmp_path / "p.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no speeds with a length and an MSR"):
        attention_figure([found[-1]])


def test_legends_cover_no_curve():
    figure = attention_figure(given_records())
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours", "cudnn", "flex"]
    box = legend.get_window_extent()
    assert not any(
        axis.get_legend() or box.overlaps(axis.get_tightbbox()) for axis in figure.axes if axis.get_visible()
    )


def test_records_survive_the_disk_rounded(tmp_path):
    found = given_records()
    found += [{**found[0], "commit": "def", "value": 123456.789, "by_layer": [1 / 3, None], "n": 123456789}]
    path = records.save(tmp_path / "new" / "run.json", found)
    again = records.load(path)
    assert [{**record, "value": 0} for record in again[:-1]] == [{**record, "value": 0} for record in found[:-1]]
    assert [record["value"] for record in again] == pytest.approx([record["value"] for record in found], rel=5e-5)
    assert (again[-1]["value"], again[-1]["by_layer"], again[-1]["n"]) == (123460.0, [0.33333, None], 123456789)
    assert records.load_folder(path.parent) == {"run": again}
    assert records.save(tmp_path / "again.json", again).read_text() == path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]


def test_a_file_has_its_stamps_once_and_a_record_a_line(tmp_path):
    found = [*given_records(), {**given_records()[0], "commit": "def"}]
    lines = records.save(tmp_path / "run.json", found).read_text().splitlines()
    stamps = [json.loads(line.rstrip(",")) for line in lines if line.startswith('{"gpu"')]
    assert stamps == [STAMP, {**STAMP, "commit": "def"}]
    held = [json.loads(line.strip(",}") + "}") for line in lines if line.startswith('{"case"')]
    assert [record["stamp"] for record in held] == [0] * (len(found) - 1) + [1]
    assert len(lines) == len(found) + len(stamps) + 5


def test_a_failed_write_leaves_the_file_before_it(tmp_path, monkeypatch):
    path = records.save(tmp_path / "run.json", given_records())
    before = path.read_text()

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        records.save(path, given_records()[:1])
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_files_of_the_first_format_are_read_and_rewritten(tmp_path):
    old = json.loads(FIRST_FORMAT.read_text())
    assert isinstance(old, list) and records.load(FIRST_FORMAT) == old
    merged = ["bench", "merge", str(FIRST_FORMAT), str(FIRST_FORMAT), "--out", str(tmp_path), "--tag", "host"]
    assert cli.main(merged) == 0
    new, (wanted, _) = records.load(tmp_path / "host.json"), records.merge([old])
    assert len(new) == len(old)
    for one, other in zip(new, wanted, strict=True):
        assert one == {**other, "value": pytest.approx(other["value"], rel=5e-5)}


def test_bad_records_are_named(tmp_path):
    path, found = tmp_path / "run.json", given_records()
    bare = {name: value for name, value in found[0].items() if name not in STAMP}
    held = {"format": 2, "stamps": [STAMP], "records": [{**bare, "stamp": 0}]}
    path.write_text(json.dumps(held))
    assert records.load(path) == [found[0]]
    wrong = [*found[:2], {**found[0], "value": "fast"}]
    for broken, message in (
        ("{", "is not JSON"),
        ("[]", "holds no records"),
        ("[1]", "record 0 of .*'case' is nothing, expected str"),
        (json.dumps(wrong), "record 2 .*'value' is 'fast', expected int or float"),
        (json.dumps({**held, "format": 3}), "has format 3, expected 2"),
        (json.dumps({**held, "records": []}), "holds no records"),
        (json.dumps({**held, "records": [{**bare, "stamp": 1}]}), "record 0 .*'stamp' is 1, expected one of 0 to 0"),
        (json.dumps({**held, "records": [bare]}), "record 0 .*'stamp' is None"),
        (json.dumps({**held, "records": 1.5}), "no list of objects under 'records'"),
        (json.dumps({**held, "records": [1]}), "no list of objects under 'records'"),
        (json.dumps({**held, "stamps": 3}), "no list of objects under 'stamps'"),
        (json.dumps({**held, "stamps": ["x"]}), "no list of objects under 'stamps'"),
        (json.dumps({**held, "stamps": [{"gpu": "a GPU"}]}), "record 0 .*'kernel' is nothing, expected str"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message):
            records.load(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"no \*.json in"):
        records.load_folder(tmp_path)


def test_records_without_what_their_table_shows_are_named(tmp_path, capsys):
    bare = {name: value for name, value in given_records()[0].items() if name != "kv_heads"}
    assert "heads" in bare
    records.save(tmp_path / "run.json", [bare])
    assert cli.main(["bench", "table", str(tmp_path)]) == 2
    assert "the records of run do not fit its table (KeyError: 'kv_heads')" in capsys.readouterr().err


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


def test_recorded_results_are_the_pages(tmp_path):
    """The pages are what the generator makes of the records, so no figure in them was typed."""
    page = RESULTS.parent / "RESULTS.md"
    runs = records.load_folder(RESULTS)
    pictures = [f"results/{file.name}" for file in sorted(RESULTS.glob("*.png"))]
    how = "run `elastic bench table tests/bench/results --out tests/bench/RESULTS.md`"
    assert tables.markdown(runs, pictures, ["ABLATION.md"]) == page.read_text(), how
    assert tables.ablation_pages(runs) == {"ablation": page.with_name("ABLATION.md").read_text()}, how


def test_the_page_opens_with_the_headline_runs_and_leaves_the_ablation_to_its_own():
    page = (RESULTS.parent / "RESULTS.md").read_text()
    sections = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert sections[:6] == ["attention", "backward", "e2e", "decode", "router", "routing"]
    assert set(sections) == {file.stem for file in RESULTS.glob("*.json")} - {"ablation"}
    assert page.index("| dense-8k | ") < 1500 and "(ABLATION.md)" in page


def test_recorded_pictures_are_those_that_the_records_draw(tmp_path):
    made = {}
    for name, found in records.load_folder(RESULTS).items():
        if any(file.stem == name for file in RESULTS.glob("*.png")):
            made |= {f"{name}{ending}.png": figure for ending, figure in figures(found).items()}
    assert set(made) == {file.name for file in RESULTS.glob("*.png")}
    for figure in made.values():
        assert 8 <= figure.get_figwidth() <= 9
        assert not any(axis.get_legend() for axis in figure.axes)
        lines = ([line for line in axis.lines if len(line.get_xdata()) > 1] for axis in figure.axes)
        assert all(len(drawn) <= 6 for drawn in lines)  # beside single points


def test_recorded_results_are_light():
    files = [file for file in RESULTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 2_250_000
    for file in RESULTS.glob("*.json"):
        held = json.loads(file.read_text())
        assert held["format"] == records.FORMAT
        assert len(file.read_text().splitlines()) == len(held["stamps"]) + len(held["records"]) + 5, file


def test_pictures_are_drawn_again_from_records(tmp_path, capsys):
    path = records.save(tmp_path / "run.json", given_records())
    bare = records.save(tmp_path / "bare.json", given_records()[-1:])
    assert cli.main(["bench", "draw", str(path), str(bare)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'run.png'}\n{bare} holds nothing to draw\n"
    with Image.open(tmp_path / "run.png") as picture:
        assert picture.mode == "P" and 900 <= picture.width <= 1400


def test_page_of_given_records(tmp_path):
    records.save(tmp_path / "run.json", given_records())
    save_png(attention_figure(given_records()), tmp_path / "run.png")
    assert cli.main(["bench", "table", str(tmp_path), "--out", str(tmp_path / "sub" / "page.md")]) == 0
    text = (tmp_path / "sub" / "page.md").read_text()
    assert "| case | ours ms (TFLOP/s) | cudnn ms (TFLOP/s) | flex ms (TFLOP/s) |\n|---|---|---|---|\n" in text
    assert "(600) |" in text and "- host, ours, host time: 30 us" in text and "../run.png" in text
    assert "H 32, 8 KV heads, D 128, bf16." in text
