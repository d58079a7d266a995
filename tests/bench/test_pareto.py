"""Time and quality in one picture: from an evaluation and times that the programs themselves made, and the arithmetic
on made-up records.
"""

import argparse

import pytest

from elastic import cli
from elastic.bench import selection, tables
from elastic.bench.drawing import draw
from elastic.bench.e2e_models import SHAPES, attention_shape
from elastic.bench.records import load, load_folder, save
from elastic.bench.studies import at_share
from elastic.bench.studies.pareto import Judged, records
from elastic.bench.studies.pareto_tables import FRONT, KEPT, UNTIMED, cells, figure, front
from elastic.bench.studies.prefill import Prefill, density_of
from elastic.config import SparseConfig
from elastic.routing.methods import parse_method
from elastic.routing.sparsity import causal_pairs, visited_pairs
from tests.bench import pareto
from tests.bench.test_bench_selection import small_on_cpu  # noqa: F401 - a fixture
from tests.helpers.training import build_data

COMMAND = "elastic bench e2e --sink 128 --window 896 --block 128"
SIZES = SparseConfig(sink=128, window=896, block=128)
LENGTH = 8192
STREAMS = density_of("streaming", LENGTH, SIZES)


def record(who, metric, value, **about):
    return {"case": "any", "who": who, "metric": metric, "value": value, "length": LENGTH, "command": COMMAND, **about}


def of_e2e():
    """A model of 600 ms beside attention, 20 ms of router, attention of 100 ms and 400 ms for each unit of density."""
    shape = {"shape": "llama-3.1-8b"}
    found = [record(who, "first token", ms, msr=None, **shape) for who, ms in (("cudnn", 1200.0), ("flash2", 1300.0))]
    for msr in (0.0, 0.5, 1.0):
        attention = 100 + 400 * (1 - msr + msr * STREAMS)
        parts = {"attention": attention, "router": 20.0, "first token": 620 + attention}
        found += [record("elastic", metric, value, msr=msr, **shape) for metric, value in parts.items()]
    return found


def of_selection(who="moba:3", density=0.25, heads=(32, 8, 128)):
    about = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
    timed = (("choice", "time", 0.5), ("attention", "time", 4.0), ("layer", "density", density))
    return [record(who, metric, value, **about) | {"case": f"{case}-8k"} for case, metric, value in timed]


def took(method, sparse=SIZES, rows=1024, msr=1.0, density=0.5, times=None):
    prefill = Prefill("llama-3.1-8b", LENGTH, times or [*of_e2e(), *of_selection()])
    return prefill.milliseconds(parse_method(method), sparse, rows, msr, density)


def test_full_and_streaming_heads_take_what_e2e_measured():
    assert took("dense", msr=0.0, density=1.0) == (1200.0, "stock model")
    for density in (1.0, 0.7, STREAMS, 0.05):  # beyond what was measured along the last line
        assert took("streaming", density=density)[0] == pytest.approx(600 + 100 + 400 * density)
        assert took("static:a.json@0.5", density=density)[0] == pytest.approx(600 + 100 + 400 * density)
        assert took("elastic:folder@-1", density=density)[0] == pytest.approx(620 + 100 + 400 * density)
    assert took("random:0.5", density=0.5)[1] == "e2e"


def test_heads_that_choose_blocks_take_their_choice_and_attention_in_proportion():
    moba = parse_method("moba:12").sparse(SIZES)
    assert took("moba:12", moba, density=0.5) == (pytest.approx(600 + 32 * (0.5 + 4.0 * 2)), "moba:3")
    both = [*of_e2e(), *of_selection(), *of_selection("moba:12", density=0.5)]
    assert took("moba:12", moba, density=0.5, times=both) == (pytest.approx(600 + 32 * 4.5), "moba:12")


def test_configurations_take_their_share_of_each_mode():
    """XAttention at a density of 0.2 in its heads; the others full, or streaming on rows of another length."""
    times = [*of_e2e(), *of_selection("xattention:0.9", density=0.4)]
    blocks = 32 * (0.5 + 4.0 / 2)
    fa_xa = parse_method("elastic/fa-xa:folder").sparse(SIZES)
    found, timed_as = took("elastic/fa-xa:folder", fa_xa, msr=0.75, density=0.25 + 0.75 * 0.2, times=times)
    assert (found, timed_as) == (pytest.approx(620 + 0.25 * 500 + 0.75 * blocks), "xattention:0.9")
    xa_ssa = parse_method("elastic/xa-ssa:folder").sparse(SIZES)
    streams = visited_pairs(2048, "streaming", SIZES) / causal_pairs(2048)
    density = 0.75 * streams + 0.25 * 0.2
    found, _ = took("elastic/xa-ssa:folder", xa_ssa, rows=2048, msr=0.75, density=density, times=times)
    assert found == pytest.approx(620 + 0.75 * (100 + 400 * streams) + 0.25 * blocks)
    assert took("elastic/xa-ssa:folder", xa_ssa, msr=1.0, density=0.5, times=of_e2e())[1] == "e2e", "none chooses"


@pytest.mark.parametrize(
    ("method", "times", "message"),
    [
        (
            "moba:3:128",
            of_selection(),
            r"no record has timed how moba:3:128 chooses blocks at 8192 tokens \(moba, chunk",
        ),
        ("nsa", of_selection(), r"no record has timed how nsa chooses"),
        ("moba:3", of_selection(heads=(4, 2, 64)), r"head dim \(32, 8, 128\), .* for \(4, 2, 64\)"),
    ],
)
def test_a_choice_that_was_not_timed_has_no_time(method, times, message):
    with pytest.raises(ValueError, match=message):
        took(method, parse_method(method).sparse(SIZES), times=[*of_e2e(), *times])


def test_lengths_and_commands_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"of llama-3.1-8b at 4096 tokens \(they have 8192\); run `elastic bench e2e"):
        Prefill("llama-3.1-8b", 4096, of_e2e())
    with pytest.raises(ValueError, match=r"of qwen3-8b at 8192 tokens \(they have nothing of that shape\)"):
        Prefill("qwen3-8b", LENGTH, of_e2e())
    other = [{**r, "command": "python mine.py"} for r in of_e2e()]
    with pytest.raises(ValueError, match=r"measured by `python mine.py`; expected `elastic bench e2e`"):
        Prefill("llama-3.1-8b", LENGTH, other)
    with pytest.raises(ValueError, match="shape 'gpt' is not known"):
        attention_shape("gpt")


def judged(method, kept, density, **more):
    sparse = parse_method(method).sparse(SIZES)
    about = {"set": "own", "length": LENGTH, "n": 9, "low": kept - 0.1, "high": kept + 0.1, "msr": 1.0, **more}
    return Judged(method=method, kept=kept, density=density, sparse=sparse, **about)


def test_table_picture_and_what_nothing_beats():
    points = [("dense", 1.0, 1.0), ("streaming", 0.5, STREAMS), ("static:a@0.5", 0.97, 0.5), ("static:a@0.2", 0.4, 0.8)]
    ours = [judged(*point) for point in (*points, ("nsa", 0.8, 0.3))]
    found = records(ours, of_e2e(), "llama-3.1-8b", None)
    timed = [r for r in found if r["metric"] == KEPT]
    assert [r["who"] for r in front(timed)] == ["streaming", "static:a@0.5", "dense"]
    header, rows = cells(found)
    assert rows[0][:6] == ["own", "8192", "streaming", "9", "1.00", f"{STREAMS:.3f}"]
    assert rows[1][header.index("quality kept")] == "0.970 [0.870, 1.070]*" and "*" not in rows[2][-2]
    assert rows[3][header.index("x dense")] == "1.00" and len(rows) == 4
    (missing,) = (r for r in found if r["metric"] == UNTIMED)
    assert missing["who"] == "nsa" and "run `elastic bench selection --lengths 8192" in missing["why"]
    axes = figure(found).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert drawn["static:a"] == [0.97, 0.4] and drawn[FRONT] == [0.5, 0.97, 1.0]
    assert axes.get_title() == "own, 8192 tokens" and "prefill of 8192 tokens, llama-3.1-8b" in axes.get_xlabel()


def test_times_of_several_shapes_are_rows_and_panels_of_their_own():
    ours = [judged("dense", 1.0, 1.0), judged("streaming", 0.9, STREAMS)]
    other = [{**r, "shape": "llama-3.1-8b-16layers"} if "shape" in r else r for r in of_e2e()]
    found = records(ours, of_e2e(), "llama-3.1-8b", None) + records(ours, other, "llama-3.1-8b-16layers", None)
    rows = cells(found)[1]
    assert [row[-1].partition(", ")[2] for row in rows[::2]] == [
        "llama-3.1-8b at 8192",
        "llama-3.1-8b-16layers at 8192",
    ]
    assert len(figure(found).axes) == 2 and all(row[-2].count("*") == 1 for row in rows)


def of_points(name, *points, length=LENGTH):
    return [
        judged(f"{name}@{bias}", kept, density, msr=msr, length=length, n=5)
        for bias, (kept, msr, density) in zip((0.5, 0.6, 0.7, 0.8), points, strict=False)
    ]


def test_methods_side_by_side_where_they_keep_as_much():
    curve = ((1.0, 0.2, 0.9), (0.98, 0.4, 0.7), (0.96, 0.6, 0.5), (0.5, 0.8, 0.3))
    ours = [judged("dense", 1.0, 1.0), judged("streaming", 0.5, STREAMS), *of_points("static:a", *reversed(curve))]
    ours += of_points("static:b", (0.98, 0.3, 0.8), (0.97, 0.5, 0.6)) + of_points(
        "static:c", (0.9, 0.3, 0.8), (0.95, 0.5, 0.6)
    )
    found = at_share.at_share(records(ours, of_e2e(), "llama-3.1-8b", None), 0.97)
    by = {r["who"]: r for r in found}
    assert set(by) == {"static:a", "static:b", "static:c"}
    a = by["static:a"]  # half-way between its second point and its third
    assert (a["bound"], a["n"], a["points"]) == ("", 5, 4)
    assert [a[key] for key in ("value", "kept", "density")] == pytest.approx([0.5, 0.97, 0.6])
    assert a["seconds"] == pytest.approx((600 + 100 + 400 * 0.6) / 1e3) and a["dense_seconds"] == 1.2
    assert (by["static:b"]["bound"], by["static:b"]["value"]) == (at_share.AT_LEAST, pytest.approx(0.5))
    c = by["static:c"]  # what rises is averaged
    assert (c["bound"], c["value"], c["kept"]) == (at_share.NOT_REACHED, pytest.approx(0.3), pytest.approx(0.9))
    header, rows = at_share.cells(found)
    told = {row[2]: row[header.index("MSR")] for row in rows}
    assert told == {"static:a": "0.500", "static:b": ">= 0.500", "static:c": "not reached; 0.900 at 0.300"}
    assert rows[0][header.index("ESR")] == "0.400" and rows[0][header.index("x dense")] == f"{1.2 / 0.94:.2f}"
    for share in (0, 1, 1.5):
        with pytest.raises(ValueError, match="is not between 0 and 1"):
            at_share.at_share(found, share)


def test_lengths_count_the_same_where_prompts_of_one_length_were_timed():
    ours = [
        one for length, kept in ((1024, 1.0), (4096, 0.94))
        for one in of_points("static:a", (kept, 0.2, 0.8), (0.5, 0.6, 0.4), length=length)
    ]  # fmt: skip
    (found,) = at_share.at_share(records(ours, of_e2e(), "llama-3.1-8b", LENGTH), 0.97)
    assert (found["value"], found["kept"], found["n"]) == (pytest.approx(0.2), pytest.approx(0.97), 10)


def test_times_that_do_not_belong_together_are_refused(tmp_path):
    stamp = {"unit": "", "gpu": "one", "kernel": "", "versions": {}, "commit": ""}
    for name, more in (("a", {}), ("b", {"gpu": "two"})):
        save(tmp_path / f"{name}.json", [{**r, **stamp, **more} for r in of_e2e()])
    with pytest.raises(SystemExit, match="the times are of one and of two, which do not add up"):
        pareto.main([str(tmp_path), *(str(tmp_path / f"{name}.json") for name in "ab")])
    for broken, message in (("{", "c.json is not JSON"), (None, "No such file")):
        (tmp_path / "c.json").write_text(broken) if broken else (tmp_path / "c.json").unlink()
        with pytest.raises(SystemExit, match=message):
            pareto.main([str(tmp_path), str(tmp_path / "c.json")])


def test_from_the_programs_to_the_page(small_on_cpu, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Small runs of `elastic eval`, `bench e2e` and `bench selection`, joined; then `bench table` shows them."""
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.setitem(SHAPES, "tiny", ("llama", {**SHAPES["tiny"][1], "head_dim": 128}))
    methods = ["dense", "streaming", "random:0.5", "nsa:2", "xattention:0.5"]
    words = [
        "--backbone",
        "tiny",
        "--rows",
        f"own={build_data(tmp_path / 'data')}",
        "--tasks",
        "own",
        "--lengths",
        "64,128",
    ]
    words += ["--sink", "4", "--window", "16", "--block", "4", "--stride", "4", "--methods", *methods]
    assert cli.main(["eval", *words, "--out", str(tmp_path / "eval")]) == 0
    words = ["--device", "cpu", "--dtype", "float32", "--shapes", "tiny", "--new-tokens", "1", "--lengths", "256"]
    words += ["--msr", "0", "1", "--sink", "8", "--window", "16", "--block", "8", "--out", str(tmp_path)]
    assert cli.main(["bench", "e2e", *words]) == 0
    parser = argparse.ArgumentParser()
    selection.add_arguments(parser)
    selection.run(parser.parse_args(["--lengths", "256", "--methods", "nsa", "--out", str(tmp_path)]), "a command")
    capsys.readouterr()
    arguments = [str(tmp_path / "eval"), str(tmp_path / "e2e.json"), str(tmp_path / "selection.json")]
    assert pareto.main([*arguments, "--shape", "tiny", "--at", "256", "--commit", "abc", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = load(tmp_path / "pareto.json")
    assert {r["set"] for r in found} == {"own_sensitive", "own_robust"} and {r["who"] for r in found} == set(methods)
    dense = [r for r in found if r["who"] == "dense"]
    assert all((r["value"], r["low"], r["high"], r["density"]) == (1.0, 1.0, 1.0, 1.0) for r in dense)
    assert {r["who"] for r in found if r["metric"] == UNTIMED} == {"xattention:0.5"}, "its stride was not timed"
    assert {r["timed_as"] for r in found if r["who"] == "nsa:2"} == {"nsa"}
    assert all(r["seconds"] > 0 and r["timed_length"] == 256 for r in found if r["metric"] == KEPT)
    assert "quality kept" in out and (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    page = tables.markdown({"pareto": load_folder(tmp_path)["pareto"]}, ["pareto.png"])
    assert "| set | of dense | method |" not in page, "no method of several points"
    assert "| set | tokens | method |" in page and "(pareto.png)" in page and "- xattention:0.5, own_" in page
    assert draw(tmp_path / "pareto.json", found) == [tmp_path / "pareto.png"]
    with pytest.raises(SystemExit, match="tiny at 64 tokens"):
        pareto.main([*arguments, "--shape", "tiny", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no results of dense"):
        pareto.main([*arguments, "--methods", "streaming"])
    with pytest.raises(SystemExit, match="has no benchmark theirs; it has own_"):
        pareto.main([*arguments, "--sets", "theirs"])
    (tmp_path / "eval" / "samples" / next(f.name for f in (tmp_path / "eval" / "samples").glob("nsa*"))).unlink()
    with pytest.raises(SystemExit, match="nsa:2 and dense were not measured on the same tasks"):
        pareto.main([*arguments, "--at", "256"])
