"""Decisions follow from what the user wrote: template, system prompt and padding change nothing that routers pool, and
packed rows, padded batches, beams and later turns decide as the prompt alone.
"""

import json

import pytest
import torch

from elastic.cache.elastic_cache import ElasticCache
from elastic.config import ElasticConfig, RouterConfig
from elastic.data.prompts import EncodedPrompt
from elastic.files import unsealed
from elastic.inference.generate import answer_tokens, load, new_cache
from elastic.model import loading
from elastic.model.attach import attach, last_features, last_routes, user_wrote
from elastic.model.checkpoint import save_elastic
from tests.helpers.models import (
    FAMILIES,
    HYBRIDS,
    LINEAR,
    left_padded,
    random_ids,
    small_config,
    tiny_model,
    varied_routers,
)

USER = slice(12, 60)  # of 70 tokens; before it comes a system prompt, after it the template's end


def routed(family="llama", **router):
    config = small_config()
    model = attach(tiny_model(family), ElasticConfig(RouterConfig(pool_tokens=8, **router), config.sparse))
    varied_routers(model)
    return model


def decided(model, ids, **inputs):
    with torch.no_grad():
        model(ids, use_cache=False, **inputs)
    return last_routes(model).logits[:, :, :, 1] - last_routes(model).logits[:, :, :, 0]


def span(*places):
    return torch.tensor(places)


# What reaches the first router of a hybrid has been through a sliding layer, which sees the text before the user's.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*HYBRIDS, *LINEAR)])
def test_the_first_layer_sees_the_users_words_alone(family):
    model, ids, other = routed(family), random_ids(1, 70), random_ids(1, 33, seed=5)
    user = ids[:, USER]
    decided(model, ids, user_spans=span([12, 60]))
    here = last_features(model)[0]
    elsewhere = torch.cat([other, user, other[:, :3]], 1)
    decided(model, elsewhere, user_spans=span([33, 81]))
    torch.testing.assert_close(last_features(model)[0], here)
    decided(model, ids)
    assert not torch.allclose(last_features(model)[0], here)


def test_routers_of_older_checkpoints_see_the_whole_prompt():
    model, ids = routed(pool_over="prompt"), random_ids(1, 70)
    with_span = decided(model, ids, user_spans=span([12, 60]))
    assert torch.equal(with_span, decided(model, ids))


def test_a_checkpoint_from_before_pools_the_prompt(tmp_path):
    model, _ = loading.load_backbone("tiny")
    path = save_elastic(tmp_path / "ck", attach(model, small_config()), "tiny")
    metadata = unsealed((path / "elastic.json").read_text())
    assert metadata["config"]["router"].pop("pool_over") == "user"
    (path / "elastic.json").write_text(json.dumps(metadata))
    loaded, _ = load(path)
    assert loaded._elastic_handle.state.config.router.pool_over == "prompt"


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_packed_and_generated_prompts_decide_as_the_prompt_alone(family):
    model, ids = routed(family), random_ids(2, 70)
    alone = torch.cat([decided(model, row[None], user_spans=span([12, 60])) for row in ids], 1)

    padded, mask = left_padded(torch.cat([torch.ones(2, 9, dtype=torch.int64), ids], 1), [9, 9])
    spans = span([21, 69], [21, 69])
    torch.testing.assert_close(decided(model, padded, attention_mask=mask, user_spans=spans), alone, atol=1e-5, rtol=0)
    with user_wrote(model, spans):  # as `generate` says it
        torch.testing.assert_close(decided(model, padded, attention_mask=mask), alone, atol=1e-5, rtol=0)

    packed = decided(
        model,
        ids.reshape(1, -1),
        position_ids=torch.arange(70).repeat(2)[None],
        cu_seq_lens=torch.tensor([0, 70, 140], dtype=torch.int32),
        prompt_spans=span([0, 66], [70, 136]),
        user_spans=span([12, 60], [82, 130]),
    )
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kv_cache", ["full", "elastic"])
def test_generation_beams_and_batches_keep_each_prompts_words(kv_cache):
    model, tokenizer = routed(), loading.load_tokenizer("tiny")
    prompts = [
        EncodedPrompt(random_ids(1, 70)[0].tolist(), (12, 60)),
        EncodedPrompt(random_ids(1, 50)[0].tolist(), (5, 44)),
    ]
    alone = [answer_tokens(model, tokenizer, [p], max_new_tokens=4, kv_cache=kv_cache)[0] for p in prompts]
    together = answer_tokens(model, tokenizer, prompts, max_new_tokens=4, kv_cache=kv_cache)
    assert [made.token_ids for made in together] == [made.token_ids for made in alone]
    assert [made.report.route for made in together] == [made.report.route for made in alone]
    assert (
        alone[0].report.route
        != answer_tokens(  # the span matters for this prompt
            model, tokenizer, [EncodedPrompt.whole(prompts[0].ids)], max_new_tokens=1
        )[0].report.route
        or alone[1].report.route
        != answer_tokens(model, tokenizer, [EncodedPrompt.whole(prompts[1].ids)], max_new_tokens=1)[0].report.route
    )
    beams = answer_tokens(model, tokenizer, prompts, max_new_tokens=4, kv_cache=kv_cache, num_beams=3)
    assert [made.report.route for made in beams] == [made.report.route for made in alone]


def test_a_later_turn_begins_where_the_users_words_began():
    model, ids = routed(), random_ids(1, 90)
    whole = decided(model, ids, user_spans=span([12, 90]))
    for cache in (new_cache(model), ElasticCache(3, small_config(), 8)):
        with torch.no_grad():
            model(ids[:, :70], past_key_values=cache, user_spans=span([12, 66]))
            first = [record.clone() for record in cache._elastic_record.heads.values()]
            model(ids[:, 70:], past_key_values=cache)
        assert torch.equal(cache._elastic_record.layout.user_begin_N, torch.tensor([12]))
        assert torch.equal(cache.pooled_B, torch.tensor([20]))
        assert all(torch.equal(a, b) for a, b in zip(first, cache._elastic_record.heads.values(), strict=True))
        again = last_routes(model).logits
        torch.testing.assert_close((again[0, :, :, 1] - again[0, :, :, 0]), whole[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("spans", "reason"),
    [
        (torch.tensor([3, 9]), r"user_spans has shape \[2\], expected \[samples, 2\]"),
        (span([3, 9], [3, 9]), "user_spans has 2 parts for 1 samples"),
        (span([9, 9]), r"user span \[9, 9\) of sample 0 is not a part of its prompt, the tokens \[0, 70\)"),
        (span([3, 71]), r"user span \[3, 71\)"),
        (span([-1, 9]), r"user span \[-1, 9\)"),
    ],
)
def test_spans_that_do_not_fit_are_refused(spans, reason):
    with pytest.raises(ValueError, match=reason):
        decided(routed(), random_ids(1, 70), user_spans=spans)
