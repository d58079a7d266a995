"""The test rows of packed data in `elastic eval`: what `elastic test` finds, by task and length, resumed."""

import json
from dataclasses import replace

import pytest
import torch

from elastic import cli
from elastic.config import SparseConfig
from elastic.data.packing import IGNORE, Sample, collate, packed_row, sample_alone
from elastic.data.shards import DataWriter, tokenizer_origin
from elastic.data.source_names import generator_of, kind_of, length_of
from elastic.data.tasks import task_index
from elastic.evaluation.benchmark import Request
from elastic.evaluation.packed_rows import of_folder
from elastic.model.loading import load_tokenizer
from tests.helpers.training import build_data, small_run

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("wonderwords", reason="the extra `eval` is not installed")
from elastic.evaluation import runner
from elastic.evaluation.runner import EvaluationPlan

SIZES = ["--sink", "4", "--window", "16", "--block", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


def written(folder, samples):
    """A data folder with a test split of these samples, two a row."""
    rows = [packed_row(samples[i : i + 2]) for i in range(0, len(samples), 2)]
    tokenizer = tokenizer_origin(load_tokenizer("tiny"))
    with DataWriter(folder, {"seq_length": 4096, "seed": 0, **tokenizer}) as writer:
        writer.add("test", "mixed", rows)
    return folder


def sample(source, tokens, task="single_qa"):
    return Sample([5] * tokens, tokens - 2, task_index(task), source)


def request(task, length, count=None):
    return Request(task, length, count, load_tokenizer("tiny"), 0, False)


def run(data, out, *more):
    lengths = ["--lengths", "64,128"]
    command = ["eval", "--backbone", "tiny", "--rows", f"own={data}", "--tasks", "own", *lengths, *SIZES]
    return cli.main([*command, "--out", str(out), *more])


def lines(out, method):
    """Every sample of a method by its identity."""
    files = (out / "samples").glob(f"{method}.*.jsonl")
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()[1:]]
    return {line["id"]: line for line in found}


def test_scores_are_those_of_elastic_test(data, tmp_path):
    """Samples alone or several packed in another order, beside the rows as they are."""
    methods = ["dense", "streaming", "random:0.5"]
    module, loader, trainer = small_run(data, tmp_path, fit=False, methods=[*methods, "elastic"])
    trainer.test(module, loader, verbose=False)
    about, values = module.sample_results
    corpora = list(loader.manifest["splits"]["test"])
    for size in ("1", "5"):
        out = tmp_path / size
        assert run(data, out, "--methods", *methods, "--batch-size", size) == 0
        for method in methods:
            found = lines(out, method.replace(":", "_"))
            assert len(found) == len(about) == 16
            for (corpus, row, index, *_, tokens), measured in zip(about.tolist(), values, strict=True):
                mine = found[f"{corpora[corpus]}/{row}/{index}"]
                assert mine["tokens"] == tokens and mine["score"] == mine["exact"]
                for score in ("exact", "accuracy", "loss"):
                    wanted = measured[module.columns.index(f"{method}_{score}")].item()
                    assert mine[score] == pytest.approx(wanted, rel=1e-3, abs=1e-5)
                wanted = measured[module.columns.index("random:0.5_esr_all")].item()
                assert method != "random:0.5" or mine["esr_all"] == pytest.approx(wanted)


def test_the_whole_comparison_is_one_command_that_resumes(data, tmp_path, monkeypatch, capsys):
    out, methods = tmp_path / "out", ["--methods", "dense", "streaming", "random:0.5"]
    assert run(data, out, *methods, "--against", "dense", "random:0.5") == 0
    told = capsys.readouterr().out
    assert "own_sensitive: mean of tasks" in told and "No samples: own_tiny_single_qa at 128" in told
    table = (out / "comparison.md").read_text()
    assert "| method | MSR | 64 | 128 | mean | vs dense | vs random:0.5 |" in table and "**own\\_robust**" in table
    assert "No samples: own\\_tiny\\_single\\_qa at 128" in table
    before = {name: (out / name).read_text() for name in ("comparison.md", "comparison.tex", "comparison.csv")}
    monkeypatch.setattr(runner, "_evaluate", lambda *_: pytest.fail("a finished result was made again"))
    assert run(data, out, *methods, "--against", "dense", "random:0.5") == 0
    assert before == {name: (out / name).read_text() for name in before}


def test_lengths_are_those_that_sources_name_else_powers_of_two(tmp_path):
    samples = [sample("needle-1024-long", 1300), sample("needle-1024-none", 900), sample("needle-2048", 1800)]
    samples += [sample("qa", tokens) for tokens in (1024, 1025, 400)]
    (rows,) = of_folder("own", written(tmp_path / "data", samples))
    assert (rows.name, rows.tasks()) == ("own_sensitive", ("own_needle", "own_qa"))
    assert rows.lengths("own_needle", (512, 1024, 2048)) == (1024, 2048) and rows.lengths("own_qa", (512,)) == (512,)
    cells = [(task, length) for task in rows.tasks() for length in (512, 1024, 2048)]
    assert {cell: [place.tokens for place in rows.chosen(request(*cell))] for cell in cells} == {
        ("own_needle", 512): [],
        ("own_needle", 1024): [1300, 900],
        ("own_needle", 2048): [1800],
        ("own_qa", 512): [400],
        ("own_qa", 1024): [1024],
        ("own_qa", 2048): [1025],
    }
    assert rows.lengths("own_needle", (512, 4096)) == ()
    asked, sparse = tuple((rows, task) for task in rows.tasks()), SparseConfig()
    plan = EvaluationPlan("tiny", "cpu", "float32", asked, (1024, 4096), 1, 1, False, sparse, 0)
    assert [cell.label for cell in plan.cells()] == ["own_needle@1024", "own_qa@1024"]
    assert plan.missing() == ["own_needle at 4096", "own_qa at 4096"]
    with pytest.raises(ValueError, match="no samples of tasks own_needle, own_qa at lengths 4096; name others"):
        replace(plan, lengths=(4096,))


def test_few_samples_are_of_all_sources_and_sets_are_by_sensitivity(tmp_path):
    samples = [sample(f"foreign_a-1024-{system}", 900 + i) for system in ("none", "short", "long") for i in range(4)]
    samples += [sample("b", 500, "code"), sample("b", 500, "in_context"), sample("odd/name", 500)]
    sensitive, robust = of_folder("foreign", written(tmp_path / "data", samples))
    assert sensitive.tasks() == ("foreign_a", "foreign_odd_name")
    assert robust.tasks() == ("foreign_b_code", "foreign_b_in_context") and robust.name == "foreign_robust"
    chosen = sensitive.chosen(request("foreign_a", 1024, 5))
    assert [place.source.rpartition("-")[2] for place in chosen] == ["none", "short", "long", "none", "short"]
    assert chosen == sensitive.chosen(request("foreign_a", 1024, 9))[:5]


def test_a_sample_alone_is_the_sample_that_was_packed():
    one, two = (Sample(list(range(first, first + 9)), 5, 0, str(first), 1, (1, 4)) for first in (10, 30))
    row = packed_row([one, two])
    assert sample_alone(row, 0) == packed_row([one]) and sample_alone(row, 1) == packed_row([two])
    older = {key: value for key, value in row.items() if key != "user_spans"}
    assert sample_alone(older, 1)["user_spans"] == [[0, 5]]
    batch = collate([sample_alone(row, 1), sample_alone(row, 0)])
    assert torch.equal(batch["labels"][0, :6], torch.full((6,), IGNORE)) and batch["source"] == ["30", "10"]


def test_names_of_sources():
    names = ["code_completion", "needle_single-1024", "foreign_code-2048-long", "my-texts"]
    assert [kind_of(name) for name in names] == ["code_completion", "needle_single", "foreign_code", "my-texts"]
    assert [length_of(name) for name in names] == [None, 1024, 2048, None]
    assert generator_of("needle_single-4096") == "needle_single"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data", "--rows data: expected NAME=DIR"),
        ("=data", "--rows =data: expected NAME=DIR"),
        ("ruler=data", "--rows ruler=data: expected NAME=DIR with a name of its own"),
        ("a b=data", "'a b' is not a name"),
        ("own=absent", "no data at absent"),
    ],
)
def test_rows_that_cannot_be_are_refused_in_one_line(given, message, capsys):
    assert cli.main(["eval", "--rows", given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_data_that_does_not_fit_is_refused(data, tmp_path, capsys):
    train = tmp_path / "train"
    with DataWriter(train, {"seq_length": 64, "seed": 0, **tokenizer_origin(load_tokenizer("tiny"))}) as writer:
        writer.add("train", "mixed", [packed_row([sample("a", 20)])])
    assert run(train, tmp_path / "out") == 2
    assert "has no split 'test', only train" in capsys.readouterr().err
    assert run(data, tmp_path / "out", "--against", "static:x") == 2
    assert "--against static:x: it is not among the methods, which are dense, streaming" in capsys.readouterr().err
    other = tmp_path / "other"
    origin = {"tokenizer": {"name": "other", "sha256": "0"}, "chat_template_kwargs": {}}
    with DataWriter(other, {"seq_length": 64, "seed": 0, **origin}) as writer:
        writer.add("test", "mixed", [packed_row([sample("a", 60)])])
    assert run(other, tmp_path / "out") == 2
    assert "packed with the tokenizer of 'other', which is not that of backbone 'tiny'" in capsys.readouterr().err
