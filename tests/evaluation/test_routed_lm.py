"""The model under lm-evaluation-harness: equal to the plain one where every head is full, routed on contexts alone,
with or without the cache that CUDA graphs need.
"""

import copy
from contextlib import nullcontext

import pytest

from elastic.model.attach import attach, override_routes
from tests.helpers.models import random_ids, small_config, tiny_model, varied_routers

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
from elastic.evaluation import routed_lm
from elastic.evaluation.routed_lm import RoutedLM, cut_middle


def letters():
    """A tokenizer with one token a character, so that lengths are easy to see."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = [chr(i) for i in range(32, 127)]
    made = Tokenizer(
        models.WordLevel({c: i + 2 for i, c in enumerate(characters)} | {"<pad>": 0, "<e>": 1}, unk_token=" ")
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<e>", unk_token=" ")
    fast.padding_side = "left"
    return fast


@pytest.fixture(scope="module")
def tokenizer():
    return letters()


@pytest.fixture(scope="module")
def model():
    model = attach(tiny_model(), small_config())
    varied_routers(model)
    return model.eval()


def generated(lm, texts, options):
    """Answers through the harness' own batching."""
    from lm_eval.api.instance import Instance

    requests = [
        Instance(request_type="generate_until", doc={}, arguments=(text, options), idx=i, metadata=("t", i, 1))
        for i, text in enumerate(texts)
    ]
    return lm.generate_until(requests, disable_tqdm=True)


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


def test_scores_of_whole_tasks_are_those_of_the_plain_harness(model, tokenizer):
    """A task that generates and one that ranks continuations, through `simple_evaluate`: plain HFLM on the stock model,
    ours on the attached one, every head full.
    """
    import lm_eval
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # whose thousands of task files take long to read
    docs = [{"text": f"document {i} says {'ab' * (3 * i + 2)}", "choices": ["one", "two words", "3"]} for i in range(7)]
    plain = HFLM(pretrained=tiny_model(), tokenizer=tokenizer, batch_size=1)
    common = {
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "dataset_path": "",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "metadata": {"version": 1.0},
    }
    kinds = {
        "generate_until": {
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"do_sample": False, "max_gen_toks": 5, "until": []},
            "process_results": lambda doc, results: {"score": float(len(set(results[0])))},
            "metric_list": [{"metric": "score", "aggregation": "mean", "higher_is_better": True}],
        },
        "multiple_choice": {
            "doc_to_target": 1,
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
    }
    for kind, own in kinds.items():
        found = []
        for lm in (plain, RoutedLM(model, tokenizer, 0, batch_size=3)):
            task = ConfigurableTask(config={"task": f"own_{kind}", "output_type": kind, **common, **own})
            options = {"log_samples": True, "bootstrap_iters": 0, "verbosity": "ERROR", "task_manager": manager}
            found.append(lm_eval.simple_evaluate(model=lm, tasks=[task], **options))
        one, other = (result["results"][f"own_{kind}"] for result in found)
        scores = [key for key in one if key.startswith(("score", "acc"))]
        assert scores and all(one[key] == other[key] for key in scores)
        if kind == "generate_until":
            texts = [[s["resps"][0][0] for s in result["samples"][f"own_{kind}"]] for result in found]
            assert texts[0] == texts[1] and any(texts[0])


def test_routes_follow_from_the_context_alone(model, tokenizer):
    lm = RoutedLM(model, tokenizer, None, batch_size=3)
    ratios = []
    for context in ("a context of some length to be routed", "0123456789" * 4, "AbCdEfGhIj" * 4):
        ids, stats = list(lm.tok_encode(context)), []
        for answer in (" one", " another answer that is much longer than the first"):
            lm._loglikelihood_tokens([((context, answer), ids, list(lm.tok_encode(answer)))])
            stats.append(lm.prefill_stats[context])
        assert stats[0].msr == stats[1].msr and stats[0].tokens == len(ids)
        ratios.append(stats[0].msr)
    assert len(set(ratios)) > 1  # the routers had something to decide


def test_generation_leaves_facts_and_cuts_the_middle(model, tokenizer):
    lm = RoutedLM(model, tokenizer, 1, batch_size=2, max_length=40)
    assert lm.max_length == 40
    text = "".join(chr(40 + i) for i in range(60))
    ids, mask = lm.tok_batch_encode([text, "short"], left_truncate_len=32)
    assert ids.shape == mask.shape == (2, 32) and mask.sum(1).tolist() == [32, 5]
    lm._model_generate(ids, max_length=36, stop=[], attention_mask=mask, do_sample=False)
    long, short = lm.prefill_stats[text], lm.prefill_stats["short"]
    assert (long.tokens, long.cut, short.tokens, short.cut) == (32, 28, 5, 0)
    assert long.msr == 1 and long.esr_all > 0 and long.prefill_seconds > 0
    with override_routes(model, 0):
        assert model(random_ids(1, 5)).logits.shape[1] == 5  # the override is gone with the call


def test_the_cache_of_cuda_graphs_gives_the_same_answers(model, tokenizer, monkeypatch):
    """Left padding, a route of its own for each sample; the graph itself needs a GPU (`test_routed_lm_gpu.py`)."""
    texts, options = ["a short text", "x" * 70, "the quick brown fox"], {"until": [], "max_gen_toks": 9}
    plain = RoutedLM(model, tokenizer, None, batch_size=3)
    wanted = generated(plain, texts, options)
    caches = []
    monkeypatch.setattr(routed_lm, "can_graph", lambda *_: True)
    monkeypatch.setattr(routed_lm, "graphed", lambda _, cache: caches.append(cache) or nullcontext())
    other = RoutedLM(model, tokenizer, None, batch_size=3)
    assert generated(other, texts, options) == wanted and any(wanted)
    (cache,) = caches
    assert cache.config.kv_cache == "full" and cache.reserve == 9
    for text in texts:
        one, two = plain.prefill_stats[text], other.prefill_stats[text]
        assert (one.msr, one.esr_all, one.tokens) == (two.msr, two.esr_all, two.tokens)
    assert len({plain.prefill_stats[text].msr for text in texts}) > 1


def test_answers_end_without_reading_every_step(model, tokenizer, monkeypatch):
    """The harness' criterion decodes the last tokens of every row at every step; it is left out for the token at which
    `generate` ends by itself, and kept for other texts.
    """
    asked = []
    monkeypatch.setattr(
        routed_lm.HFLM, "_model_generate", lambda self, context, length, stop, **more: asked.append(stop) or more["x"]
    )
    lm = RoutedLM(model, tokenizer, 0, batch_size=1)
    monkeypatch.setattr(routed_lm, "route_of", lambda cache: (_ for _ in ()).throw(KeyError))
    for ends in (tokenizer.eos_token_id, None):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        with pytest.raises(KeyError):
            lm._model_generate(random_ids(1, 4), 6, ["<e>", "stop"], x=None)
    assert asked == [["stop"], ["<e>", "stop"]]


def test_prompts_are_encoded_at_once_as_the_harness_encodes_them(model, tokenizer, monkeypatch):
    texts, options, seen = ["a short text", "<e>begun", "x" * 70], {"until": [], "max_gen_toks": 2}, {}
    lm = RoutedLM(model, tokenizer, 0, batch_size=2)
    wanted = {text: routed_lm.HFLM.tok_encode(lm, text) for text in texts}
    monkeypatch.setattr(RoutedLM, "_keep", lambda self, *_: seen.update(self._encoded))
    generated(lm, texts, options)
    assert seen == {text: wanted[text] for text in texts if text != "<e>begun"}
    assert not lm._encoded and lm.tok_encode(texts[0]) == wanted[texts[0]]
    assert lm.tok_encode(texts[0], left_truncate_len=3) == wanted[texts[0]][-3:]


def test_routers_see_what_the_user_wrote(model, tokenizer, monkeypatch):
    """Through the chat template, the beginning of the answer and the cut in the middle, for answers and likelihoods."""
    seen, chatty = [], copy.deepcopy(tokenizer)
    chatty.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    lm = RoutedLM(model, chatty, None, batch_size=2, max_length=64)
    monkeypatch.setattr(RoutedLM, "_keep", lambda self, *_: seen.extend(self._waiting))
    chats = [[{"role": "user", "content": "a lamp " * n}, {"role": "assistant", "content": "It"}] for n in (4, 90)]
    texts = [lm.apply_chat_template(chat, add_generation_prompt=False) for chat in chats]
    generated(lm, texts, {"until": [], "max_gen_toks": 2})
    lm._loglikelihood_tokens([((text, " is"), lm.tok_encode(text), [5, 6]) for text in texts])
    assert len(seen) == 4
    for text, prompt, cut in seen:
        first, last = prompt.user
        words = chatty.decode(prompt.ids[first:last]).replace(" ", "")
        assert words.startswith("alampalamp") and words.endswith("alamp") and set(words) == set("alamp")
        assert (cut > 0) == (text == texts[1]) and 0 < first < last < len(prompt)


@pytest.mark.parametrize("size", [1, 3])
def test_rolling_windows_are_read_as_prompts(model, tokenizer, size):
    """Each under the routes that a plain pass of the window has; all heads full, the plain likelihood."""
    import torch
    from lm_eval.api.instance import Instance

    texts = ["a short text", "x yz" * 30]  # of one window and of several
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    for route in (None, 0):
        lm = RoutedLM(model, tokenizer, route, batch_size=size, max_length=50)
        found = lm.loglikelihood_rolling(requests, disable_tqdm=True)
        for text, total in zip(texts, found, strict=True):
            ids, expected = [lm.prefix_token_id, *lm.tok_encode(text)], 0.0
            for start in range(0, len(ids) - 1, 50):
                answer = ids[start + 1 : start + 51]
                row = ids[max(0, start + len(answer) - 50) : start + len(answer)]
                with torch.no_grad(), override_routes(model, route) if route is not None else nullcontext():
                    logits = model(torch.tensor([row]), use_cache=False).logits[0].float().log_softmax(-1)
                picked = logits[-len(answer) :].gather(1, torch.tensor(answer)[:, None])
                expected += float(picked.sum())
            assert total == pytest.approx(expected, rel=1e-4)
