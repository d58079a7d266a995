"""RouteReport and pictures: figures by hand, terminal picture, JSON, PNG."""

import io
import json
import sys

import pytest
import torch

from elastic import console
from elastic.config import SparseConfig
from elastic.inference.report import heads_that_differ, route_reports
from elastic.plots import Panel, curves_figure, image_of, panels_figure, save_png, share_figure, smooth
from elastic.routing.sparsity import esr

SPARSE = SparseConfig(sink=4, window=16, block=4)
ROUTE = torch.tensor([[[0, 1], [1, 1]], [[0, 0], [1, 1]], [[1, 0], [1, 1]]])  # [L 3, N 2, K 2]
LENGTHS = torch.tensor([100, 12])


def reports(route=ROUTE, lengths=LENGTHS, sparse=SPARSE):
    held = [2048 * (n + 1) for n in range(route.shape[1])]
    settings = {"backend": "torch (cpu)", "kv_cache": "elastic", "held_N": held}
    return route_reports(route, lengths, sparse, head_dim=8, element_size=2, **settings)


def test_figures():
    one, two = reports()
    assert one.msr == pytest.approx(2 / 6)
    assert two.msr == 1.0
    last, mean = esr(ROUTE.double(), LENGTHS, SPARSE)
    assert (one.esr_last, one.esr_all) == pytest.approx((float(last[0]), float(mean[0])))
    assert two.esr_all == 0.0  # shorter than sink and window: nothing to prune
    assert one.kv_bytes_full == 6 * 100 * 2 * 8 * 2
    assert one.kv_bytes_kept == (4 * 100 + 2 * 20) * 2 * 8 * 2
    assert two.kv_bytes_kept == two.kv_bytes_full
    assert one.prompt_tokens == 100


def test_picture():
    one, _ = reports()
    lines = one.render(unicode=True).splitlines()
    assert lines[:4] == [
        "layer   0",
        "head 0  ██░",
        "head 1  ░██",
        "█ full   ░ streaming (sink 4, window 16)",
    ]
    assert lines[4] == "100 prompt tokens, backend torch (cpu)"
    assert lines[5].startswith("MSR 0.333   ESR 0.")
    assert lines[6] == "KV cache: routes need 13.8 KiB of 18.8 KiB, the elastic cache holds 2.0 KiB"
    assert one.render(unicode=False).splitlines()[1] == "head 0  ##."
    assert one.render(unicode=False).isascii()


def test_picture_of_many_layers_stays_aligned():
    route = torch.zeros(36, 1, 12, dtype=torch.int64)
    lines = reports(route, LENGTHS[:1])[0].render().splitlines()
    assert lines[0] == "layer    0         10        20        30"
    assert lines[1] == "head 0   " + "█" * 36
    assert lines[12] == "head 11  " + "█" * 36


@pytest.mark.parametrize(("encoding", "glyph"), [("utf-8", "█"), ("ascii", "#"), ("latin-1", "#")])
def test_str_follows_the_terminal(monkeypatch, encoding, glyph):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert glyph in str(reports()[0])


def test_json(tmp_path):
    one, _ = reports()
    values = json.loads(one.to_json(tmp_path / "r.json"))
    assert values == json.loads((tmp_path / "r.json").read_text()) == one.to_dict()
    assert values["route"] == [[0, 1], [0, 0], [1, 0]]
    assert values["configuration"] == "FA-SSA"
    assert values["backend"] == "torch (cpu)"


def test_heatmap(tmp_path):
    file = reports()[0].save_heatmap(tmp_path / "new" / "r.png")
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"r\.jpg does not end in \.png"):
        reports()[0].save_heatmap(tmp_path / "r.jpg")


def test_heads_that_differ():
    assert heads_that_differ(*reports()) == 4
    assert heads_that_differ(reports()[0], reports()[0]) == 0


@pytest.mark.parametrize("route", [ROUTE[:, 0], ROUTE[:, :1]])
def test_shapes_that_do_not_fit(route):
    with pytest.raises(ValueError, match=r"expected \[layers, samples, KV heads\] and \[samples\]"):
        reports(route)


def test_share_figure_has_a_panel_per_task():
    figure = share_figure({"single_qa": torch.rand(30, 3), "code": torch.rand(30, 3)}, "title")
    assert [axis.get_ylabel() for axis in figure.axes[:2]] == ["single_qa", "code"]
    image = image_of(figure)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({}, "no routes to draw"),
        ({"code": torch.rand(3)}, r"'code' has shape \[3\]; expected \[layers, KV heads\]"),
        ({"code": torch.full((2, 2), 1.5)}, r"with values in \[0, 1\]"),
        ({"code": torch.full((2, 2), float("nan"))}, r"with values in \[0, 1\]"),
    ],
)
def test_share_figure_refuses(shares, message):
    with pytest.raises(ValueError, match=message):
        share_figure(shares)


def test_curves(tmp_path):
    figure = curves_figure({"loss": {"loss": [(0, 2.0), (1, 1.0)]}, "msr": {"a": [(0, 0.1)], "b": []}})
    assert len(figure.axes) == 2
    assert save_png(figure, tmp_path / "c.png").stat().st_size < 150_000
    with pytest.raises(ValueError, match="no curves to draw"):
        curves_figure({})


def test_smoothing_keeps_constants_and_order():
    assert [y for _, y in smooth([(i, 3.0) for i in range(5)])] == pytest.approx([3.0] * 5)
    assert [y for _, y in smooth([(0, 0.0), (1, 1.0)])] == pytest.approx([0.0, 0.2 / 0.36])
    assert smooth([]) == []


def test_table_and_blocks():
    assert console.table(("a", "bb"), [("x", "1"), ("yyy", "22")]) == "a    bb\n-------\nx     1\nyyy  22"
    assert console.side_by_side("a\nbbb", "1\n2\n3", gap=2) == "a    1\nbbb  2\n     3"


def test_say_escapes_what_the_stream_cannot_show():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console.say("naïve █", stream=stream)
    assert stream.buffer.getvalue() == b"na\\xefve \\u2588\n"


@pytest.mark.parametrize("count", [2, 5, 9, 13])
def test_a_legend_is_as_wide_as_the_picture_at_most_and_tells_its_lines_apart(count):
    names = [f"{'a long name ' * (1 + 2 * (n % 3 == 0))}{n}" for n in range(count)]
    figure = panels_figure([[Panel("all", {name: [(0, n), (1, n)] for n, name in enumerate(names)}, marker="o")]])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1
    lines = figure.axes[0].lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == count
