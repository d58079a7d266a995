"""Answers made token by token are those of `elastic.generate`, whatever the model's generation config asks for."""

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.data.prompts import encode_messages
from elastic.inference.decode_graph import DecodeGraph
from elastic.inference.generate import generate, route_report
from elastic.inference.stepwise import begin
from tests.helpers.models import varied_routers
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


def stepwise(routed, **options):
    model, tokenizer = routed
    prompt = encode_messages([{"role": "user", "content": PROMPT}], tokenizer)
    drawing, cache = begin(model, prompt, max_new_tokens=STEPS, **options)
    report = route_report(model, cache)[0]
    for _ in range(STEPS - 1):
        with torch.no_grad():
            drawing.draw(DecodeGraph(model, cache).run(drawing.ids_1S[:, -1:])[:, -1])
    return drawing.ids_1S[0, len(prompt) :].tolist(), report


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
