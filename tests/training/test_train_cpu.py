"""The whole path from files that a real run wrote: fit, test, predict, load, generate."""

import json
import signal
from pathlib import Path

import pytest
import torch

from elastic import cli
from elastic.training.module import ElasticModule
from tests.helpers.training import ROOT, build_data

CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def command(name: str, data: Path, root: Path, *extra: str) -> int:
    """`elastic <name>` with debug.yaml in this process."""
    flags = {"data.data_dir": data, "trainer.default_root_dir": root, "trainer.enable_progress_bar": "false"}
    words = [f"--{key}={value}" for key, value in flags.items()]
    return cli.main([name, "-c", str(CONFIGS / "debug.yaml"), *words, *extra])


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("run") / "run"
    assert command("fit", data, root, "--model.optimiser.lr=0.01") == 0
    return root


def test_a_run_says_what_runs_attention_and_where_its_routers_are(data, tmp_path, capsys):
    """The first line and the last, as docs/training.md says; after a test, where its picture is."""
    root = tmp_path / "a run"
    assert command("fit", data, root, "--trainer.max_steps=1") == 0
    first, *_, last = capsys.readouterr().err.strip().splitlines()
    assert first.startswith("attention in training runs in torch (cpu)")
    assert last == f"trained routers: {root / 'checkpoint'} (elastic generate --checkpoint '{root / 'checkpoint'}')"
    assert command("test", data, root, "--ckpt_path=last") == 0
    out = capsys.readouterr().out
    assert f"routes: {root / 'routes.png'}" in out and f"results: {root / 'results_test.json'}" in out
    assert command("fit", data, root, "--ckpt_path=last", "--trainer.max_steps=1") == 0
    assert "trained routers" not in capsys.readouterr().err  # nothing was left to train, which is said instead


def test_a_run_leaves_its_files(run):
    names = {path.name for path in run.iterdir()}
    assert {"config.yaml", "last.ckpt", "checkpoint"} <= names
    assert not [name for name in names if "writing" in name or "version_" in name]
    assert {path.name for path in (run / "checkpoint").iterdir()} == {"router.safetensors", "elastic.json"}
    assert (run / "last.ckpt").stat().st_size < 4e6  # routers and their optimiser state, no backbone
    recipe = json.loads((run / "checkpoint" / "elastic.json").read_text())["recipe"]
    assert recipe["steps"] == 4 and recipe["optimiser"]["lr"] == 0.01 and recipe["data"]["seq_length"] == 128


@pytest.mark.parametrize("name", ["fit", "test"])
def test_sigterm_stays_the_commands_during_a_run(name, data, tmp_path, monkeypatch):
    """Lightning's handler would wait for ever for a rank that is inside another collective."""
    seen = []

    def whose(*_):
        seen.append(signal.getsignal(signal.SIGTERM))

    def mine(*_):
        raise AssertionError("nobody sends it")

    monkeypatch.setattr(ElasticModule, "on_train_batch_end" if name == "fit" else "on_test_batch_end", whose)
    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert command(name, data, tmp_path / "run", "--trainer.max_steps=1") == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen and set(seen) == {mine}


def test_the_saved_configuration_repeats_the_run(run, data, tmp_path):
    root = tmp_path / "again"
    assert cli.main(["fit", "-c", str(run / "config.yaml"), f"--trainer.default_root_dir={root}"]) == 0
    one, two = (folder / "checkpoint" / "router.safetensors" for folder in (run, root))
    assert one.read_bytes() == two.read_bytes()


def test_tensorboard_counts_optimiser_steps_and_holds_pictures(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [point.step for point in events.Scalars("val/msr/in_context")] == [2, 4]
    assert any(tag.startswith("routes/") for tag in events.Tags()["images"])
    wanted = {
        "train/temperature",
        "train/u/single_qa",
        "train/v/span",
        "train/l2/in_context",
        "train/tokens_per_second",
    }
    assert wanted <= set(events.Tags()["scalars"])


def test_test_writes_a_table_and_a_file(run, data, capsys):
    assert command("test", data, run, "--ckpt_path=last", "--trainer.limit_test_batches=1.0") == 0
    printed = capsys.readouterr().out
    results = json.loads((run / "results_test.json").read_text())
    assert set(results["tasks"]) == {"single_qa", "in_context"}
    assert "dense exact" in printed and "single_qa" in printed and "results_test.json" in printed
    assert results["checkpoint"].endswith("last.ckpt") and (run / "routes.png").stat().st_size > 1000
    assert (run / "config_test.yaml").is_file()


def test_validate_writes_its_own_file(run, data):
    assert command("validate", data, run, "--ckpt_path=last") == 0
    assert json.loads((run / "results_validation.json").read_text())["split"] == "validation"


def test_testing_reads_the_checkpoint(run, data, tmp_path):
    """New routers are undecided, every head full; routers that a checkpoint pushes to SA run sparse."""
    assert command("test", data, tmp_path) == 0
    fresh = json.loads((tmp_path / "results_test.json").read_text())
    assert all(row["msr"] == 0 for row in fresh["tasks"].values()) and fresh["checkpoint"] is None
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    for name, value in checkpoint["state_dict"].items():
        if name.endswith("head.4.bias"):
            value.copy_(torch.tensor([0.0, 100.0]))
    torch.save(checkpoint, tmp_path / "sparse.ckpt")
    assert command("test", data, tmp_path, f"--ckpt_path={tmp_path / 'sparse.ckpt'}") == 0
    pushed = json.loads((tmp_path / "results_test.json").read_text())
    assert all(row["msr"] == 1 for row in pushed["tasks"].values())


def test_predict_writes_a_line_per_sample(run, data):
    assert command("predict", data, run, "--ckpt_path=last") == 0
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 16 and {line["task"] for line in lines} == {"single_qa", "in_context"}
    assert all({"answer", "route", "msr", "exact"} <= set(line) for line in lines)


def test_what_fit_wrote_loads_and_generates_with_the_same_routes(run, data):
    import elastic
    from elastic.data.packing import collate
    from elastic.data.shards import open_corpus
    from elastic.model.attach import last_routes, routers

    model, tokenizer = elastic.load(run / "checkpoint")
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    for layer, router in enumerate(routers(model)):
        for name, value in router.state_dict().items():
            assert torch.equal(value, state[f"model.model.layers.{layer}.self_attn.router.{name}"])
    assert command("predict", data, run, "--ckpt_path=last") == 0
    batch = collate([open_corpus(data, "test", "in_context")[0]])  # corpora come in the order of their names
    with torch.no_grad():
        model(
            **{key: value for key, value in batch.items() if key not in ("labels", "task_id", "source", "row_samples")},
            use_cache=False,
        )
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    for n in range(len(batch["task_id"])):
        assert last_routes(model).route[:, n].int().tolist() == lines[n]["route"]
    generation = elastic.generate(model, tokenizer, "f1 f2 key k3 1 2 3 4 f5 f6 find k3", max_new_tokens=4)[0]
    assert generation.text and 0 <= generation.report.msr <= 1


def test_bf16_mixed_precision_trains(data, tmp_path):
    assert command("fit", data, tmp_path, "--trainer.precision=bf16-mixed", "--trainer.max_steps=2") == 0
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(value.dtype in (torch.float32, torch.float64) for value in state.values())
    assert state["model.model.layers.0.self_attn.router.head.4.weight"].abs().max() > 0
