"""Retrieval scores by the oracle, the ranking as a pattern file, and the sweep over MSR, resumed."""

import json

import pytest
import torch

from elastic.model.attach import attach
from tests.helpers.models import small_bpe, small_config, tiny_model

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("wonderwords", reason="the extra `eval` is not installed")
from elastic.commands import eval as command
from elastic.evaluation import retrieval, runner, sweep
from elastic.model.loading import load_backbone
from elastic.routing.methods import parse_method


@pytest.fixture(scope="module")
def words():
    return load_backbone("tiny")[1]


def doc(words_before: int) -> dict:
    needle = "One of the special magic numbers for red-fox is: 7654321."
    return {
        "input": f"{'The grass is green. ' * words_before}{needle} The sky is blue. What is the number for red-fox?",
        "gen_prefix": "The special magic number for red-fox is",
        "outputs": ["7654321"],
    }


def test_scores_are_the_attention_of_the_stock_model(words):
    """Against attention weights that transformers writes out itself."""
    model = tiny_model()
    heads = model.config.num_attention_heads // model.config.num_key_value_heads
    docs = [doc(3), doc(11)]
    wanted = 0
    model.set_attn_implementation("eager")
    for sample in docs:
        ids, needle, answers = retrieval._tokens(sample, words)
        ids = [i % model.config.vocab_size for i in ids]
        weights = model(input_ids=torch.tensor([ids]), output_attentions=True).attentions
        mass = torch.stack([w[0, :, -answers:][..., needle].sum(-1).mean(-1) for w in weights])
        wanted = wanted + mass.unflatten(1, (-1, heads)).amax(-1) / len(docs)
    model.set_attn_implementation("sdpa")

    class Small:  # the test's model has fewer tokens than the tokenizer
        def __call__(self, *args, **kwargs):
            encoded = words(*args, **kwargs)
            return {**encoded, "input_ids": [i % model.config.vocab_size for i in encoded["input_ids"]]}

    attached = attach(model, small_config()).eval()
    found = retrieval.retrieval_scores(attached, Small(), docs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert found.min() >= 0 and found.max() <= 1
    ids, needle, answers = retrieval._tokens(doc(2), small_bpe())
    marked = small_bpe().decode([i for i, inside in zip(ids, needle.tolist(), strict=True) if inside])
    assert marked.strip().startswith("One of the special magic") and marked.endswith("7654321")
    assert small_bpe().decode(ids).endswith("red-fox is 765432") or answers == 1


def test_samples_without_a_needle_are_refused(words):
    model = attach(tiny_model(), small_config()).eval()
    with pytest.raises(ValueError, match="the needle with '99' is not in its prompt"):
        retrieval.retrieval_scores(model, words, [{**doc(1), "outputs": ["99"]}])
    with pytest.raises(ValueError, match="no samples to rank heads by"):
        retrieval.retrieval_scores(model, words, [])


def test_the_ranking_is_a_pattern_file(tmp_path):
    score = torch.tensor([[0.5, 0.1], [0.0, 0.9], [0.3, 0.2]])
    retrieval.write_ranking(score, tmp_path / "heads.tsv", {"backbone": "tiny"})
    assert parse_method(f"static:{tmp_path / 'heads.tsv'}").routes(3, 2).tolist() == [[0, 1], [1, 0], [0, 1]]
    assert parse_method(f"static:{tmp_path / 'heads.tsv'}@0.34").routes(3, 2).tolist() == [[0, 1], [1, 0], [0, 0]]
    assert json.loads((tmp_path / "heads.json").read_text()) == {
        "backbone": "tiny",
        "score": [[0.5, 0.1], [0.0, 0.9], [0.3, 0.2]],
    }


def test_a_sweep_goes_from_dense_to_streaming_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    from elastic.evaluation import ruler_samples

    monkeypatch.setitem(ruler_samples.NEW_TOKENS, "ruler_fwe", 4)
    model, words = load_backbone("tiny")
    model.config.max_position_embeddings = 2048
    loaded = attach(model, small_config()).eval()
    for module in (runner, sweep):
        monkeypatch.setattr(module, "load_model", lambda *_: (loaded, words))
    monkeypatch.setattr(sweep, "RANK_SAMPLES", 1)
    heads = tmp_path / "heads.tsv"
    options = ["--tasks", "ruler_fwe", "--lengths", "1024", "--limit", "1", "--out", str(tmp_path / "out")]
    options += ["--sweep", str(heads), "--points", "3", "--backbone", "tiny", "--block", "4", "--window", "16"]
    options += ["--sink", "4"]
    assert command.main(options) == 0, capsys.readouterr().err
    curve = json.loads((tmp_path / "out" / "sweep.json").read_text())["1024"]["ruler_fwe"]
    assert [point[0] for point in curve] == [0, 0.5, 1] and len(curve[0]) == 3
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 5000
    assert json.loads(heads.with_suffix(".json").read_text())["samples"] == 2
    before = heads.read_text()
    monkeypatch.setattr(runner, "_evaluate", lambda *_: pytest.fail("a finished result was made again"))
    assert command.main(options) == 0 and heads.read_text() == before
    assert "mean of tasks" in capsys.readouterr().out


def test_sweeps_that_cannot_be(tmp_path, capsys):
    file = str(tmp_path / "heads.txt")
    assert command.main(["--sweep", file]) == 2
    assert "expected a name ending in .tsv" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--points 1 is below 2"):
        sweep.sweep_methods(tmp_path / "heads.tsv", 1)
