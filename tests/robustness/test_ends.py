"""A call's own ends of an answer: token ids and strings, wherever they are set."""

import pytest
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
    word = tokenizer.decode(whole.token_ids[2:3])
    found = generate(model, tokenizer, "the key is", 8, chat_template=False, stop_strings=[word])[0]
    assert found.token_ids == whole.token_ids[: len(found.token_ids)] and len(found.token_ids) <= 3
