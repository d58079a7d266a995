"""What the package wrote before its modules moved into rooms is read as it was: `tests/fixtures/before_moves`, made by
commit 89013a6 (`expected.json`: what that commit answered, routed and loaded).

Of the tensors in `last.ckpt` only the shapes are kept: the routers are those of `checkpoint/`, the optimiser's averages
are zeros.
"""

import hashlib
import json
import shutil
from itertools import islice
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._pytree import tree_map_only

import elastic
from elastic import cli
from elastic.bench.studies import methods
from elastic.data.datamodule import MixtureDataModule
from elastic.model.checkpoint import MULTIPLIERS, WEIGHTS

BEFORE = Path(__file__).parent / "fixtures" / "before_moves"
FIRST_RECORDS = Path(__file__).parent / "bench" / "first_format.json"
EXPECTED = json.loads((BEFORE / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder of the old run, with its `last.ckpt` filled from its checkpoint."""
    from safetensors.torch import load_file

    monkeypatch.chdir(tmp_path)
    shutil.copytree(BEFORE / "packed", tmp_path / "data" / "packed")
    shutil.copytree(BEFORE / "run", tmp_path / "run")
    routers = load_file(BEFORE / "run" / "checkpoint" / WEIGHTS)
    thin = torch.load(BEFORE / "run" / "last.ckpt", weights_only=True)
    full = tree_map_only(torch.Tensor, torch.Tensor.clone, tree_map_only(torch.Tensor, torch.Tensor.contiguous, thin))
    for name in full["state_dict"]:
        kept = name.replace("model.model.", "").replace("self_attn.router.", "")
        full["state_dict"][name] = routers[kept.replace("multipliers.", MULTIPLIERS)]
    torch.save(full, tmp_path / "run" / "last.ckpt")
    return tmp_path


def test_a_checkpoint_answers_and_routes_as_before():
    model, tokenizer = elastic.load(BEFORE / "run" / "checkpoint")
    assert len({str(answer["route"]) for answer in EXPECTED["answers"]}) > 1
    for answer in EXPECTED["answers"]:
        (made,) = elastic.generate(model, tokenizer, answer["prompt"], 8)
        assert made.token_ids == answer["token_ids"]
        assert [list(layer) for layer in made.report.route] == answer["route"] and made.report.msr == answer["msr"]


def checksum(batch):
    """sha256 of every tensor's values, by name. Where old rows say nothing, the users' words are the prompts."""
    assert torch.equal(batch.pop("user_spans"), batch["prompt_spans"])
    old = [(name, value) for name, value in sorted(batch.items()) if name not in ("place", "counted", "row_samples")]
    flat = [[name, value.tolist() if isinstance(value, torch.Tensor) else value] for name, value in old]
    return hashlib.sha256(json.dumps(flat).encode()).hexdigest()


def test_a_data_folder_gives_the_same_batches():
    module = MixtureDataModule(str(BEFORE / "packed"), rows_per_step=4, micro_batch_rows=2, seed=0)
    module.setup("fit")
    steps = [[checksum(micro) for micro in step] for step in islice(iter(module.train_dataloader()), 3)]
    assert steps == EXPECTED["batches"]["train"]
    module.setup("test")
    assert [[checksum(batch)] for batch in module.test_dataloader()] == EXPECTED["batches"]["test"]


def test_a_run_is_tested_with_its_resolved_configuration(folder, capsys):
    """With one setting that there was no choice of, and whose default is another one now."""
    before = json.loads((BEFORE / "run" / "results_test.json").read_text())
    command = ["test", "-c", "run/config.yaml", "--ckpt_path", "last"]
    assert cli.main(command) == 2
    assert "was trained with router {" in capsys.readouterr().err
    assert cli.main([*command, "--model.elastic.router.pool_over", "prompt"]) == 0
    after = json.loads((folder / "run" / "results_test.json").read_text())
    assert after.keys() - before.keys() == {"samples", "source_tasks"} and not before.keys() - after.keys()
    assert after["routes"] == before["routes"]
    for kind in ("tasks", "sources"):
        assert after[kind].keys() == before[kind].keys() != set()
        for name, row in before[kind].items():
            assert after[kind][name].keys() - row.keys() == {"elastic_kl", "elastic_kl_95"}
            same = [column for column in row if not column.endswith("_95")]  # half widths are others since
            assert [after[kind][name][column] for column in same] == pytest.approx(
                [row[column] for column in same], rel=1e-4, nan_ok=True
            )


def test_a_run_under_the_earlier_multipliers_is_refused_and_its_routers_are_trained_further(folder, capsys):
    assert torch.load(folder / "run" / "last.ckpt", weights_only=True)["global_step"] == 2
    command = ["fit", "-c", "run/config.yaml", "--trainer.max_steps", "3", "--trainer.val_check_interval", "3"]
    assert cli.main([*command, "--ckpt_path", "last"]) == 2
    assert "had one multiplier l1 for both bounds of a target" in capsys.readouterr().err
    again = ["--model.routers", "run/checkpoint", "--trainer.default_root_dir", "again"]
    again += ["--model.elastic.router.pool_over", "prompt"]  # as these routers were trained
    assert cli.main([*command, *again]) == 0
    state = torch.load(folder / "again" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3 and "multipliers.u" in state["state_dict"]
    assert cli.main([*command, *again, "--ckpt_path", "last", "--trainer.max_steps", "4"]) == 0


def test_a_class_that_moved_is_refused_by_its_name(folder, capsys):
    settings = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    settings["trainer"]["strategy"] = {"class_path": "elastic.distributed.ShardedBackbone"}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["test", "-c", "run/config.yaml", "--ckpt_path", "last"])
    assert stopped.value.code == 2
    assert "Problem with given class_path 'elastic.distributed.ShardedBackbone'" in capsys.readouterr().err


def test_results_of_before_are_read():
    results = json.loads((BEFORE / "run" / "results_test.json").read_text())
    exact = [record for record in methods.records(results) if record["metric"] == "exact"]
    assert {(record["case"], record["who"]) for record in exact} == {
        (source, method) for source in results["sources"] for method in ("dense", "elastic")
    }
    for record in exact:
        assert record["value"] == results["sources"][record["case"]][f"{record['who']}_exact"]


def test_records_of_before_are_shown(tmp_path, capsys):
    shutil.copy(FIRST_RECORDS, tmp_path)
    assert cli.main(["bench", "table", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    first = json.loads(FIRST_RECORDS.read_text())[0]
    assert f"{first['case']}, {first['who']}, {first['metric']}: {first['value']:.4g} {first['unit']}" in page
