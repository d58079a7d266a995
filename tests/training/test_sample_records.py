"""What evaluation says of every sample: identities, divergence from dense, agreement with the tables, the file."""

import json

import pytest
import torch

from elastic import cli
from elastic.data.tasks import TASKS
from elastic.model.attach import override_routes
from elastic.training.losses import labelled_samples
from elastic.training.sample_records import ABOUT, SampleRecords, sample_lines
from tests.helpers.training import ROOT, build_data, small_run

METHODS = ["streaming", "elastic", "random:0.5"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def judged(data, root, methods, rows=1, weights=None):
    """A module after testing routers that are not trained."""
    module, loader, trainer = small_run(data, root, fit=False, methods=methods, rows_per_step=rows)
    loader.micro_batch_rows, loader.weights = rows, weights or {}
    trainer.test(module, loader, verbose=False)
    return module, loader


def column(module, name):
    """One measured column of all samples."""
    return module.sample_results[1][:, module.columns.index(name)]


def test_divergence_is_that_of_the_definition_with_and_without_dense_among_the_methods(data, tmp_path):
    module, loader = judged(data, tmp_path, METHODS)
    assert {name for name in module.columns if name.endswith("_kl")} == {f"{method}_kl" for method in METHODS}
    expected = []
    for batch in loader.test_dataloader():
        head = module.model.get_output_embeddings()
        with torch.no_grad():
            found = []
            for route in (0, 1):
                with override_routes(module.model, route):
                    found.append(head(module.hidden_states(batch))[0, :-1].double().log_softmax(-1))
        dense, sparse = (logs[batch["labels"][0, 1:] != -100] for logs in found)
        sample, _ = labelled_samples(batch["labels"], batch["cu_seq_lens"])
        per_position = (dense.exp() * (dense - sparse)).sum(-1)
        expected += [per_position[sample == n].mean() for n in range(len(batch["task_id"]))]
    torch.testing.assert_close(column(module, "streaming_kl"), torch.stack(expected), rtol=1e-3, atol=1e-5)
    assert column(module, "streaming_kl").max() > 0.1 and column(module, "elastic_kl").abs().max() < 1e-6
    beside, _ = judged(data, tmp_path, ["random:0.5", "elastic", "dense", "streaming"])
    assert "dense_kl" not in beside.columns and "dense_exact" in beside.columns
    for name in ("streaming_kl", "random:0.5_kl", "streaming_exact", "random:0.5_msr"):
        assert torch.equal(column(beside, name), column(module, name)), name


def test_samples_keep_their_identity_and_their_values_however_rows_are_read(data, tmp_path):
    one, loader = judged(data, tmp_path, METHODS)
    about = one.sample_results[0]
    identities = [tuple(line) for line in about[:, :3].tolist()]
    assert len(set(identities)) == len(identities) == 16 and identities == sorted(identities)
    four, _ = judged(data, tmp_path, METHODS, rows=4)
    assert torch.equal(four.sample_results[0], about)
    torch.testing.assert_close(four.sample_results[1], one.sample_results[1], rtol=1e-4, atol=1e-5)
    names = list(loader.manifest["splits"]["test"])
    part, _ = judged(data, tmp_path, METHODS, weights={names[0]: 0.0})
    assert torch.equal(part.sample_results[0], about[about[:, 0] == 1])


def test_tables_are_means_over_the_samples(data, tmp_path):
    module, _ = judged(data, tmp_path, METHODS)
    task = module.sample_results[0][:, ABOUT.index("task")]
    for name, row in module.results.items():
        mine = task == TASKS.index(name)
        assert row["n"] == int(mine.sum())
        for of in module.columns:
            assert row[of] == pytest.approx(column(module, of)[mine].mean().item(), rel=1e-6, abs=1e-9)


def test_samples_without_any_and_out_of_order():
    records = SampleRecords(("a", "b"))
    assert [list(x.shape) for x in records.compute()] == [[0, 6], [0, 2]]
    values = {"b": torch.tensor([2.0, 4.0]), "a": torch.tensor([1.0, 1 / 3])}
    records.update(torch.tensor([[1, 0, 0, 0, 2, 9], [0, 7, 1, 1, 0, 8]]), values)
    records.update(torch.zeros(0, 6, dtype=torch.int64), {name: torch.zeros(0) for name in "ab"})
    about, measured = records.compute()
    assert about.tolist() == [[0, 7, 1, 1, 0, 8], [1, 0, 0, 0, 2, 9]] and measured[:, 1].tolist() == [4.0, 2.0]
    first, second = map(json.loads, sample_lines((about, measured), ("a", "b"), ("x", "y"), ("s", "t")))
    assert first == {"corpus": "x", "row": 7, "index": 1, "source": "t", "task": "single_qa", "tokens": 8,
                     "a": 0.333333, "b": 4.0}  # fmt: skip
    assert second["corpus"] == "y" and second["task"] == TASKS[2]


def test_the_commands_write_a_line_per_sample(data, tmp_path, capsys):
    flags = [f"--data.data_dir={data}", f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    debug = ["-c", str(ROOT / "configs" / "debug.yaml"), *flags]
    for command, split in (("test", "test"), ("validate", "validation")):
        assert cli.main([command, *debug, f"--trainer.limit_{command[:3].replace('tes', 'test')}_batches=1.0"]) == 0
        results = json.loads((tmp_path / f"results_{split}.json").read_text())
        assert results["samples"] == f"samples_{split}.jsonl"
        lines = [json.loads(line) for line in (tmp_path / results["samples"]).read_text().splitlines()]
        assert len(lines) == sum(row["n"] for row in results["tasks"].values()) == 16
        assert {line["corpus"] for line in lines} == {"single_qa", "in_context"}
        assert {line["source"] for line in lines} == results["sources"].keys() == {"tiny"}
        assert results["source_tasks"] == {}  # the source has both tasks
        assert {"dense_exact", "elastic_kl", "elastic_loss", "msr", "esr_last", "esr_all"} <= lines[0].keys()
        assert f"by sample: samples_{split}.jsonl" in capsys.readouterr().out
