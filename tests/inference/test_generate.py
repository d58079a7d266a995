"""`elastic.load` and `elastic.generate`: equality with plain generation, batches, interleaving, refused requests."""

from dataclasses import replace
from threading import Thread

import pytest
from transformers import DynamicCache, GenerationConfig

from elastic.config import ElasticConfig
from elastic.inference.generate import generate, load, new_cache, route_report
from elastic.model import loading
from elastic.model.attach import attach, elastic_config, override_routes
from elastic.model.checkpoint import save_elastic
from tests.helpers.models import KV_HEADS, LAYERS, small_config, tiny_model, varied_routers
from tests.helpers.turns import Turns

SHORT = "key k1 5 4 3 2 " + "f1 f2 f3 " * 6 + "find k1"
LONG = "f4 f5 " * 30 + "key k3 1 2 3 4 " + "f6 " * 20 + "find k3"
OTHER = "p1 p2 p3 " * 14 + "repeat on p3"


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer("tiny")


def random_model(family):
    """Random weights, varied routers, no end-of-sequence token, so that every answer has full length."""
    model = attach(tiny_model(family, eos_token_id=None), small_config())
    varied_routers(model)
    return model


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request):
    return random_model(request.param)


@pytest.fixture
def trained(tmp_path):
    model, _ = loading.load_backbone("tiny")
    attach(model, small_config())
    varied_routers(model)
    return save_elastic(tmp_path / "ck", model, "tiny"), model


def test_load_and_generate(trained, tokenizer):
    path, original = trained
    model, loaded_tokenizer = load(path)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert elastic_config(model) == small_config()
    one, two = (generate(m, tokenizer, LONG, max_new_tokens=6)[0] for m in (original, model))
    assert one == two
    assert loaded_tokenizer.padding_side == "left"
    assert two.report.backend == "torch (cpu)"
    assert two.report.prompt_tokens == len(tokenizer(LONG)["input_ids"]) + 2  # <user> and <assistant>


def test_generate_equals_the_ordinary_call(model, tokenizer):
    ids = tokenizer(f"<user> {LONG} <assistant>", return_tensors="pt")["input_ids"]
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    result = generate(model, tokenizer, LONG, max_new_tokens=8)[0]
    assert result.token_ids == plain
    assert result.text == tokenizer.decode(plain, skip_special_tokens=True)


def test_routes_are_mixed_and_differ_between_prompts(model, tokenizer):
    reports = [g.report for g in generate(model, tokenizer, [SHORT, LONG, OTHER], max_new_tokens=1)]
    assert len({r.route for r in reports}) > 1
    assert {head for r in reports for layer in r.route for head in layer} == {0, 1}
    assert (len(reports[0].route), len(reports[0].route[0])) == (LAYERS, KV_HEADS)


def test_a_batch_equals_single_prompts(model, tokenizer):
    prompts = [SHORT, LONG, OTHER]
    together = generate(model, tokenizer, prompts, max_new_tokens=8)
    assert together == [generate(model, tokenizer, prompt, max_new_tokens=8)[0] for prompt in prompts]


def test_a_conversation_is_one_prompt(model, tokenizer):
    messages = [{"role": "user", "content": LONG}]
    assert generate(model, tokenizer, messages, 4) == generate(model, tokenizer, LONG, 4)
    longer = [*messages, {"role": "assistant", "content": "1 2 3 4"}, {"role": "user", "content": "find k3"}]
    assert generate(model, tokenizer, longer, 4)[0].report.prompt_tokens == 99


def test_raw_text(model, tokenizer):
    raw = generate(model, tokenizer, f"<user> {LONG} <assistant>", 4, chat_template=False)
    assert raw == generate(model, tokenizer, LONG, 4)


def test_two_interleaved_requests_do_not_mix(model, tokenizer):
    """Two threads whose forward passes alternate: each answer equals the one alone."""
    from transformers.generation.streamers import BaseStreamer

    alone = [generate(model, tokenizer, prompt, max_new_tokens=6)[0] for prompt in (LONG, OTHER)]
    assert alone[0].report.route != alone[1].report.route
    order, found, turns = [], [None, None], Turns()

    class InTurn(BaseStreamer):
        def __init__(self, me):
            self.me = me

        def put(self, value):
            order.append(self.me)
            turns.give(1 - self.me)
            turns.wait(self.me)

        def end(self):
            turns.finish(self.me)

    def run(me, prompt):
        turns.wait(me)
        found[me] = generate(model, tokenizer, prompt, max_new_tokens=6, streamer=InTurn(me))[0]

    threads = [Thread(target=run, args=(me, prompt)) for me, prompt in enumerate((LONG, OTHER))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert order[:8] == [0, 1, 0, 1, 0, 1, 0, 1]
    assert found == alone


def test_both_kinds_of_cache_answer_alike_and_say_what_they_hold(model, tokenizer):
    prompts = [SHORT, LONG, OTHER]
    full, elastic = (generate(model, tokenizer, prompts, 8, kv_cache=kind) for kind in ("full", "elastic"))
    assert [g.token_ids for g in full] == [g.token_ids for g in elastic]
    assert {g.report.kv_cache for g in full} == {"full"} and {g.report.kv_cache for g in elastic} == {"elastic"}
    assert sum(g.report.kv_bytes_held for g in elastic) < sum(g.report.kv_bytes_held for g in full)
    assert generate(model, tokenizer, prompts, 8) == full  # the configuration's default
    with pytest.raises(ValueError, match="kv_cache='half' is not known; use one of full, elastic"):
        generate(model, tokenizer, SHORT, kv_cache="half")


def test_a_report_for_an_ordinary_call(model, tokenizer):
    ids = tokenizer(f"<user> {LONG} <assistant>", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    expected = generate(model, tokenizer, LONG, max_new_tokens=3)[0].report
    plain = route_report(model, model.generate(ids, **options).past_key_values)[0]
    heads = LAYERS * KV_HEADS
    assert plain == replace(expected, kv_bytes_held=heads * (ids.shape[1] + 2) * 2 * 16 * 4)
    cache = new_cache(model, 3)
    model.generate(ids, past_key_values=cache, **options)
    assert route_report(model, cache)[0] == expected
    with pytest.raises(ValueError, match="DynamicCache holds no routes"):
        route_report(model, DynamicCache(config=model.config))


def test_load_sets_the_kind_of_cache(trained, tokenizer):
    model, _ = load(trained[0], kv_cache="elastic")
    assert elastic_config(model).kv_cache == "elastic"
    assert generate(model, tokenizer, LONG, 4)[0].report.kv_cache == "elastic"


def test_sparsity_bias_moves_every_head_and_is_put_back(model, tokenizer):
    reports = [generate(model, tokenizer, LONG, 1, sparsity_bias=b)[0].report for b in (-1e6, 1e6)]
    assert [r.msr for r in reports] == [0.0, 1.0]
    assert reports[0].kv_bytes_kept == reports[0].kv_bytes_full > reports[1].kv_bytes_kept
    assert elastic_config(model).sparsity_bias == 0.0
    with pytest.raises(ValueError, match="sparsity_bias=nan is not a finite number"):
        generate(model, tokenizer, LONG, 1, sparsity_bias=float("nan"))
    assert elastic_config(model).sparsity_bias == 0.0


def test_dense_generation_equals_the_stock_model(tokenizer):
    model, stock = random_model("llama"), tiny_model("llama", eos_token_id=None)
    ids = tokenizer(f"<user> {LONG} <assistant>", return_tensors="pt")["input_ids"]
    with override_routes(model, 0):
        result = generate(model, tokenizer, LONG, max_new_tokens=8)[0]
    assert result.token_ids == stock.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
    assert result.report.msr == 0.0


def test_beams_share_their_prompts_route(model, tokenizer):
    beams = generate(model, tokenizer, [LONG, OTHER], max_new_tokens=4, num_beams=3)
    greedy = generate(model, tokenizer, [LONG, OTHER], max_new_tokens=4)
    assert [b.report for b in beams] == [g.report for g in greedy]


def test_answers_end_at_the_end_of_sequence(trained, tokenizer):
    model = trained[1]
    with override_routes(model, 0):
        results = generate(model, tokenizer, [LONG, SHORT], max_new_tokens=20)
    for result in results:
        assert result.token_ids.count(tokenizer.eos_token_id) <= 1
        assert tokenizer.pad_token_id not in result.token_ids
        assert "<" not in result.text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty; write at least one word"),
        ("  \n", "the prompt is empty"),
        (["f1", ""], "the prompt is empty"),
        ([], "the list of prompts is empty"),
        ([{"role": "user", "content": " "}], "has no role or no content"),
        ([{"content": "f1"}], r"message \{'content': 'f1'\} has no role or no content"),
        (
            ["f1", {"role": "user", "content": "f1"}],
            "prompt is a list of dict, str; expected texts, or one conversation",
        ),
        ([1, 2], "prompt is a list of int"),
    ],
)
def test_prompts_that_are_refused(model, tokenizer, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, prompt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not a whole number of 1 or more"),
        ({"max_new_tokens": True}, "max_new_tokens=True is not a whole number"),
        ({"max_new_tokens": 500}, "has 90 tokens and 500 new ones.*at most 512; shorten.*max_new_tokens to 422"),
        ({"past_key_values": None}, "generate sets past_key_values itself; for full control call model.generate"),
        ({"prefill_chunk_size": -1}, "prefill_chunk_size=-1 is not a whole number of 1 or more tokens"),
        ({"penalty_alpha": 0.6}, "penalty_alpha=0.6 is not supported: contrastive search"),
        ({"custom_generate": "x/y"}, "foreign code may not keep the routes"),
        ({"cache_implementation": "static"}, "kv_cache='full' or 'elastic' chooses what it keeps"),
        ({"use_cache": False}, "use_cache=False is not supported: routes live on the cache"),
        (
            {"generation_config": GenerationConfig(max_new_tokens=5)},
            "generation_config has max_new_tokens=5, the call max_new_tokens=64; give the call what you want",
        ),
    ],
)
def test_options_that_are_refused(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, tokenizer, LONG, **options)


def test_models_that_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"this model has no routers; load it with elastic\.load"):
        generate(tiny_model(), tokenizer, "f1")
    training = attach(tiny_model(), small_config()).train()
    with pytest.raises(ValueError, match=r"in training mode, where routers draw at random; call model\.eval"):
        generate(training, tokenizer, "f1")


def test_a_tokenizer_without_template_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="chat template, which this tokenizer does not have; pass a text with"):
        generate(model, tokenizer, "f1")
    assert generate(model, tokenizer, "f1 f2", 2, chat_template=False)


def test_messages_need_the_template(model, tokenizer):
    with pytest.raises(ValueError, match="but chat_template=False was given"):
        generate(model, tokenizer, [{"role": "user", "content": "f1"}], chat_template=False)


def test_a_streamer_takes_one_prompt(model, tokenizer):
    with pytest.raises(ValueError, match="a streamer shows one answer but 2 were asked for"):
        generate(model, tokenizer, ["f1", "f2"], streamer=object())
    with pytest.raises(ValueError, match="a streamer shows one answer but 3 were asked for"):
        generate(model, tokenizer, "f1", streamer=object(), num_return_sequences=3, do_sample=True)


def test_load_refuses(trained, tmp_path):
    path, _ = trained
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no backbone '\./none'"):
        load(path, backbone="./none")
    with pytest.raises(ValueError, match="dtype='int8' is not supported"):
        load(path, dtype="int8")
    tiny_model().save_pretrained(tmp_path / "other")
    loading.load_tokenizer("tiny").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="head_dim=32, but this backbone has head_dim=16"):
        load(path, backbone=str(tmp_path / "other"))


def test_bfloat16_halves_the_cache(trained, tokenizer):
    path, _ = trained
    full, half = (generate(load(path, dtype=d)[0], tokenizer, LONG, 2)[0].report for d in ("float32", "bfloat16"))
    assert full.kv_bytes_full == 2 * half.kv_bytes_full


def test_lazy_names():
    import elastic

    assert (elastic.load, elastic.generate) == (load, generate)
    assert isinstance(small_config(), ElasticConfig)
