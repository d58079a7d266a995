"""`elastic eval`: methods by name, several in one command that resumes, results as tables, pictures and records."""

import json

import pytest
import torch

from elastic import cli
from elastic.bench.records import load_folder
from elastic.bench.tables import markdown
from elastic.model.attach import attach
from elastic.model.checkpoint import save_elastic
from elastic.model.loading import load_backbone
from elastic.training.intervals import wilson
from tests.helpers.models import small_config

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("wonderwords", reason="the extra `eval` is not installed")
from elastic.config import ElasticConfig, SparseConfig
from elastic.evaluation import ruler, ruler_samples, runner, scores, summary
from elastic.routing.methods import parse_method, parse_methods
from tests.bench import evaluation as collect


def test_one_command_compares_methods_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ruler_samples.NEW_TOKENS, "ruler_fwe", 4)
    model, words = load_backbone("tiny")
    model.config.max_position_embeddings = 2048
    monkeypatch.setattr(runner, "load_model", lambda *_: (attach(model, small_config()), words))
    plan = runner.EvaluationPlan(
        "tiny",
        "cpu",
        "float32",
        ((ruler.Ruler(), "ruler_fwe"),),
        (1024,),
        2,
        2,
        False,
        SparseConfig(sink=4, window=16, block=4, stride=4),
        0,
    )
    methods = [parse_method(name) for name in ("dense", "streaming", "xattention:0.5", "xattention")]
    rows = runner.run(plan, methods, tmp_path / "out")
    assert [(r["method"], r["n"], r["msr"]) for r in rows[:2]] == [("dense", 2, 0), ("streaming", 2, 1)]
    assert rows[0]["esr_all"] == 0 < rows[3]["esr_all"] < rows[2]["esr_all"] < 1
    file = tmp_path / "out" / "samples" / "dense.ruler_fwe.1024.jsonl"
    origin, *samples = map(json.loads, file.read_text().splitlines())
    assert origin["seed"] == 0 and set(samples[0]) >= {"prediction", "references", "score", "msr", "esr_last", "tokens"}
    monkeypatch.setattr(runner, "_evaluate", lambda *_: pytest.fail("a finished result was made again"))
    assert runner.run(plan, methods, tmp_path / "out") == rows
    assert "mean of tasks" in summary.summary_table(rows) and "±" in summary.summary_table(rows)
    assert all(path.stat().st_size > 5000 for path in summary.write_summary(rows, tmp_path / "out"))
    stored = json.loads((tmp_path / "out" / "samples" / "xattention_0.5.ruler_fwe.1024.jsonl").open().readline())
    assert (stored["sparse"]["route1"], stored["sparse"]["threshold"]) == ("xattention", 0.5)
    with pytest.raises(ValueError, match="would share files; name each once"):
        runner.run(plan, [methods[0]] * 2, tmp_path / "out")
    collected_as_records(tmp_path / "out", tmp_path / "records", rows)


def collected_as_records(out, folder, rows):
    """The results in `out` as records that `elastic bench table` reads, and as pictures."""
    options = [str(out), "--out", str(folder), "--gpu", "a GPU", "--commit", "abc"]
    assert collect.main([*options, "--names", "xattention=XA"]) == 0
    assert collect.main([*options, "--tag", "sweep", "--methods", "dense", "streaming"]) == 0
    assert all((folder / name).stat().st_size > 5000 for name in ("ruler.png", "sweep.png"))
    runs = load_folder(folder)
    assert {r["who"] for r in runs["ruler"]} == {"dense", "streaming", "xattention:0.5", "XA"}
    assert {r["who"] for r in runs["sweep"]} == {"dense", "streaming"}
    dense = next(r for r in runs["ruler"] if r["who"] == "dense")
    assert (dense["case"], dense["n"]) == ("ruler_fwe@1024", 2)
    assert dense["value"] == pytest.approx(rows[0]["score"], rel=1e-4)
    assert dense["versions"].keys() == {"elastic-attention", "lm_eval", "torch", "transformers"}
    page = markdown(runs, ["results/ruler.png"])
    assert "| task | length | n | dense" in page and "mean of 1 tasks" in page
    assert "(results/ruler.png)" in page
    with pytest.raises(ValueError, match="holds no results; run `elastic eval --out"):
        scores.read_rows(folder)


def test_routers_of_a_checkpoint_run_between_other_modes_at_another_bias(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ruler_samples.NEW_TOKENS, "ruler_fwe", 4)
    model, words = load_backbone("tiny")
    model.config.max_position_embeddings = 2048
    own = SparseConfig(sink=4, window=16, block=4, stride=4)
    attach(model, ElasticConfig(sparse=own, sparsity_bias=-100.0))
    checkpoint = save_elastic(tmp_path / "fa-xa", model, "tiny")
    monkeypatch.setattr(runner, "load_model", lambda *_: (model.eval(), words))
    asked = ((ruler.Ruler(), "ruler_fwe"),)
    plan = runner.EvaluationPlan("tiny", "cpu", "float32", asked, (1024,), 1, 1, False, SparseConfig(), 0)
    names = [f"elastic{rest}" for rest in (f":{checkpoint}", f":{checkpoint}@100", f"/fa-xa:{checkpoint}@100")]
    mine, sparse, xattention = runner.run(plan, parse_methods(names, of_run=False), tmp_path / "out")
    assert [row["method"] for row in (mine, sparse, xattention)] == names
    assert [row["msr"] for row in (mine, sparse, xattention)] == [0, 1, 1]
    assert mine["esr_all"] == 0 < xattention["esr_all"] != sparse["esr_all"] > 0


def test_rivals_that_choose_blocks_run_by_name(tmp_path, monkeypatch):
    """Through the parser, on the sizes of the command; a file from before their settings is taken up again."""
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ruler_samples.NEW_TOKENS, "ruler_fwe", 4)
    model, words = load_backbone("tiny")
    model.config.max_position_embeddings = 2048
    monkeypatch.setattr(runner, "load_model", lambda *_: (attach(model, small_config()), words))
    sizes, asked = SparseConfig(sink=8, window=16, block=8, stride=4), ((ruler.Ruler(), "ruler_fwe"),)
    plan = runner.EvaluationPlan("tiny", "cpu", "float32", asked, (1024,), 1, 1, False, sizes, 0)
    names = ["moba:3:64", "nsa", "infllm:8", "flexprefill:0.9:64", "flashprefill:0.12", "xattention:0.5"]
    rows = runner.run(plan, parse_methods(names, of_run=False), tmp_path / "out")
    assert [(row["method"], row["msr"]) for row in rows] == [(name, 1) for name in names]
    assert all(0 < row["esr_all"] < 1 for row in rows)
    file = tmp_path / "out" / "samples" / "xattention_0.5.ruler_fwe.1024.jsonl"
    origin, *samples = map(json.loads, file.read_text().splitlines())
    for later in ("top_k", "chunk", "min_budget"):
        del origin["sparse"][later]
    file.write_text("".join(json.dumps(line) + "\n" for line in (origin, *samples)))
    monkeypatch.setattr(runner, "_evaluate", lambda *_: pytest.fail("a finished result was made again"))
    assert runner.run(plan, parse_methods(names, of_run=False), tmp_path / "out") == rows


def test_random_heads_are_those_of_the_name(tmp_path):
    """A result of before is taken up where the seed of its samples drew the heads that the name means now."""
    asked, file = ((ruler.Ruler(), "ruler_fwe"),), tmp_path / "result.jsonl"
    for seed, name, same in ((0, "random:0.5", True), (7, "random:0.5", False), (7, "random:0.5:7", True)):
        plan = runner.EvaluationPlan("tiny", "cpu", "float32", asked, (1024,), 1, 1, False, SparseConfig(), seed)
        facts = runner._origin(plan, parse_method(name), plan.cells()[0])
        before = {key: value for key, value in facts.items() if key != "random_seed"}
        for first, found in ((facts, True), (before, same)):
            file.write_text("".join(json.dumps(line) + "\n" for line in ({**first, "count": 1}, {"score": 1.0})))
            assert (runner._read(file, facts) == [{"score": 1.0}]) == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("elastic", "method 'elastic' names no checkpoint"),
        ("elastic:-2", "write elastic@-2"),
        ("elastic:absent", "absent does not exist"),
        ("sparse", "method 'sparse' is not known"),
    ],
)
def test_methods_that_cannot_be_are_refused_before_anything_runs(name, message, capsys):
    assert cli.main(["eval", "--methods", "dense", name]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_too_large_a_batch_is_named(tmp_path, monkeypatch):
    import lm_eval

    def overrun(**_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lm_eval, "evaluate", overrun)
    model, words = load_backbone("tiny")
    model.config.max_position_embeddings = 2048
    monkeypatch.setattr(runner, "load_model", lambda *_: (attach(model, small_config()), words))
    sparse = SparseConfig(sink=4, window=16, block=4, stride=4)
    asked = ((ruler.Ruler(), "ruler_fwe"),)
    plan = runner.EvaluationPlan("tiny", "cpu", "float32", asked, (1024,), 1, 2, False, sparse, 0)
    with pytest.raises(ValueError, match=r"ruler_fwe@1024 ran out of the memory of cpu with --batch-size 2"):
        runner.run(plan, [parse_method("dense")], tmp_path / "out")


def test_tasks_that_fit_into_a_batch_are_evaluated_together(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    for task in ("ruler_fwe", "ruler_vt"):
        monkeypatch.setitem(ruler_samples.NEW_TOKENS, task, 4)
    model, words = load_backbone("tiny")
    model.config.max_position_embeddings = 2048
    loaded = attach(model, small_config())
    monkeypatch.setattr(runner, "load_model", lambda *_: (loaded, words))
    family, sparse = ruler.Ruler(), SparseConfig(sink=4, window=16, block=4, stride=4)
    asked = ((family, "ruler_fwe"), (family, "ruler_vt"))

    def plan(batch):
        return runner.EvaluationPlan("tiny", "cpu", "float32", asked, (1024, 1536), 1, batch, False, sparse, 0)

    assert [[c.label for c in cells] for cells in plan(3).batches()] == [
        ["ruler_fwe@1024", "ruler_vt@1024"],
        ["ruler_fwe@1536", "ruler_vt@1536"],
    ]
    assert [len(cells) for cells in plan(1).batches()] == [1, 1, 1, 1]
    streaming = [parse_method("streaming")]
    together = runner.run(plan(2), streaming, tmp_path / "together")
    apart = runner.run(plan(1), streaming, tmp_path / "apart")
    assert [(r["task"], r["length"], r["score"]) for r in together] == [
        (r["task"], r["length"], r["score"])
        for r in sorted(apart, key=lambda r: (r["length"], r["task"] == "ruler_vt"))
    ]
    for file in (tmp_path / "together" / "samples").iterdir():
        one, other = (
            [json.loads(line)["prediction"] for line in (tmp_path / out / "samples" / file.name).open().readlines()[1:]]
            for out in ("together", "apart")
        )
        assert one == other and one


def test_intervals_and_means():
    rows = [{"score": s} for s in (0.0, 1.0, 1.0, 0.0)]
    assert scores.interval(rows) == pytest.approx(0.5 - wilson(0.5, 4)[0], abs=0.01)
    assert scores.interval(rows[:1]) > 0.7  # a single sample says little
    assert scores.interval([{"score": 1.0}] * 2) > 0.6
    rows = [{"score": 1.0, "n": 1, "half_width": 0.3}, {"score": 0.0, "n": 3, "half_width": 0.4}]
    assert summary.mean(rows) == {"score": 0.5, "half_width": pytest.approx(0.25), "n": 4}
    weighted = summary.mean(rows, by_samples=True)
    assert weighted == {"score": 0.25, "half_width": pytest.approx((0.075**2 + 0.3**2) ** 0.5), "n": 4}
