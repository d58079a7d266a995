"""The routing study: its figures from files, the bounds of equal quality, and the driver that makes the files."""

import json
from dataclasses import replace

import pytest
import torch

from elastic import cli
from elastic.bench.drawing import figures
from elastic.bench.records import load
from elastic.bench.studies.routing import equal_quality, headlines, lead
from elastic.bench.studies.runs import Point, by_bias, points_of, read_study, score_of, slack
from elastic.config import ElasticConfig
from elastic.data.source_names import kind_of
from elastic.data.tasks import TASKS
from elastic.model.attach import attach
from elastic.model.checkpoint import read_elastic, save_elastic
from elastic.routing.router import STEEPNESS
from elastic.training.paired import over_seeds
from tests.bench import ship
from tests.bench.routing_plans import NEED, NEED_AT
from tests.helpers.models import tiny_model

STAMP = {"gpu": "cpu", "kernel": "torch", "versions": {"torch": "0"}, "commit": "abc", "command": "by hand"}
SOURCES = ("needle_single-1024", "needle_single-2048", "verbatim_copy", "many_shot", "continuation")
# The names that files had before `elastic@-2`; they stay readable.
WORSE = {"elastic:-2": 0.0, "elastic": 0.02, "elastic:2": 0.1}  # loss of retrieval, rise of loss
MSR = {"elastic:-2": 0.3, "elastic": 0.6, "elastic:2": 0.9}


def results(kind, baselines=(), worse_of=WORSE, points=tuple(WORSE)):
    """A results file whose figures follow from `worse_of` and MSR."""
    methods = [*points, *baselines]

    def row(source):
        found = {"n": 100}
        for method in methods:
            worse = worse_of.get(method, 0.0)
            for score in ("exact", "accuracy", "loss"):
                found[f"{method}_{score}"] = 2.0 * (1 + worse) if score == "loss" else 0.8 * (1 - worse)
                found[f"{method}_{score}_95"] = 0.05
            prefix = "" if method == "elastic" else f"{method}_"
            found |= {f"{prefix}{ratio}": MSR.get(method, 1.0) for ratio in ("msr", "esr_last", "esr_all")}
        return found

    tasks = {task: row(task) for task in TASKS}
    tasks["code"]["msr"] = 0.9  # of the three robust tasks, at bias 0
    share = [[0.0, 0.5], [1.0, 0.25]]
    return {
        "methods": methods,
        "elastic": {"router": {"kind": kind}},
        "routes": dict.fromkeys(TASKS, share),
        "tasks": tasks,
        "sources": {source: row(source) for source in SOURCES},
    }


def write_run(folder, kind, seed, baselines=(), tested=True):
    folder.mkdir(parents=True)
    better = {method: worse / 4 for method, worse in WORSE.items()}  # the validation rows need not say the same
    (folder / "results_validation.json").write_text(json.dumps(results(kind, ("dense",), better)))
    if tested:
        (folder / "results_test.json").write_text(json.dumps(results(kind, baselines, points=("elastic",))))
    recipe = {"objective": {"kind": "quality"}, "seed": seed, "step": 300}
    (folder / "elastic.json").write_text(json.dumps({"recipe": recipe}))
    header = "step,train/loss,train/msr/code,train/kl/code,train/l/code,val/x"
    (folder / "metrics.csv").write_text(f"{header}\n1,0.5,0.5,0.02,0.0,\n2,,,,,1\n2,0.4,0.6,0.03,0.1,\n")


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "study"
    for seed in (0, 1, 2):
        write_run(folder / f"elastic-{seed}", "input", seed, ("dense", "streaming") if seed == 0 else ())
    write_run(folder / "static-0", "static", 0, tested=False)
    (folder / "unfinished").mkdir()
    (folder / "stamp.json").write_text(json.dumps(STAMP))
    return folder


def test_a_study_is_read_back(study):
    found = read_study(study)
    assert [(run.name, run.router, run.seed) for run in found.runs] == [
        *((f"elastic-{seed}", "elastic", seed) for seed in (0, 1, 2)),
        ("static-0", "static", 0),
    ]
    run = found.runs[0]
    assert [point.bias for point in run.points] == [-2, 0, 2] and run.at(0).method == "elastic" and run.at(1) is None
    assert set(found.baselines) == {"dense", "streaming"} and found.dense.mean_msr == run.dense.mean_msr == 0
    assert run.at(0).mean_msr == pytest.approx((4 * 0.6 + 0.9) / 5)
    assert run.at(0).retrieval()[0] == pytest.approx(0.8 * 0.995)  # two needles and a copy; many_shot is none
    assert run.at(0).retrieval()[1] == pytest.approx(0.05 / 3**0.5)
    assert run.tested.retrieval()[0] == pytest.approx(0.8 * 0.98) and found.runs[3].tested is None
    assert run.curves()["msr/code"] == [(1, 0.5), (2, 0.6)]
    assert [score_of(source) for source in SOURCES] == ["exact", "exact", "accuracy", "exact", "loss"]


def test_equal_quality_lies_between_the_points_around_the_bound(study):
    found = read_study(study)
    points, dense = found.runs[1].points, found.runs[1].dense
    assert [round(slack(point, dense), 3) for point in points] == [1.0, 0.75, -0.25]
    assert equal_quality(points[::2], dense) == (pytest.approx(0.3 + 0.6 * 4 / 5), False)  # four fifths of the way
    assert equal_quality(points[:1], dense) == (pytest.approx(0.3), True)  # never left: the last point
    assert equal_quality(points[2:], dense) == (None, False)


def test_the_validation_rows_choose_the_operating_point(study):
    assert read_study(study).runs[1].chosen_bias == 0.0 and read_study(study).runs[1].tested.mean_msr > 0.6
    path = study / "elastic-1" / "results_validation.json"
    lucky = {"elastic": 0.015, "elastic:2": 0.1}  # bias 0 is of equal quality, with less than the margin
    for worse, bias in (({}, 2.0), (lucky, -2.0), (dict.fromkeys(WORSE, 0.5), -2.0)):
        path.write_text(json.dumps(results("input", ("dense",), worse)))
        assert read_study(study).runs[1].chosen_bias == bias
    with pytest.raises(ValueError, match="lacks bias -2, which the validation rows chose; remove it"):
        _ = read_study(study).runs[1].tested


def test_every_source_has_its_own_bound(study):
    """A rise of one text source is not hidden by another's fall, nor lost many-shot answers by retrieval."""
    found = results("input", ("dense",), dict.fromkeys(WORSE, 0.0))
    found["sources"]["summary"] = dict(found["sources"]["continuation"])
    dense = points_of(found)[-1]
    assert slack(by_bias(found)[1], dense) == pytest.approx(1.0)

    def judged(source, score, factor):
        changed = json.loads(json.dumps(found))
        changed["sources"][source][f"elastic_{score}"] *= factor
        return slack(by_bias(changed)[1], points_of(changed)[-1])

    assert judged("continuation", "loss", 1.01) == pytest.approx(0.5)
    assert judged("summary", "loss", 0.9) == pytest.approx(1.0)
    up_and_down = json.loads(json.dumps(found))
    for source, factor in (("continuation", 1.03), ("summary", 0.97)):  # the mean is that of dense
        up_and_down["sources"][source]["elastic_loss"] *= factor
    assert slack(by_bias(up_and_down)[1], points_of(up_and_down)[-1]) == pytest.approx(-0.5)
    assert judged("many_shot", "exact", 0.96) == pytest.approx(-1 / 3)
    assert judged("many_shot", "accuracy", 0.5) == pytest.approx(1.0)  # not what it is judged by
    assert judged("verbatim_copy", "exact", 0.97) == pytest.approx((0.99 - 0.97) / 0.03)  # one of three in retrieval
    assert judged("verbatim_copy", "accuracy", 0.5) == pytest.approx(1.0)
    found["sources"]["pass key"] = found["sources"]["verbatim_copy"]
    with pytest.raises(ValueError, match="source 'pass key' is of no task class that its results tell"):
        slack(by_bias(found)[1], points_of(found)[-1])
    found["source_tasks"] = {"pass key": "single_qa"}
    assert slack(by_bias(found)[1], points_of(found)[-1]) == pytest.approx(1.0)


def test_data_without_some_kinds_of_sources_are_judged_by_the_others():
    found = results("input", ("dense",), dict.fromkeys(WORSE, 0.0))
    found["sources"] = {
        "foreign_pass_key-1024": found["sources"]["verbatim_copy"],
        "foreign_code": found["sources"]["continuation"],
    }
    point, dense = by_bias(found)[1], points_of(found)[-1]
    assert set(point.measures()) == {"retrieval", "text loss"} and slack(point, dense) == pytest.approx(1.0)
    assert {"needles of dense", "in-context of dense"}.isdisjoint(headlines(point, dense))


def test_a_lead_is_a_difference_of_msr_at_equal_quality(study):
    def judged(router, worse):
        kind = "static" if router == "static" else "input"
        path = study / f"{router}-0" / "results_validation.json"
        path.write_text(json.dumps(results(kind, ("dense",), worse)))
        return next(run for run in read_study(study).runs if run.name == f"{router}-0")

    fine, lost, some = dict.fromkeys(WORSE, 0.0), dict.fromkeys(WORSE, 0.5), {"elastic": 0.005, "elastic:2": 0.025}
    ours, rival = judged("elastic", some), judged("static", {"elastic:2": 0.03})
    at = [equal_quality(run.points, run.dense)[0] for run in (ours, rival)]
    assert at == pytest.approx([0.66 + 0.24 * 3 / 4, 0.66 + 0.24 * 2 / 3])
    assert lead(ours, rival) == (pytest.approx(at[0] - at[1]), False)
    assert lead(judged("elastic", fine), rival) == (pytest.approx(0.9 - at[1]), True)  # our sparsest is good still
    assert lead(ours, judged("static", fine)) == lead(judged("elastic", lost), rival) == (None, False)


def test_intervals_over_seeds():
    assert over_seeds([0.5]) == (0.5, None)
    mean, half = over_seeds([0.1, 0.2, 0.3])
    assert (mean, half) == (pytest.approx(0.2), pytest.approx(4.303 * 0.1 / 3**0.5))
    with pytest.raises(ValueError, match="11 seeds; quantiles are known for up to 10"):
        over_seeds([0.0] * 11)


def test_the_command_writes_records_pictures_and_the_table(study, tmp_path, capsys):
    out = tmp_path / "bench"
    assert cli.main(["bench", "routing", str(study), "--out", str(out), "--main", "elastic-1"]) == 0
    assert "elastic, quality" in capsys.readouterr().out
    records = load(out / "routing.json")
    assert {file.name for file in out.iterdir()} == {
        "routing.json",
        "routing.png",
        "routing-curves.png",
        "routing-heads.png",
    }
    headline = {(r["who"], r["metric"]): r for r in records if r["case"] == "headline"}
    kept = headline["elastic, quality", "retrieval of dense"]
    assert kept["value"] == pytest.approx(0.98) and kept["half"] == 0 and kept["seeds"] == [0, 1, 2]
    apart = [headline["elastic, quality", f"MSR {part}"]["value"] for part in ("robust", "sensitive")]
    assert apart == pytest.approx([0.7, 0.6])
    assert headline["elastic, quality", "worst text loss of dense"]["value"] == pytest.approx(1.02)
    assert headline["elastic, quality", "in-context of dense"]["value"] == pytest.approx(0.98)
    assert headline["elastic, quality", "mean MSR"]["biases"] == [0, 0, 0]
    equal = headline["static, quality", "MSR at equal quality"]  # the validation rows say it; the test rows are to come
    assert equal["value"] == pytest.approx(0.66 + 0.24 * 3 / 4, rel=1e-4) and equal["half"] is None
    lead = headline["elastic - static, quality", "MSR at equal quality"]
    assert lead["value"] == lead["by_seed"][0] == pytest.approx(0.0) and lead["seeds"] == [0] and not lead["at_least"]
    assert ("static, quality", "mean MSR") not in headline
    curve = {(r["who"], r["bias"], r["metric"]): r for r in records if r["case"] == "curve"}
    assert curve["elastic, quality", -2, "mean MSR"]["value"] == pytest.approx(0.3) and len(curve) == 2 * 3 * 9
    needle = [r for r in records if r["case"] == "needle_single-1024"]
    assert {r["who"] for r in needle} == {"dense", "streaming", "elastic-0", "elastic-1", "elastic-2"}
    assert all(r["n"] == 100 and r["half"] == 0.05 for r in needle)
    assert len([r for r in records if r["case"] == "point" and r["metric"] == "needles"]) == 2 + 4 * 3
    assert cli.main(["bench", "table", str(out), "--out", str(tmp_path / "RESULTS.md")]) == 0
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| continuation | loss | 100 | 2.000 ± 0.050 | 2.000 ± 0.050 @ 1.00 | 2.040 ± 0.050 @ 0.60 |" in page
    assert "| static, quality | 1 | 300 | 0.840 | 0 |  |  |" in page and "| static, quality | -2 | 1.000 |" in page
    assert all(f"](bench/routing{part}.png)" in page for part in ("", "-curves", "-heads"))


def test_the_records_alone_draw_the_pictures(study, tmp_path):
    assert cli.main(["bench", "routing", str(study), "--out", str(tmp_path), "--main", "elastic-1"]) == 0
    found = load(tmp_path / "routing.json")
    training = {r["metric"]: r for r in found if r["case"] == "training"}
    assert list(training) == ["loss", "kl/code", "msr/code", "l/code"]
    assert training["msr/code"]["steps"] == [1, 2] and training["msr/code"]["values"] == [0.5, 0.6]
    assert (training["kl/code"]["who"], training["kl/code"]["value"], training["l/code"]["unit"]) == (
        "elastic-1",
        0.03,
        "",
    )
    heads = {r["task"]: r for r in found if r["case"] == "heads"}
    assert set(heads) == set(TASKS) and heads["code"]["by_layer"] == [[0.0, 0.5], [1.0, 0.25]]
    assert heads["code"]["value"] == 0.4375
    made = figures(found)
    assert set(made) == {"", "-curves", "-heads"}
    quality, _, text = (axis for axis in made[""].axes)
    lines = {line.get_label(): line.get_xydata().tolist() for line in quality.lines if line.get_label()[0] != "_"}
    assert quality.get_title() == "retrieval, quality objective" and text.get_title() == "text loss, quality objective"
    assert set(lines) == {"elastic", "static", "dense", "streaming"} and lines["dense"] == [[0.0, 1.0]]
    assert lines["static"][0] == pytest.approx([0.3, 1.0]) and lines["elastic"][2] == pytest.approx([0.9, 0.975])
    titles = [axis.get_title() for axis in made["-curves"].axes]
    assert titles == ["loss", "divergence from dense, nats", "MSR by task", "multiplier by task"]
    assert "-curves" not in figures([r for r in found if r["case"] not in ("training", "heads")])  # older records


def test_studies_that_say_nothing_are_refused(study, tmp_path, capsys):
    assert cli.main(["bench", "routing", str(study), "--out", str(tmp_path), "--main", "nobody"]) == 2
    assert "no run 'nobody'; it has elastic-0" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no study at"):
        read_study(tmp_path)
    for name in ("results_test.json", "metrics.csv"):
        (study / "elastic-0" / name).unlink()
    with pytest.raises(ValueError, match="holds 3 finished runs, none tested beside the dense model"):
        read_study(study)


def test_operating_points_read_their_own_columns():
    row = {"msr": 0.5, "elastic:-1_msr": 0.2, "elastic@2_msr": 0.7, "dense_loss": 1.0, "dense_loss_95": 0.1}
    points = [Point(method, {}, {"code": row}) for method in ("dense", "elastic", "elastic:-1", "elastic@2")]
    assert [point.mean_msr for point in points] == [0.0, 0.5, 0.2, 0.7]
    assert [point.bias for point in points] == [0, 0, -1, 2] and [point.is_elastic for point in points[:2]] == [0, 1]


def test_the_foreign_set_has_no_part_in_choosing(study):
    """Its rows are reported at the point that the rows of the training's kind chose."""
    folder = study / "elastic-1" / "foreign"
    folder.mkdir()
    worse = {"elastic": 0.1, "elastic:2": 0.1}  # chosen by itself, the set would take bias -2
    (folder / "results_validation.json").write_text(json.dumps(results("input", ("dense",), worse)))
    (folder / "results_test.json").write_text(json.dumps(results("input", ("dense",))))
    own = next(run for run in read_study(study).runs if run.name == "elastic-1")
    (found,) = read_study(study, "foreign").runs
    assert own.chosen_bias == found.chosen_bias == found.tested.bias == 0.0 and found.name == "elastic-1"
    assert replace(found, choosing=None).chosen_bias == -2.0


def test_lengths_and_system_prompts_of_a_text_are_bound_together():
    found = results("input", ("dense",), dict.fromkeys(WORSE, 0.0))
    row = found["sources"]["continuation"]
    names = [f"foreign_code-{length}-{system}" for length in (1024, 2048) for system in ("none", "long")]
    found["sources"] = {"foreign_needle-1024-none": found["sources"]["verbatim_copy"]}
    found["sources"] |= {name: dict(row) for name in names}
    found["sources"][names[0]]["elastic_loss"] *= 1.04  # beyond the bound alone, at half of it together
    assert slack(by_bias(found)[1], points_of(found)[-1]) == pytest.approx(0.5)
    assert [kind_of(name) for name in ("code_completion", "needle_single-1024", "my-texts")] == [
        *("code_completion", "needle_single", "my-texts")
    ]


def test_points_of_the_order_are_the_shares_that_they_are_named_for():
    heads = 90
    place = (torch.arange(heads) + 0.5) / heads
    shares = [int((STEEPNESS * (NEED_AT - place) + bias > 0).sum()) for bias in sorted([0, *NEED])]
    assert shares == [45, 54, 63, 68, 72]


def test_the_shipped_checkpoint_stands_at_the_chosen_point(study, tmp_path):
    source = study / "elastic-1" / "checkpoint"
    model = tiny_model()
    attach(model, ElasticConfig())
    save_elastic(source, model, "tiny", recipe={"step": 300})
    words = [str(study), "elastic-1", str(tmp_path / "shipped")]
    assert ship.main(words) == 0 and ship.main(words) == 0  # over what is there
    found = read_elastic(tmp_path / "shipped")
    assert found["config"]["sparsity_bias"] == 0 and found["recipe"]["commit"] == "abc"
    assert found["metrics"]["retrieval of dense"] == pytest.approx(0.98)
    assert found["metrics"]["rows"].startswith("500 samples of the test split")
    with pytest.raises(SystemExit, match=r"static-0 has no results_test\.json yet"):
        ship.main([words[0], "static-0", words[2]])
    (source.parent / "foreign").mkdir()
    (source.parent / "foreign" / "results_validation.json").write_text(json.dumps(results("input", ("dense",))))
    with pytest.raises(SystemExit, match="no test results on the foreign set"):
        ship.main(words)
