"""`elastic eval` compares like with like: one backbone, the checkpoints' sizes for all; or it refuses, or says so.
Records hold what ran; corrections are those of the tasks that ran.
"""

import json
import shutil
from pathlib import Path

import pytest

from elastic import cli
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.files import sealed, unsealed
from elastic.model.attach import attach, elastic_config
from elastic.model.checkpoint import METADATA, save_elastic
from elastic.model.loading import ASSETS, architecture, load_backbone
from tests.helpers.models import tiny_model
from tests.helpers.training import build_data
from tests.routing.test_calibration import made

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("wonderwords", reason="the extra `eval` is not installed")
from elastic.evaluation import runner
from elastic.evaluation.benchmark import corrections_of
from elastic.evaluation.like_with_like import ALONE, common_backbone, common_sizes, common_template, uneven
from elastic.evaluation.longbench import E, LongBench
from elastic.evaluation.ruler import Ruler
from elastic.routing.methods import parse_method

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "smollm2-135m-fa-ssa"
NOT_ASKED = dict.fromkeys(("sink", "window", "block", "stride"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of the tiny backbone that differ in their sizes and modes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, sparse in {
        "small": SparseConfig(sink=4, window=32, block=4),
        "wide": SparseConfig(sink=8, window=64, block=4, granule="block"),
        "xa": SparseConfig(route1="xattention", window=512, block=16, stride=8),
    }.items():
        model = attach(load_backbone("tiny")[0], ElasticConfig(RouterConfig(pool_tokens=16), sparse))
        save_elastic(folder / name, model, "tiny")
    return folder


def methods(*names):
    return [parse_method(name) for name in names]


def sizes(sparse):
    return {name: getattr(sparse, name) for name in NOT_ASKED}


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_methods_run_on_backbone_and_sizes_of_the_checkpoint(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(runner.__dict__, "load_model", noted(loaded := {}))
    names = ["dense", "streaming", "random:0.5", f"elastic:{folder / 'small'}", f"elastic/fa-xa:{folder / 'xa'}"]
    command = ["eval", "--tasks", "ruler_vt", "--lengths", "768", "--limit", "1", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--methods", *names[:4]]) == 0
    told = capsys.readouterr().out
    assert "on tiny" in told and "Uneven" not in told
    wanted = {"sink": 4, "window": 32, "block": 4, "stride": 16}
    assert loaded == dict.fromkeys(("dense", names[3]), ("qwen3", 3, wanted))  # one model for the first three
    files = {origin["method"]: origin for origin, *_ in map(lines, (tmp_path / "out" / "samples").iterdir())}
    assert files.keys() == {*names[:4]}
    for origin in files.values():
        assert origin["backbone"] == "tiny" and {name: origin["sparse"][name] for name in NOT_ASKED} == wanted
    assert [line for line in told.splitlines() if line.startswith("Corrected")] == [
        f"Corrected: {line}" for line in Ruler().corrections if line.startswith("every task")
    ]

    ran = []
    evaluate = runner._evaluate
    monkeypatch.setattr(
        runner, "_evaluate", lambda plan, method, *rest: [ran.append(method.name), evaluate(plan, method, *rest)][1]
    )
    assert cli.main([*command, "--window", "64", "--methods", *names[:4]]) == 0
    assert ran == ["streaming", "random:0.5"]  # what the window matters to
    note = f"Uneven: window is 64 with streaming and random:0.5, 32 with {names[3]}"
    assert f"{note}\n" in capsys.readouterr().out and note in (tmp_path / "out" / "summary.txt").read_text()
    assert next(iter(lines(tmp_path / "out" / "samples" / "streaming.ruler_vt.768.jsonl")))["sparse"]["window"] == 64


def noted(loaded):
    """`load_model` that writes down what it loaded."""
    load = runner.load_model

    def load_model(plan, method, factor):
        model, tokenizer = load(plan, method, factor)
        shape = architecture(model)
        loaded[method.name] = shape["model_type"], shape["num_layers"], sizes(elastic_config(model).sparse)
        return model, tokenizer

    return load_model


def test_unlike_models_are_refused_in_one_line(folder, tmp_path, capsys):
    other = tmp_path / "other"
    tiny_model().config.save_pretrained(other)
    own, shipped = f"elastic:{folder / 'small'}", f"elastic:{SHIPPED}"
    for options, parts in (
        ([own, shipped], (f"{folder / 'small'} is of backbone 'tiny'", f"{SHIPPED} of 'smollm2-135m'", "--backbone")),
        (
            [shipped, "--backbone", "tiny"],
            ("--backbone tiny has model_type=qwen3", f"{SHIPPED} is of", "'smollm2-135m'"),
        ),
        ([own, "--backbone", str(other)], (f"--backbone {other} has model_type=llama", "is of backbone 'tiny' with")),
        ([own, "--backbone", str(tmp_path / "none")], (f"no backbone '{tmp_path / 'none'}'",)),
        (
            ["streaming", own, f"elastic:{folder / 'wide'}"],
            ("has sink 4, window 32", "has sink 8, window 64", "--sink"),
        ),
    ):
        assert cli.main(["eval", "--out", str(tmp_path / "out"), "--methods", "dense", *options]) == 2
        error = capsys.readouterr().err
        assert all(part in error for part in parts) and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_the_backbone_by_another_name(folder, tmp_path):
    """A copy of the checkpoint's backbone may be named instead of it, also with more words; nothing else may differ."""
    own = methods("dense", f"elastic:{folder / 'small'}", f"elastic:{folder / 'wide'}")
    shutil.copytree(ASSETS / "tiny", copy := tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 2}))
    assert common_backbone(own, str(copy)) == str(copy)
    assert (common_backbone(own, None), common_backbone(own, "tiny")) == ("tiny", "tiny")
    assert common_backbone(methods("dense", "streaming"), None) == "smollm2-135m"
    (copy / "config.json").write_text(json.dumps({**config, "head_dim": 64}))
    with pytest.raises(ValueError, match=r"has head_dim=64, but checkpoint .* is of backbone 'tiny' with head_dim=32"):
        common_backbone(own, str(copy))
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(
        ValueError, match="of type 'gpt2' cannot be routed: its configuration has no num_key_value_heads"
    ):
        common_backbone(own, str(copy))


def test_sizes_are_those_asked_for_then_of_the_checkpoints_then_the_usual(folder):
    small, wide, xa = (f"elastic:{folder / name}" for name in ("small", "wide", "xa"))

    def found(*names, **asked):
        return tuple(sizes(common_sizes(methods(*names), {**NOT_ASKED, **asked})).values())

    assert found("dense", "streaming") == tuple(sizes(ALONE).values()) == (64, 256, 64, 16)
    assert found("streaming", window=128) == (64, 128, 64, 16)
    assert found("streaming", f"elastic:{SHIPPED}") == (128, 512, 128, 16)
    assert found("static:heads.tsv", wide) == (8, 64, 4, 16)
    assert found("streaming", small, sink=0) == (0, 32, 4, 16)
    assert found("random:0.5", small, wide, sink=8, window=16) == (8, 16, 4, 16)
    assert found("dense", small, wide)[1:3] == (32, 4)  # none is taken, so none is open
    assert found("xattention", xa, f"{xa}@1") == (128, 512, 16, 8)
    assert found("streaming", small, f"elastic/fa-xa:{folder / 'xa'}", block=4, stride=4) == (4, 32, 4, 4)
    with pytest.raises(
        ValueError, match=r"small has sink 4, window 32, .*wide has sink 8, window 64, .*--sink and --window"
    ):
        found("random:0.5", small, wide)
    with pytest.raises(ValueError, match=r"small has block 4, .*xa has block 16, .*give --block, or evaluate in two"):
        found("streaming", small, xa)
    with pytest.raises(ValueError, match=r"sparse.sink=3 is not a multiple of sparse.block=64"):
        found("streaming", sink=3)
    assert common_sizes(methods(wide), NOT_ASKED).granule == "block"
    assert common_sizes(methods(small, wide), NOT_ASKED).granule == "token"


def test_without_checkpoints_sizes_are_those_that_a_calibration_was_measured_with(folder, tmp_path):
    """Heads that the file calls needless are so with these."""

    def found(*names, **asked):
        return tuple(sizes(common_sizes(methods(*names), {**NOT_ASKED, **asked})).values())

    order = f"static:{SHIPPED.parent / 'smollm2-135m-order.json'}@0.6"
    assert found(order) == found("dense", "streaming", order, "static:heads.tsv") == (128, 512, 128, 16)
    assert found("streaming", order, window=256) == (128, 256, 128, 16)
    assert found(order, f"elastic:{folder / 'small'}") == (4, 32, 4, 16)
    other = tmp_path / "other.json"
    made(sparse=vars(SparseConfig(sink=256, window=512, block=128))).write(other)
    with pytest.raises(ValueError, match=rf"calibration .*order.json has sink 128, calibration {other} has sink 256"):
        found("streaming", order, f"static:{other}@0.5")


def test_calibrations_of_other_modes_are_refused_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "load_model", None)
    file, out = tmp_path / "cal.json", tmp_path / "out"
    made(sparse=vars(SparseConfig(route1="xattention"))).write(file)
    command = ["eval", "--backbone", "tiny", "--lengths", "64", "--methods", "dense", f"static:{file}@0.5"]
    assert cli.main([*command, "--out", str(out)]) == 2
    assert "of heads that choose between full and xattention, but here they choose betw" in capsys.readouterr().err
    assert not out.exists()


def test_routers_under_other_settings_are_measured_again(folder, tmp_path):
    """Their weights are the same."""
    place, out = shutil.copytree(folder / "small", tmp_path / "mine"), tmp_path / "out"
    command = ["eval", "--rows", f"own={build_data(tmp_path / 'data')}", "--tasks", "own", "--lengths", "128"]
    found = []
    for bias in (-1e4, 1e4):
        values = unsealed((place / METADATA).read_text())
        values["config"]["sparsity_bias"] = bias
        (place / METADATA).write_text(sealed(values))
        assert cli.main([*command, "--limit", "2", "--methods", f"elastic:{place}", "--out", str(out)]) == 0
        found.append({row["msr"] for row in json.loads((out / "summary.json").read_text())})
    assert found == [{0.0}, {1.0}]


def test_differences_are_told(folder):
    small, wide, xa = (f"elastic:{folder / name}" for name in ("small", "wide", "xa"))
    own = common_sizes(methods(small), NOT_ASKED)
    assert uneven(methods("dense", "streaming", "random:0.5", small, f"{small}@1"), own) == []
    assert uneven(methods("dense", small, wide), own) == [
        f"sink is 4 with {small}, 8 with {wide}",
        f"window is 32 with {small}, 64 with {wide}",
    ]
    assert uneven(methods("streaming", xa), own) == [f"block is 4 with streaming, 16 with {xa}"]
    with pytest.raises(ValueError, match=r"sparse.stride=16 does not divide sparse.block=4"):
        uneven(methods("xattention", small), own)  # before anything runs


def test_all_methods_are_told_what_the_checkpoints_were_told(folder, tmp_path, monkeypatch):
    model = attach(load_backbone("tiny")[0])
    told = {"thinking": {"enable_thinking": True}, "default": None, "dated": {"date_string": "1 May"}}
    for name, kwargs in told.items():
        save_elastic(tmp_path / name, model, "tiny", chat_template_kwargs=kwargs)
    thinking, default, dated = (f"elastic:{tmp_path / name}" for name in told)
    off = {"enable_thinking": False}
    assert common_template(methods("dense")) == common_template(methods("dense", default)) == off
    assert common_template(methods(thinking, "dense")) == {"enable_thinking": True}
    assert common_template(methods(dated)) == {**off, "date_string": "1 May"}
    earlier = unsealed((tmp_path / "default" / "elastic.json").read_text())
    del earlier["chat_template_kwargs"]
    (tmp_path / "default" / "elastic.json").write_text(json.dumps(earlier))
    assert common_template(methods(default, "dense")) == off  # as evaluation was before
    with pytest.raises(ValueError, match=r"thinking was trained with chat_template_kwargs .*True.*in two commands"):
        common_template(methods(thinking, default))
    asked, sparse = ((Ruler(), "ruler_vt"),), SparseConfig(sink=4, window=32, block=4)
    told = {"enable_thinking": True}
    plans = [
        runner.EvaluationPlan(
            "tiny", "cpu", "float32", asked, (1024,), 1, 1, chat, sparse, 0, {"enable_thinking": True}
        )
        for chat in (True, False)
    ]
    for method in methods("dense", thinking):
        assert runner.load_model(plans[0], method)[1].chat_template_kwargs == {"enable_thinking": True}
        (cell,) = plans[0].cells()
        named = [runner._origin(plan, method, cell).get("chat_template_kwargs") for plan in plans]
        assert named == [{"enable_thinking": True}, None]


def test_a_record_of_another_backbone_or_window_is_not_taken_up(folder, tmp_path):
    """As they were written before, for any checkpoint: SmolLM2, sink 64, window 256."""
    plan = runner.EvaluationPlan(
        "tiny",
        "cpu",
        "float32",
        ((Ruler(), "ruler_vt"),),
        (768,),
        1,
        1,
        False,
        SparseConfig(sink=4, window=32, block=4),
        0,
    )
    file, old = tmp_path / "result.jsonl", {"sink": 64, "window": 256, "block": 64}
    for name, backbone, sparse, same in (
        (f"elastic:{folder / 'small'}", "tiny", {}, True),
        (f"elastic:{folder / 'small'}", "smollm2-135m", {}, False),
        (f"elastic:{folder / 'small'}", "tiny", old, False),
        ("streaming", "tiny", old, False),
        ("dense", "tiny", old, True),
        ("dense", "smollm2-135m", old, False),
    ):
        origin = runner._origin(plan, parse_method(name), plan.cells()[0])
        first = {**origin, "backbone": backbone, "sparse": {**origin["sparse"], **sparse}, "count": 1}
        file.write_text("".join(json.dumps(line) + "\n" for line in (first, {"score": 1.0})))
        assert (runner._read(file, origin) == [{"score": 1.0}]) == same, (name, backbone, sparse)
    origin = runner._origin(plan, parse_method(f"elastic:{folder / 'small'}"), plan.cells()[0])
    changed = (
        {"sparsity_bias": 3.0},
        {"dense_decode": True},
        {"router": {**origin["routers"]["router"], "caution": 1.0}},
    )
    for other, same in (({}, True), *((one, False) for one in changed), (None, True)):
        first = {**origin, "routers": {**origin["routers"], **(other or {})}, "count": 1}
        if other is None:  # from before it was written down
            del first["routers"]
        file.write_text("".join(json.dumps(line) + "\n" for line in (first, {"score": 1.0})))
        assert (runner._read(file, origin) == [{"score": 1.0}]) == same, other
    modes = runner._origin(plan, parse_method(f"elastic:{folder / 'xa'}"), plan.cells()[0])["sparse"]
    assert (modes["route1"], modes["stride"], modes["window"]) == ("xattention", 8, 512)


def test_corrections_are_those_of_the_tasks():
    ruler, paper, longbench = Ruler(), Ruler(paper=True), LongBench(E, None)

    def subjects(benchmark, *tasks):
        return [line.split(":")[0] for line in corrections_of(benchmark, tasks)]

    assert subjects(ruler, "ruler_vt", "niah_single_1") == subjects(paper, "ruler_vt") == ["every task"]
    assert subjects(ruler, "ruler_qa_squad", "ruler_cwe") == ["every task", "ruler_cwe", "ruler_qa_*"]
    assert corrections_of(ruler, ruler.tasks()) == list(ruler.corrections)
    assert corrections_of(longbench, longbench.tasks()) == list(longbench.corrections)
    told = corrections_of(longbench, ["longbench_trec_e"])
    assert len(told) == 1 + 1 + 2 and "all 13 sets" in told[0] and told[1].startswith("longbench_trec_e: ")
    assert len(corrections_of(longbench, ["longbench_qasper_e"])) == 1 + 2
