"""Prompts that are read in pieces: every head in full until the last piece, which decides from the whole prompt and
runs routed. tests/robustness compares families, batches, later turns and the decision with a reference in fp64.
"""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from elastic.attention.layout import batch_layout, turn_layout
from elastic.attention.prompt_reach import last_queries, prompt_reach
from elastic.config import ElasticConfig
from elastic.inference.decode_graph import _Graphed
from elastic.inference.generate import generate, route_report
from elastic.model.attach import (
    attach,
    detach,
    elastic_config,
    handle_of,
    override_routes,
    route_of,
    routers,
    user_wrote,
)
from elastic.model.loading import load_backbone
from elastic.model.pass_state import reading
from elastic.routing.sparsity import causal_pairs
from tests.helpers.cached import KINDS, new_cache
from tests.helpers.masked import masked_oracle
from tests.helpers.masked64 import Reference, Sample, Turn
from tests.helpers.models import LAYERS, left_padded, random_ids, small_config, tiny_model, varied_routers
from tests.helpers.xattention import sparse_of

PADS, LENGTH = [0, 9, 40], 60
SIZES = (1, 7, 16, 59)


def routed(family="llama", kind="paper", sparse=None):
    config = small_config()
    config = ElasticConfig(replace(config.router, kind=kind), sparse or config.sparse)
    torch.manual_seed(1)
    model = attach(tiny_model(family, eos_token_id=None, initializer_range=0.3), config)
    if kind == "paper":
        varied_routers(model)
    for router in routers(model) if kind == "level" else ():
        router.update_statistics(torch.rand(32, router.weight.shape[0]))
        torch.nn.init.normal_(router.weight, std=0.2)
    if kind == "static":
        for layer, router in enumerate(routers(model)):
            router.logits.data[:, 1] = torch.tensor([1.0, -1.0]) * (-1) ** layer
    return model


def answer(model, ids, mask, cache=None, steps=12, **options):
    return model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=steps, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def logits(found):
    return torch.stack(found.logits)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["paper", "level", "reach", "static"])
def test_pieces_over_every_cache_are_those_of_masked_attention(kind, size):
    """One decision and one answer, whichever cache keeps the pieces."""
    model, (ids, mask) = routed(kind=kind), left_padded(random_ids(3, LENGTH), PADS)
    with masked_oracle(model):
        expected = answer(model, ids, mask, prefill_chunk_size=size)
    route = route_of(expected.past_key_values).route
    assert 0 < route.float().mean() < 1
    caches = [None, *(new_cache(model, kv_cache=kept) for kept in KINDS)]
    for cache in (*caches, StaticCache(config=model.config, max_cache_len=100)):
        found = answer(model, ids, mask, cache, prefill_chunk_size=size)
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(logits(found), logits(expected), rtol=1e-4, atol=1e-4)
        assert torch.equal(route_of(found.past_key_values).route, route)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt_oss", "mixtral"])
def test_with_all_heads_full_pieces_are_the_stock_models(family, size):
    model, (ids, mask) = routed(family), left_padded(random_ids(3, LENGTH), PADS)
    with override_routes(model, 0):
        found = answer(model, ids, mask, prefill_chunk_size=size)
    detach(model)
    expected = answer(model, ids, mask, prefill_chunk_size=size)
    assert torch.equal(found.sequences, expected.sequences)
    for mine, stock in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, stock.keys) and torch.equal(mine.values, stock.values)


@pytest.mark.parametrize("kept", KINDS)
@pytest.mark.parametrize("kind", ["static", "given"])
def test_routes_that_do_not_depend_on_the_prompt_hold_from_the_first_piece(kind, kept):
    """So pieces change nothing, and an elastic cache keeps what streaming heads need from the first piece on."""
    model, (ids, mask) = routed(kind="static"), left_padded(random_ids(3, LENGTH), PADS)
    given = torch.tensor([[0, 1], [1, 1], [1, 0]]) if kind == "given" else None
    with override_routes(model, given):
        whole = answer(model, ids, mask, new_cache(model, kv_cache=kept))
        expected = route_report(model, whole.past_key_values)
        for size in SIZES:
            found = answer(model, ids, mask, new_cache(model, kv_cache=kept), prefill_chunk_size=size)
            assert torch.equal(found.sequences, whole.sequences)
            torch.testing.assert_close(logits(found), logits(whole), rtol=1e-4, atol=1e-4)
            for report, of_whole in zip(route_report(model, found.past_key_values), expected, strict=True):
                assert report.esr_all == pytest.approx(of_whole.esr_all)
                assert (report.route, report.kv_bytes_held) == (of_whole.route, of_whole.kv_bytes_held)
    cache = new_cache(model, kv_cache=kept)
    with torch.no_grad(), reading(handle_of(model).state, LENGTH), override_routes(model, given):
        model(ids[:1, :48], past_key_values=cache)
        assert bool(cache.dropped(1).any()) == (kept == "elastic")


@pytest.mark.parametrize("modes", ["FA-XA", "XA-SSA", "SSA-XA"])
@pytest.mark.parametrize("size", [7, 30, 59])
def test_heads_that_choose_blocks_choose_in_the_last_piece(modes, size):
    model, ids = routed(sparse=sparse_of(modes)), random_ids(1, LENGTH)
    found = answer(model, ids, torch.ones_like(ids), prefill_chunk_size=size)
    (report,) = route_report(model, found.past_key_values)
    early = causal_pairs((LENGTH - 1) // size * size) / causal_pairs(LENGTH)
    assert 0 <= report.esr_all < 1 - early
    again = answer(model, ids, torch.ones_like(ids), new_cache(model), prefill_chunk_size=size)
    assert torch.equal(again.sequences, found.sequences)
    assert route_report(model, again.past_key_values)[0].esr_all == pytest.approx(report.esr_all)


@pytest.mark.parametrize("kind", ["paper", "level", "reach"])
@pytest.mark.parametrize("span", [(3, 20), (3, 43), (30, 60), (25, 26)])
def test_user_words_decide_wherever_the_pieces_are_cut(kind, span):
    """In an early piece, across pieces, in the last one: as in one pass, of which all but the last piece ran dense."""
    model, ids = routed(kind=kind), random_ids(1, LENGTH)
    with user_wrote(model, torch.tensor([list(span)])):
        found = answer(model, ids, torch.ones_like(ids), steps=1, prefill_chunk_size=16)
    route = route_of(found.past_key_values).route[:, 0].long()
    turn, dense = Turn(0, LENGTH, span, route=route), torch.zeros_like(route)
    sample = Sample(ids[0].tolist(), [turn], [0] * LENGTH, [False] * LENGTH, [dense] * 48 + [None] * 12)
    reference = Reference(tiny_model(eos_token_id=None, initializer_range=0.3))
    reference.prepare(elastic_config(model), routers(model), sample, True)
    torch.testing.assert_close(logits(found)[:, 0], reference.logits()[-1:].float(), rtol=1e-3, atol=1e-3)
    margin = torch.stack(reference.margin)
    assert margin.abs().min() > 1e-4 and torch.equal((margin > 0).long(), route)


@pytest.mark.parametrize("kind", ["paper", "level"])
def test_a_later_turn_is_read_as_over_all_keys(kind):
    """Heads that have dropped keys stay on streaming attention in every piece of it; the others attend in full."""
    model, ids, more = routed(kind=kind), random_ids(1, LENGTH), random_ids(1, 45, seed=5)
    whole = torch.cat([ids, more], 1)
    cache = new_cache(model, kv_cache="elastic")
    with torch.no_grad():
        model(ids, past_key_values=cache)
    dropped = torch.stack([cache.dropped(layer)[0] for layer in range(LAYERS)])
    assert dropped.any() and not dropped.all()
    found = answer(model, whole, torch.ones_like(whole), cache, steps=1, prefill_chunk_size=16)
    routes = [turn.route_LNK[:, 0].bool() for turn in route_of(cache).turns]
    assert all(torch.equal(route, dropped) for route in routes[:3]) and (routes[3] | ~dropped).all()
    assert [int(turn.begin_N) for turn in route_of(cache).turns] == [0, 60, 76, 92]
    assert found.sequences.shape[1] == 106


def test_joined_caches_of_prompts_in_pieces_decode_and_report_as_alone():
    model, ids = routed(), [random_ids(1, length, length) for length in (50, 30)]
    alone, caches = [], []
    for prompt, size in zip(ids, (16, 64), strict=True):
        cache = new_cache(model)
        answer(model, prompt, torch.ones_like(prompt), cache, steps=1, prefill_chunk_size=size)
        caches.append(cache)
        alone += route_report(model, copy.deepcopy(cache))
    caches[0].join(caches[1])
    joined = route_report(model, caches[0])
    for one, other in zip(joined, alone, strict=True):
        assert (one.route, one.esr_all, one.prompt_tokens) == (
            other.route,
            pytest.approx(other.esr_all),
            other.prompt_tokens,
        )
    caches[0].batch_select_indices(torch.tensor([1]))
    (left,) = route_report(model, caches[0])
    assert left.esr_all == pytest.approx(alone[1].esr_all)


def test_beams_read_in_pieces_as_greedy_search_does():
    model, (ids, mask) = routed(), left_padded(random_ids(2, LENGTH), [0, 40])
    with masked_oracle(model):
        expected = model.generate(ids, attention_mask=mask, num_beams=3, max_new_tokens=8, prefill_chunk_size=16)
    cache = new_cache(model)
    found = model.generate(
        ids, attention_mask=mask, num_beams=3, max_new_tokens=8, prefill_chunk_size=16, past_key_values=cache
    )
    assert torch.equal(found, expected)
    greedy = answer(model, ids, mask, steps=1, prefill_chunk_size=16)
    assert torch.equal(route_of(cache).route[:, ::3], route_of(greedy.past_key_values).route)


def test_what_pieces_cannot_have_is_refused():
    model, ids = routed(), random_ids(1, 20)
    embeds = model.get_input_embeddings()(ids)
    for options, message in (
        ({"prefill_chunk_size": 0}, "prefill_chunk_size=0 is not a whole number of 1 or more tokens"),
        ({"prefill_chunk_size": True}, "prefill_chunk_size=True is not a whole number"),
        ({"prefill_chunk_size": 4.0}, r"prefill_chunk_size=4\.0 is not a whole number"),
        ({"prefill_chunk_size": 4, "prompt_lookup_num_tokens": 2}, "and prompt_lookup_num_tokens do not go together"),
        ({"prefill_chunk_size": 4, "assistant_model": tiny_model()}, "and assistant_model do not go together"),
        ({"prefill_chunk_size": 4, "inputs_embeds": embeds}, "came with inputs_embeds; pieces are cut from input_ids"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(None if "inputs_embeds" in options else ids, max_new_tokens=2, **options)


@pytest.mark.parametrize("kept", ["stock", *KINDS])
@torch.no_grad()
def test_a_prompt_whose_reading_stopped_is_never_continued(kept):
    model, ids = routed(), random_ids(1, 40)
    cache = DynamicCache(config=model.config) if kept == "stock" else new_cache(model, kv_cache=kept)
    state = handle_of(model).state
    with reading(state, 40):
        model(ids[:, :16], past_key_values=cache)
    for new, end in ((1, None), (5, None), (5, 30), (30, 40)):
        with pytest.raises(
            ValueError, match="the cache holds 16 of 40 tokens of a prompt that was to be read in pieces"
        ):
            if end is None:
                model(ids[:, :new], past_key_values=cache)
            else:
                with reading(state, end):
                    model(ids[:, :new], past_key_values=cache)
    with reading(state, 40):
        model(ids[:, 16:], past_key_values=cache)
    assert route_of(cache).pieces is None and model(ids[:, :1], past_key_values=cache).logits.shape[1] == 1


def test_generate_takes_the_setting_and_reads_the_same_words():
    model, tokenizer = load_backbone("tiny")
    varied_routers(attach(model, small_config()))
    prompts = ["f1 f2 f3 " * 20, "f4 f5"]
    found = generate(model, tokenizer, prompts, 4, prefill_chunk_size=16)
    for prompt, one in zip(prompts, found, strict=True):
        (alone,) = generate(model, tokenizer, prompt, 4, prefill_chunk_size=16)
        assert one.report.prompt_tokens == alone.report.prompt_tokens
    model.generation_config.prefill_chunk_size = 16
    assert [one.report.route for one in generate(model, tokenizer, prompts, 4)] == [one.report.route for one in found]


@pytest.mark.parametrize("cut", [1, 5, 20, 31, 32, 39])
def test_kept_queries_are_those_of_one_pass(cut):
    """Reach of queries that came in two pieces, over keys that are all there, is that of the whole prompt."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 40, 16, generator=generator) for heads in (4, 2))
    mask, spans = torch.ones(2, 40, dtype=torch.int64), torch.tensor([[2, 36], [12, 40]])
    mask[1, :10] = 0
    sparse = small_config().sparse
    whole = batch_layout(2, 40, 0, q.device, mask, None, spans)
    expected = prompt_reach(q, k, whole, sparse, 0.25)
    first = batch_layout(2, cut, 0, q.device, mask[:, :cut], torch.full((2,), 40), spans, 0)
    last = batch_layout(2, 40 - cut, cut, q.device, mask, torch.full((2,), 40), spans, 0)
    last = turn_layout(first, last, True, True)
    kept = last_queries(q[:, :, cut:], last, last_queries(q[:, :, :cut], first, None))
    found = prompt_reach(q[:, :, cut:], k, last, sparse, 0.25, kept)
    torch.testing.assert_close(found.largest, expected.largest)
    torch.testing.assert_close(found.recent, expected.recent)


@torch.no_grad()
def test_a_piece_of_one_token_is_no_decode_step():
    """Neither of a graph nor of the cache, though it comes alone and after others."""
    model, cache = routed(), SimpleNamespace(seen=5)
    graph = SimpleNamespace(cache=cache, forward=lambda *_, **__: "model", step=lambda _: "graph")
    call, token = _Graphed(model, graph), random_ids(1, 1)
    assert call(token, past_key_values=cache).logits == "graph"
    with reading(handle_of(model).state, 9):
        assert call(token, past_key_values=cache) == "model"
