"""The drivers that make the files of a study: they run small, resume, and leave what the tables are made of."""

import json
import os
import subprocess
import sys

import pytest

from data_prep.mixture_config import Mixture, Source
from data_prep.pack_mixture import pack_mixture
from elastic import cli
from elastic.bench.records import load
from elastic.bench.studies.ablation import records
from elastic.bench.studies.runs import read_study
from elastic.data.shards import SPLITS
from tests.bench import ablation, routing
from tests.bench.routing_plans import KINDS
from tests.bench.test_study import STAMP, results
from tests.helpers.forked import forked_command
from tests.helpers.training import ROOT, command_environment

SMALL_RUN = [
    *(f"--model.{flag}" for flag in ("backbone=tiny", "dtype=float32", "elastic.sparse.sink=4")),
    *(f"--model.elastic.sparse.{flag}" for flag in ("window=16", "block=4")),
    *("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--data.rows_per_step=2", "--data.micro_batch_rows=2"),
    "--data.num_workers=0",
]


SMALL_CALIBRATION = "--backbone tiny --dtype float32 --sink 4 --window 16 --block 4 --samples 12 --level-samples 24"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with data for both drivers."""
    folder = tmp_path_factory.mktemp("packed")
    own = {name: Source(1.0) for name in ("needle_single", "continuation", "many_shot")}
    drawn = {"needle-128-none": "needle_single", "last_paragraph-128-long": "needle_multi_key"}
    drawn |= {f"code-{length}-none": "continuation" for length in (128, 256)}  # names that the set has
    foreign = {f"foreign_{name}": Source(1.0, generator=generator) for name, generator in drawn.items()}
    for name, sources in (("train", own), ("foreign", foreign)):
        tokens = dict.fromkeys(SPLITS, 3000) | {"train": 20000 if name == "train" else 3000}
        mixture = Mixture("tiny", seq_length=512, tokens=tokens, sources=sources, context=(64, 300), part_tokens=4000)
        pack_mixture(mixture, folder / name, 1)
    os.symlink(folder / "train", folder / "heldout")
    return folder


def small(packed, *words):
    """Words of the driver that make its study small."""
    place = ["--out", "out", "--work", "work", "--data", str(packed), "--objectives", "target"]
    return [*place, *words, "--calibrate", SMALL_CALIBRATION, "--", *SMALL_RUN]


def drive(folder, packed, *words):
    """Run the driver of the study, small; what it says."""
    command = [sys.executable, str(ROOT / "tests" / "bench" / "routing.py"), *small(packed, *words)]
    done = subprocess.run(
        command, cwd=folder, env=command_environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """The driver in this process, whose commands need not import everything again."""

    def command(words, log, seconds, gpu):
        return f"failed, see {log}" if forked_command(words, ROOT, log) else ""

    monkeypatch.setattr(routing, "elastic_command", command)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)

    def run(packed, *words):
        assert routing.main(small(packed, *words)) == 0
        return capsys.readouterr().out

    return run


def test_the_driver_trains_evaluates_and_skips_what_is_done(tmp_path, packed):
    words = ["--sets", "heldout", "--routers", "static", "--seeds", "5", "--biases", "2", "--checkpoints", "5"]
    assert "static-target-5: fit" in drive(tmp_path, packed, *words)
    run = read_study(tmp_path / "out").runs[0]
    assert (run.router, run.objective, run.seed, run.steps) == ("static", "target", 5, 2)
    assert run.test["methods"] == ["elastic", "elastic@2", "dense", "streaming", "random:0.7", "random:0.7:1"]
    assert run.chosen_bias == run.tested.bias
    assert run.at(run.chosen_bias).mean_msr == run.at(2).mean_msr  # nothing is retrieved, so nothing is lost
    assert run.samples is not None and len(run.samples.ids) == sum(row["n"] for row in run.test["tasks"].values())
    assert {"elastic@2_kl", "dense_exact", "random:0.7_msr"} <= run.samples.columns.keys()
    assert run.validation["methods"] == ["elastic", "elastic@2", "dense"]
    assert run.validation["split"] == "validation" and run.test["split"] == "test"
    assert run.recipe["step"] == 2 and len(run.curves()["loss"]) == 2
    assert (run.folder / "checkpoint" / "router.safetensors").is_file()
    assert "static-target-5: was there" in drive(tmp_path, packed, *words)


@pytest.mark.slow
def test_the_whole_study_of_orders_levels_and_the_foreign_set(tmp_path, packed, here, capsys):
    """The driver, then tables of both sets of rows; a cut study resumes from its small files alone."""
    words = ["--routers", "level", "need", "ordered", "--seeds", "3"]
    said = here(packed, *words, "--checkpoints", "--sets", "heldout")
    assert "order-3: calibrate" in said and "ordered-target-3: fit" in said
    out = tmp_path / "out"
    assert (out / "ordered-target-3" / "checkpoint").is_dir()  # the foreign set is still to come
    for path in (tmp_path / "work").iterdir():
        path.rename(tmp_path / path.name)  # as on another machine
    said = here(packed, *words, "--checkpoints")
    assert "order-3: was there" in said and "fit" not in said and said.count("test foreign") == 3
    assert not (out / "ordered-target-3" / "checkpoint").exists()
    runs = {run.router: run for run in read_study(out, "foreign").runs}
    assert set(runs) == {"level", "need", "ordered"} and {run.seed for run in runs.values()} == {3}
    assert [runs[name].objective for name in runs] == ["calibrated", "calibrated", "target"]
    assert [point.bias for point in runs["level"].points] == sorted([0, *KINDS["level"].biases])
    assert [runs[name].validation["elastic"]["router"]["kind"] for name in runs] == ["level", "static", "paper"]
    msr = [point.mean_msr for point in runs["need"].points]
    assert msr == sorted(msr) and msr[0] < msr[-1]
    assert all(run.tested is not None and run.samples is not None for run in runs.values())
    assert cli.main(["bench", "routing", str(out), "--out", str(tmp_path / "bench"), "--main", "ordered-target-3"]) == 0
    assert "level - strongest static, calibrated" in capsys.readouterr().out
    own, foreign = (load(tmp_path / "bench" / f"routing{part}.json") for part in ("", "-foreign"))
    for found in (own, foreign):
        paired = {r["who"]: r for r in found if r["case"] == "paired" and r["criterion"] == "97 % of retrieval"}
        for who in ("level - strongest static, calibrated", "ordered - strongest static, target"):
            assert paired[who]["rivals"] == ["need-calibrated-3"]
    cases = {r["case"] for r in foreign}
    assert {"foreign_needle", "foreign_code"} <= cases and not any(case.endswith("-none") for case in cases)
    headline = {(r["who"], r["metric"]): r for r in foreign if r["case"] == "headline"}
    assert 0 <= headline["level, calibrated", "MSR inside the window"]["value"] <= 1
    assert ("level, calibrated", "MSR inside the window") not in {(r["who"], r["metric"]) for r in own}
    assert cli.main(["bench", "table", str(tmp_path / "bench")]) == 0
    page = capsys.readouterr().out
    assert "## routing-foreign" in page and "The foreign set: kinds of questions" in page


def test_variants_are_trained_judged_and_told_apart(tmp_path, packed, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    variants = tmp_path / "variants.yaml"
    variants.write_text("plain: []\nslow: [--model.optimiser.lr=1e-4]\nbroken: [--model.optimiser.lr=-1]\n")
    monkeypatch.setattr(ablation, "METHODS", ["elastic", "elastic@2", "dense"])
    words = [
        "--variants",
        str(variants),
        "--data",
        str(packed),
        "--kept",
        str(tmp_path / "kept"),
        "--work",
        str(tmp_path / "work"),
    ]
    for name in ("plain", "broken"):  # plain was judged before; broken fails
        (tmp_path / "kept" / name).mkdir(parents=True)
    (tmp_path / "kept" / "plain" / "results_validation.json").write_text(json.dumps(results("input", ("dense",))))
    (tmp_path / "kept" / "plain" / "variant.json").write_text(json.dumps({"flags": "", **STAMP}))
    monkeypatch.setattr(ablation, "records", lambda found, *rest: records({"plain": found["plain"]}, *rest))
    assert ablation.main([*words, "--out", str(tmp_path / "bench"), "--", *SMALL_RUN]) == 1
    said = capsys.readouterr().out
    assert "plain: was there" in said and "slow: done" in said and "broken: fit failed, see " in said
    judged = json.loads((tmp_path / "kept" / "slow" / "results_validation.json").read_text())
    assert judged["methods"] == ["elastic", "elastic@2", "dense"] and judged["split"] == "validation"
    assert json.loads((tmp_path / "kept" / "slow" / "variant.json").read_text())["flags"] == "--model.optimiser.lr=1e-4"
    found = {(r["who"], r["metric"]): r for r in load(tmp_path / "bench" / "ablation.json")}
    assert found["bias 2", "retrieval of dense"]["value"] == pytest.approx(0.9)
    assert found["bias 0", "retrieval of dense"]["half"] == pytest.approx(0.05 / 3**0.5 / 0.8, rel=1e-4)
    assert cli.main(["bench", "table", str(tmp_path / "bench")]) == 0
    assert "| plain | `` | abc | 1.000 ± 0.036 / 1.000 ± 0.025 @ 0.30 (0.00) |" in capsys.readouterr().out
