"""Answers made token by token are those of `elastic.generate`, whatever the model's generation config asks for."""

from contextlib import suppress
from dataclasses import replace

import numpy
import pytest
import torch
from transformers import GenerationMixin
from transformers.generation.logits_process import EtaLogitsWarper, LogitsProcessorList

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.data.prompts import EncodedPrompt, encode_messages
from elastic.inference import stepwise as stepwise_module
from elastic.inference.decode_graph import DecodeGraph
from elastic.inference.generate import generate, route_report
from elastic.inference.stepwise import Asked, begin, draw_each
from elastic.model import layer_hooks
from tests.helpers.models import varied_routers
from tests.helpers.operations import Operations
from tests.helpers.server import tiny_model

PROMPT = "key k1 5 4 3 2 " + "f1 f2 f3 " * 6 + "find k1"
STEPS = 24
ASKED = {  # by name: the model's own settings, and the call's
    "greedy": ({}, {}),
    "sampled": ({}, {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "top_k": 0}),
    "repetition penalty": ({"repetition_penalty": 3.0}, {}),
    "no repeats": ({"no_repeat_ngram_size": 2}, {}),
    "the model's own sampling": ({"top_k": 3, "temperature": 1.5, "repetition_penalty": 1.2}, {"do_sample": True}),
    "another prompt's words": ({"encoder_repetition_penalty": 4.0}, {}),
    "shortest answer": ({"min_new_tokens": 20, "eos_token_id": 1}, {}),
    "forced end": ({"forced_eos_token_id": 7}, {}),
    "looked up": ({"prompt_lookup_num_tokens": 4}, {}),
    "in pieces": ({"prefill_chunk_size": 8}, {}),
}


@pytest.fixture
def routed():
    model, tokenizer = tiny_model()
    varied_routers(model)
    return model, tokenizer


def stepwise(routed, *texts, seed=None, sparsity_bias=None, **options):
    """Tokens and report of the answer to each text, all read in one pass; of one text, not in a list."""
    model, tokenizer = routed
    prompts = [encode_messages([{"role": "user", "content": text}], tokenizer) for text in texts or [PROMPT]]
    drawings, token, cache = begin(model, [Asked(p, STEPS, seed, options) for p in prompts], sparsity_bias)
    reports, tokens = route_report(model, cache), [token]
    for _ in range(STEPS - 1):
        with torch.no_grad():
            tokens.append(draw_each(drawings, DecodeGraph(model, cache).run(tokens[-1])[:, -1]))
    found = list(zip(torch.cat(tokens, 1).tolist(), reports, strict=True))
    return found if texts else found[0]


@pytest.mark.parametrize("name", ASKED)
def test_its_answers_are_those_of_generate(routed, name):
    own, asked = ASKED[name]
    usual = generate(*routed, PROMPT, max_new_tokens=STEPS)[0].token_ids
    for setting, value in own.items():
        setattr(routed[0].generation_config, setting, value)
    for bias in (None, -1e4, 1e4):
        torch.manual_seed(11)
        expected = generate(*routed, PROMPT, max_new_tokens=STEPS, sparsity_bias=bias, **asked)[0]
        found, report = stepwise(routed, sparsity_bias=bias, **{**asked, **({"seed": 11} if asked else {})})
        assert found[: len(expected.token_ids)] == expected.token_ids
        assert report.route == expected.report.route and report.msr == expected.report.msr
    if name not in ("greedy", "looked up", "in pieces"):
        torch.manual_seed(11)
        assert generate(*routed, PROMPT, max_new_tokens=STEPS, **asked)[0].token_ids != usual  # the setting matters


@pytest.mark.parametrize("name", ASKED)
def test_prompts_that_are_read_together_are_answered_as_each_alone(routed, name):
    own, asked = ASKED[name]
    if name == "in pieces":  # all of them in the first
        own = {"prefill_chunk_size": 200}
    if asked:
        asked = {**asked, "do_sample": False}  # what is drawn at random follows the order of the rows
    for setting, value in own.items():
        setattr(routed[0].generation_config, setting, value)
    texts = [f"{'f1 f3 ' * n} {PROMPT}" for n in (0, 9, 2, 40)]
    for bias in (None, -1e4, 1e4):
        for text, (found, report) in zip(texts, stepwise(routed, *texts, sparsity_bias=bias, **asked), strict=True):
            expected = generate(*routed, text, max_new_tokens=STEPS, sparsity_bias=bias, **asked)[0]
            assert found[: len(expected.token_ids)] == expected.token_ids
            assert report.route == expected.report.route and report.prompt_tokens == expected.report.prompt_tokens


def test_prompts_of_several_pieces_are_not_read_together(routed):
    """Which of a prompt's tokens attend in full would depend on the others."""
    routed[0].generation_config.prefill_chunk_size = 8
    with pytest.raises(ValueError, match=r"prompts of up to \d+ tokens are not read together in pieces of 8"):
        stepwise(routed, PROMPT, "find k1")


def test_seeds_leave_torchs_random_numbers_alone(routed):
    state = torch.get_rng_state()
    asked = ASKED["sampled"][1]
    assert stepwise(routed, seed=-3, **asked) == stepwise(routed, seed=-3, **asked) != stepwise(routed, seed=4, **asked)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_made_token_by_token_is_refused(routed):
    routed[0].generation_config.num_beams = 3
    with pytest.raises(ValueError, match="set num_beams=1"):
        stepwise(routed)
    routed[0].generation_config.num_beams = 1
    routed[0].train()
    with pytest.raises(ValueError, match="in training mode"):
        stepwise(routed)


class Whole(EtaLogitsWarper):
    """Of a kind that is not known to look at logits alone."""


SETTINGS = {  # by name: the model's own settings, the call's, and how often three prompts ask transformers for them
    "greedy": ({}, {}, 1),
    "sampled": ({}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}, 1),
    "the model's own sampling": ({"top_k": 3, "temperature": 1.5, "min_p": 0.1}, {"do_sample": True}, 1),
    "repetition penalty": ({"repetition_penalty": 3.0}, {}, 3),
    "another prompt's words": ({"encoder_repetition_penalty": 4.0}, {}, 3),
    "shortest answer": ({"min_new_tokens": 5, "eos_token_id": 1}, {}, 3),
    "begin": ({"begin_suppress_tokens": [5]}, {}, 3),
    "forced end": ({"forced_eos_token_id": 7}, {}, 3),
    "biased": ({"sequence_bias": {(5,): 2.0}}, {}, 3),
    "own processor": ({}, {"logits_processor": LogitsProcessorList([Whole(0.1)])}, 3),
}


@pytest.fixture
def prepared(monkeypatch):
    """The prompts for which transformers' `generate` was asked how tokens are drawn."""
    asked, ask = [], stepwise_module._asked_of_generate

    def noted(model, one, options):
        asked.append(one.prompt.ids)
        return ask(model, one, options)

    monkeypatch.setattr(stepwise_module, "_asked_of_generate", noted)
    return asked


@pytest.mark.parametrize("name", SETTINGS)
def test_transformers_is_asked_again_wherever_a_prompt_may_have_a_part(routed, prepared, name):
    own, options, times = SETTINGS[name]
    for setting, value in own.items():
        setattr(routed[0].generation_config, setting, value)
    prompts = [EncodedPrompt.whole(ids) for ids in ([5, 6, 7], [8, 9], [5])]
    found = [stepwise_module._drawing(routed[0], Asked(prompt, 9, 3, options)) for prompt in prompts]
    assert len(prepared) == times
    for prompt, drawing in zip(prompts, found, strict=True):
        known = times == 1
        assert (drawing.ids_1S is None) == known and (known or drawing.ids_1S[0].tolist() == prompt.ids)
        assert [type(one) for one in drawing.processors] == [type(one) for one in found[0].processors]
    assert len({id(drawing.generator) for drawing in found}) == 3


def test_what_is_known_of_settings_follows_every_later_change(routed, prepared):
    model, one = routed[0], Asked(EncodedPrompt.whole([5, 6, 7]), 9, None, {"do_sample": True})
    config, drawn = model.generation_config, []
    changes = [("temperature", 0.5), ("temperature", 0.25), ("top_k", 3), ("remove_invalid_values", 1),
               ("remove_invalid_values", True), ("eos_token_id", [1]), ("temperature", 0.5)]  # fmt: skip
    for at, (name, value) in enumerate(changes, 1):
        setattr(config, name, value)
        for _ in range(2):
            drawn.append([vars(each) for each in stepwise_module._drawing(model, one).processors])
        assert len(prepared) == at
    assert drawn[::2] == drawn[1::2] and drawn[0] == [{"temperature": 0.5}, drawn[0][1]]
    assert [len(each) for each in drawn[::2]] == [2, 2, 2, 2, 3, 3, 3]
    config.eos_token_id.append(2)  # in place
    stepwise_module._drawing(model, one)
    assert len(prepared) == len(changes) + 1
    with pytest.raises(ValueError, match="num_beams=1"):
        stepwise_module._drawing(model, replace(one, options={"num_beams": 2}))


@pytest.mark.parametrize("where", ["model", "class"])
@pytest.mark.parametrize("name", ["_get_logits_processor", "_prepare_generation_config"])
def test_code_that_is_not_transformers_own_is_always_asked(routed, prepared, monkeypatch, name, where):
    """Also code that came after the settings were learnt."""
    model, one = routed[0], Asked(EncodedPrompt.whole([5, 6, 7]), 9)
    stepwise_module._drawing(model, one)
    found = getattr(model if where == "model" else GenerationMixin, name)
    monkeypatch.setattr(
        model if where == "model" else GenerationMixin, name, lambda *call, **given: found(*call, **given),
        raising=False,
    )  # fmt: skip
    for _ in range(2):
        stepwise_module._drawing(model, one)
    assert len(prepared) == 3


def test_settings_of_which_the_type_cannot_be_told_are_always_asked(routed, prepared):
    """Two of NumPy's numbers may be the same bytes."""
    same = numpy.float64(0.5), numpy.float64(0.5).view(numpy.int64)
    for number in same:
        one = Asked(EncodedPrompt.whole([5, 6, 7]), 9, None, {"do_sample": True, "top_k": 0, "temperature": number})
        with suppress(ValueError):  # transformers refuses one of them
            assert stepwise_module._drawing(routed[0], one).processors[0].temperature is number
    assert len(prepared) == 2


def test_settings_that_another_thread_changes_meanwhile_are_not_learnt(routed, monkeypatch):
    model, one = routed[0], Asked(EncodedPrompt.whole([5, 6, 7]), 9, None, {"do_sample": True, "top_k": 0})
    ask, config = stepwise_module._asked_of_generate, model.generation_config

    def changed(*call):
        config.temperature = 0.25
        return ask(*call)

    config.temperature = 0.5
    with monkeypatch.context() as patch:
        patch.setattr(stepwise_module, "_asked_of_generate", changed)
        stepwise_module._drawing(model, one)
    for temperature in (0.5, 0.25):
        config.temperature = temperature
        assert stepwise_module._drawing(model, one).processors[0].temperature == temperature


def test_settings_that_another_thread_has_just_forgotten_are_learnt_again(routed, monkeypatch):
    class Forgetful(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()
            return found

    monkeypatch.setattr(stepwise_module, "_learnt", {routed[0]: Forgetful()})
    one = Asked(EncodedPrompt.whole([5, 6, 7]), 9)
    assert all(stepwise_module._drawing(routed[0], one).plain for _ in range(2))


def test_a_pass_is_prepared_on_the_host_which_then_knows_where_its_prompts_lie(routed, monkeypatch):
    """What the model is given is elsewhere, as on a GPU, and is not read back."""
    sent, given = [], []

    def elsewhere(values, device):
        sent.append((values, values.clone()))
        return sent[-1][1]

    def layout(*args):
        given.append(args[4])
        return batch_layout(*args)

    batch_layout = layer_hooks.batch_layout
    monkeypatch.setattr(layer_hooks, "batch_layout", layout)
    monkeypatch.setattr(stepwise_module, "sent", elsewhere)
    expected = stepwise(routed, PROMPT, "find k1")
    (mask,) = given
    assert mask.tolist() == [[1] * mask.shape[1], [0] * (mask.shape[1] - int(mask[1].sum())) + [1] * int(mask[1].sum())]
    assert any(mask is here for here, _ in sent) and not any(mask is there for _, there in sent)
    monkeypatch.undo()
    assert stepwise(routed, PROMPT, "find k1") == expected


def test_rows_that_are_drawn_alike_are_drawn_at_once(routed):
    model, prompts = routed[0], [EncodedPrompt.whole([5, 6, 7]), EncodedPrompt.whole([8, 9])]
    nearly_greedy, usual = {"do_sample": True, "top_k": 1, "temperature": 0.7}, {"do_sample": True, "top_k": 0}
    asked = [Asked(prompts[n % 2], 9, None, {**nearly_greedy, "top_p": 0.9 - n % 2 / 4}) for n in range(7)]
    asked += [Asked(prompts[0], 9), Asked(prompts[0], 9, 3, usual), Asked(prompts[1], 9, 3, usual)]
    drawings = [stepwise_module._drawing(model, one) for one in asked]
    logits = torch.randn(10, 97, generator=torch.Generator().manual_seed(0))
    token = draw_each(drawings, logits)
    assert torch.equal(token[:8, 0], logits[:8].argmax(-1))
    for at in (8, 9):
        drawing = stepwise_module._drawing(model, asked[at])
        assert torch.equal(token[at : at + 1], drawing.draw(logits[at : at + 1]))
    counts = []
    for rows in ([0, 2, 1], [0, 2, 4, 6, 1, 3, 5]):
        with Operations() as counted:
            draw_each([drawings[at] for at in rows], logits[rows])
        counts.append(counted.launched)
    assert counts[0] == counts[1]
    many = stepwise_module._drawing(model, Asked(prompts[0], 9, None, usual))
    assert len(draw_each([many] * 500, torch.zeros(1, 97).expand(500, -1)).unique()) > 80  # each by its own numbers
