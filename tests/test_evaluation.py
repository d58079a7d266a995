"""`elastic eval`: methods by name, RULER samples that fit, a model under the harness that routes on contexts alone."""

import json

import pytest
import torch

from elastic.backbone import attach, override_routes
from elastic.backbones import load_backbone
from elastic.evaluation.methods import Method, read_pattern
from tests.models import random_ids, small_config, tiny_model, varied_routers

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("wonderwords", reason="the extra `eval` is not installed")
from elastic.config import SparseConfig
from elastic.evaluation import ruler, runner, summary
from elastic.evaluation.routed_lm import RoutedLM, cut_middle


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character, so that lengths are easy to see."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(i) for i in range(32, 127)]
    made = Tokenizer(
        models.WordLevel({c: i + 2 for i, c in enumerate(letters)} | {"<pad>": 0, "<e>": 1}, unk_token=" ")
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<e>", unk_token=" ")
    fast.padding_side = "left"
    return fast


@pytest.fixture(scope="module")
def model():
    model = attach(tiny_model(), small_config())
    varied_routers(model)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("xattention:0", "0.0 is not a threshold above 0, up to 1"),
        ("xattention:most", "'most' is no number; expected a threshold above 0"),
        ("sparse", "unknown method 'sparse'; expected one of dense, streaming"),
        ("dense:1", "method 'dense:1' takes no argument"),
        ("random", "method 'random' needs an argument"),
        ("random:half", "'half' is no number; expected an MSR from 0 to 1"),
        ("random:1.5", "1.5 is not an MSR from 0 to 1"),
        ("elastic:absent", "absent does not exist"),
    ],
)
def test_unknown_methods_are_refused(name, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Method.parse(name)


def test_routes_of_the_methods(tmp_path):
    assert Method.parse("dense").route(3, 2, 0) == 0 and Method.parse("streaming").route(3, 2, 0) == 1
    route = Method.parse("random:0.5").route(4, 2, 7)
    assert route.shape == (4, 2) and route.sum() == 4
    assert torch.equal(route, Method.parse("random:0.5").route(4, 2, 7))
    assert not torch.equal(route, Method.parse("random:0.5").route(4, 2, 8))
    file = tmp_path / "heads.tsv"
    file.write_text("0.9\t0.1\n0.0\t0.5\n")
    assert Method.parse(f"static:{file}").route(2, 2, 0).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match=r"has 2 lines of \[2\] numbers; this backbone needs 3 lines"):
        read_pattern(file, 3, 2)
    file.write_text("a b\n")
    with pytest.raises(ValueError, match="is no table of numbers"):
        read_pattern(file, 1, 2)


def test_over_long_prompts_lose_their_middle():
    assert cut_middle(list(range(6)), 6) == list(range(6))
    assert cut_middle(list(range(7)), 6) == [0, 1, 2, 4, 5, 6]  # one token over the limit
    assert cut_middle(list(range(9)), 5) == [0, 1, 6, 7, 8]
    with pytest.raises(ValueError, match="the answer leaves 0 tokens for the prompt"):
        cut_middle([1, 2], 0)


def test_dense_scores_are_those_of_the_plain_harness(model, tokenizer):
    """Log-likelihoods and generations of the attached model on route 0 and of HFLM on the stock model."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [("the quick brown fox", " jumps"), ("a", " b c"), ("x" * 70, " end")]
    options = {"until": [], "max_gen_toks": 6, "do_sample": False}
    plain = HFLM(pretrained=tiny_model(), tokenizer=tokenizer, batch_size=1)
    ours = RoutedLM(model, tokenizer, 0, batch_size=2)
    for kind, arguments in (("loglikelihood", pairs), ("generate_until", [(c, options) for c, _ in pairs])):
        requests = [
            Instance(request_type=kind, doc={}, arguments=a, idx=i, metadata=("t", i, 1))
            for i, a in enumerate(arguments)
        ]
        wanted, found = (getattr(lm, kind)(requests, disable_tqdm=True) for lm in (plain, ours))
        if kind == "generate_until":
            assert wanted == found
        else:
            for (one, greedy), (two, same) in zip(wanted, found, strict=True):
                assert two == pytest.approx(one, abs=1e-3) and greedy == same


def test_routes_follow_from_the_context_alone(model, tokenizer):
    lm = RoutedLM(model, tokenizer, None, batch_size=3)
    context = "a context of some length to be routed"
    ids = list(lm.tok_encode(context))
    facts = []
    for answer in (" one", " another answer that is much longer than the first"):
        lm._loglikelihood_tokens([((context, answer), ids, list(lm.tok_encode(answer)))])
        facts.append(lm.facts[context])
    assert facts[0].msr == facts[1].msr and facts[0].tokens == len(ids) and 0 < facts[0].msr < 1


def test_generation_leaves_facts_and_cuts_the_middle(model, tokenizer):
    lm = RoutedLM(model, tokenizer, 1, batch_size=2, max_length=40)
    assert lm.max_length == 40
    text = "".join(chr(40 + i) for i in range(60))
    ids, mask = lm.tok_batch_encode([text, "short"], left_truncate_len=32)
    assert ids.shape == mask.shape == (2, 32) and mask.sum(1).tolist() == [32, 5]
    lm._model_generate(ids, max_length=36, stop=[], attention_mask=mask, do_sample=False)
    long, short = lm.facts[text], lm.facts["short"]
    assert (long.tokens, long.cut, short.tokens, short.cut) == (32, 28, 5, 0)
    assert long.msr == 1 and long.esr_all > 0 and long.prefill_seconds > 0
    with override_routes(model, 0):
        assert model(random_ids(1, 5)).logits.shape[1] == 5  # the override is gone with the call


@pytest.mark.parametrize("task", ["niah_single_1", "ruler_vt", "ruler_cwe", "ruler_fwe"])
def test_samples_fit_their_length_and_are_cached(task, tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path))
    _, words = load_backbone("tiny")
    made = ruler.documents(task, 1024, 3, words, seed=1)
    assert len(made) == 3 and made == ruler.documents(task, 1024, 3, words, seed=1)
    assert len(list(tmp_path.rglob("*.jsonl"))) == 1
    for doc in made:
        prompt = words(f"{doc['input']} {doc['gen_prefix']}")["input_ids"]
        assert 0.8 * 1024 < len(prompt) + ruler.new_tokens(task) <= 1024
    assert task != "ruler_cwe" or made[0]["input"].count("numbered list of words") == 2
    assert made != ruler.documents(task, 1024, 3, words, seed=2)


def test_tasks_without_their_data_are_named(tokenizer):
    with pytest.raises(ValueError, match="task ruler_qa_squad needs SQuAD, which this version cannot read"):
        ruler.documents("ruler_qa_squad", 1024, 1, tokenizer, 0)
    with pytest.raises(ValueError, match="unknown RULER task 'niah'"):
        ruler.documents("niah", 1024, 1, tokenizer, 0)
    with pytest.raises(ValueError, match="length 64 is too short"):
        ruler.documents("ruler_vt", 64, 1, tokenizer, 0)


def test_one_command_compares_methods_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ruler, "NEW_TOKENS", {"ruler_fwe": 4})
    model, words = load_backbone("tiny")
    model.config.max_position_embeddings = 2048
    monkeypatch.setattr(runner, "_load", lambda *_: (attach(model, small_config()), words))
    plan = runner.Plan(
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
    methods = [Method.parse(name) for name in ("dense", "streaming", "xattention:0.5", "xattention")]
    rows = runner.run(plan, methods, tmp_path / "out")
    assert [(r["method"], r["n"], r["msr"]) for r in rows[:2]] == [("dense", 2, 0), ("streaming", 2, 1)]
    assert rows[0]["esr_all"] == 0 < rows[3]["esr_all"] < rows[2]["esr_all"] < 1
    file = tmp_path / "out" / "samples" / "dense.ruler_fwe.1024.jsonl"
    facts, *samples = map(json.loads, file.read_text().splitlines())
    assert facts["seed"] == 0 and set(samples[0]) >= {"prediction", "references", "score", "msr", "esr_last", "tokens"}
    monkeypatch.setattr(runner, "_evaluate", lambda *_: pytest.fail("a finished result was made again"))
    assert runner.run(plan, methods, tmp_path / "out") == rows
    assert "mean of tasks" in summary.summary_table(rows) and "±" in summary.summary_table(rows)
    assert all(path.stat().st_size > 5000 for path in summary.write_summary(rows, tmp_path / "out"))
    stored = json.loads((tmp_path / "out" / "samples" / "xattention_0.5.ruler_fwe.1024.jsonl").open().readline())
    assert (stored["sparse"]["route1"], stored["sparse"]["threshold"]) == ("xattention", 0.5)
    with pytest.raises(ValueError, match="not all different"):
        runner.run(plan, [methods[0]] * 2, tmp_path / "out")


def test_intervals_and_means():
    rows = [{"score": s} for s in (0.0, 1.0, 1.0, 0.0)]
    assert runner.interval(rows) == pytest.approx(1.96 * (1 / 3 / 4) ** 0.5)
    assert runner.interval(rows[:1]) == 0
    both = summary._mean([{"score": 1.0, "n": 1}, {"score": 0.0, "n": 3}])
    assert both == {"plain": 0.5, "weighted": 0.25, "n": 4}
