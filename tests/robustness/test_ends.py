"""A call's own ends of an answer: token ids and strings, wherever they are set."""

import pytest
import torch
from transformers import GenerationConfig

from elastic.inference.generate import generate
from elastic.model.attach import attach
from elastic.model.loading import load_tokenizer
from tests.helpers.models import FAMILIES, small_bpe, small_config, tiny_model, varied_routers

PROMPTS = ["f1 f2 f3 find k1", "f4 f5 " * 20 + "find k3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calls_own_ends_are_obeyed(family):
    tokenizer = load_tokenizer("tiny")
    model = attach(tiny_model(family, eos_token_id=None, initializer_range=0.3), small_config())
    varied_routers(model)
    whole = [found.token_ids for found in generate(model, tokenizer, PROMPTS, 12)]
    end = whole[0][3]
    cut = [ids[: ids.index(end) + 1] if end in ids else ids for ids in whole]
    for options in (
        {"eos_token_id": end},
        {"eos_token_id": [end]},
        {"generation_config": GenerationConfig(eos_token_id=end)},
    ):
        assert [found.token_ids for found in generate(model, tokenizer, PROMPTS, 12, **options)] == cut


def test_stop_strings_end_an_answer():
    tokenizer = small_bpe()
    model = attach(tiny_model(eos_token_id=None, vocab_size=6000, initializer_range=0.3), small_config())
    whole = generate(model, tokenizer, "the key is", 8, chat_template=False)[0]
    words = [tokenizer.decode([token]) for token in whole.token_ids]
    place = next(i for i, word in enumerate(words) if word.isascii())  # others may be a part of a character
    found = generate(model, tokenizer, "the key is", 8, chat_template=False, stop_strings=[words[place]])[0]
    assert found.token_ids == whole.token_ids[: len(found.token_ids)] and 0 < len(found.token_ids) <= place + 1 < 8


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}], ids=["sampled", "beams"])
def test_several_answers_to_a_prompt_follow_each_other(options):
    tokenizer = load_tokenizer("tiny")
    model = attach(tiny_model(eos_token_id=None, initializer_range=0.3), small_config())
    varied_routers(model)
    torch.manual_seed(0)
    found = generate(model, tokenizer, PROMPTS, 4, num_return_sequences=2, **options)
    alone = [generate(model, tokenizer, prompt, 4)[0].report for prompt in PROMPTS]
    assert [answer.report.route for answer in found] == [report.route for report in alone for _ in range(2)]
    assert [answer.report.prompt_tokens for answer in found] == [one.prompt_tokens for one in alone for _ in range(2)]
    torch.manual_seed(0)
    twice = GenerationConfig(num_return_sequences=2, **options)
    again = generate(model, tokenizer, PROMPTS, 4, generation_config=twice)
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in found]
    assert any(one.token_ids != two.token_ids for one, two in zip(found[::2], found[1::2], strict=True))
    if "num_beams" in options:
        best = generate(model, tokenizer, PROMPTS, 4, **options)
        assert [answer.token_ids for answer in best] == [answer.token_ids for answer in found[::2]]


def test_a_calls_own_padding_is_used():
    """It pads prompts, which nothing reads, and answers that end early."""
    tokenizer = load_tokenizer("tiny")
    model = attach(tiny_model(eos_token_id=None, initializer_range=0.3), small_config())
    whole = generate(model, tokenizer, PROMPTS, 8)
    given = []
    inner = model.generate
    model.generate = lambda ids, **options: (given.append((ids, options["pad_token_id"])), inner(ids, **options))[1]
    found = generate(model, tokenizer, PROMPTS, 8, pad_token_id=5)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in whole]
    ((ids, pad),) = given
    assert pad == 5 and ids[0, 0] == 5
