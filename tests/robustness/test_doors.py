"""Facts about a batch that transformers hands over by several doors: masks as dict, 4-D or None, restarting positions,
its own boundaries. Full heads must equal the stock model, whatever the door; routed ones the same batch by the usual.
"""

import functools

import pytest
import torch
from transformers import DataCollatorWithFlattening, DynamicCache, StaticCache, pipeline

from elastic.inference.generate import route_report
from elastic.model.attach import attach, last_routes, override_routes
from elastic.model.loading import load_backbone
from tests.helpers.models import FAMILIES, left_padded, random_ids, small_config, tiny_model, varied_routers

STEPS = 6


def greedy(model, ids, mask=None, **options):
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, eos_token_id=None,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return found.sequences, torch.stack(found.logits), found.past_key_values


def static(model, ids):
    return {"past_key_values": StaticCache(config=model.config, max_cache_len=ids.shape[1] + STEPS)}


# name -> (source, what is passed to model.generate)
CACHES = {
    "by name": ("A1: generate prepares masks itself", lambda model, ids: {"cache_implementation": "static"}),
    "by object": ("A1, sibling", static),
    "dynamic by object": ("the usual", lambda model, ids: {"past_key_values": DynamicCache(config=model.config)}),
}


def routed(family):
    model = attach(tiny_model(family, initializer_range=0.3), small_config())
    varied_routers(model)
    return model


@functools.cache
def answered(family, padded):
    """Two prompts and their mask, and what the stock model and the routed one answer on the cache that they make."""
    ids, mask = left_padded(random_ids(2, 50), [17, 0]) if padded else (random_ids(2, 50), None)
    stock = greedy(tiny_model(family, initializer_range=0.3), ids, mask)[:2]
    return ids, mask, stock, greedy(routed(family), ids, mask)[:2]


@pytest.mark.parametrize("padded", [True, False], ids=["left padded", "whole"])
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_cache_reads_the_padding(family, name, padded):
    ids, mask, stock, usual = answered(family, padded)
    model, settings = routed(family), CACHES[name][1]
    with override_routes(model, 0):
        found = greedy(model, ids, mask, **settings(model, ids))
    assert torch.equal(found[0], stock[0])
    torch.testing.assert_close(found[1], stock[1], rtol=1e-4, atol=1e-4)
    found = greedy(model, ids, mask, **settings(model, ids))
    assert torch.equal(found[0], usual[0])
    torch.testing.assert_close(found[1], usual[1], rtol=1e-4, atol=1e-4)
    lengths = [report.prompt_tokens for report in route_report(model, found[2])]
    assert lengths == ([33, 50] if padded else [50, 50])


def test_a_pipeline_of_two_prompts_answers_as_each_alone():
    model, tokenizer = load_backbone("tiny")
    attach(model, small_config())
    varied_routers(model)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["key k1 5 4 3 2 " + "f1 f2 f3 " * 6 + "find k1", "f4 f5 " * 30 + "key k3 1 2 3 4 find k3"]
    settings = {"do_sample": False, "max_new_tokens": STEPS, "return_full_text": False}
    together = [found[0]["generated_text"] for found in pipe(prompts, batch_size=2, **settings)]
    assert together == [pipe(prompt, **settings)[0]["generated_text"] for prompt in prompts]


BAD_MASKS = {
    "dict of other layers": ({"sliding_attention": None}, r"a dict of sliding_attention; expected one mask of full"),
    "dict of 4-D": ({"full_attention": torch.ones(2, 1, 9, 9)}, r"shape \[2, 1, 9, 9\], expected \[2, 9\]"),
    "4-D": (torch.ones(2, 1, 9, 9), r"shape \[2, 1, 9, 9\], expected \[2, 9\]"),
    "list": ([[1] * 9] * 2, "attention_mask is a list; pass the tokenizer's 2D mask"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_masks_that_are_refused(name):
    mask, message = BAD_MASKS[name]
    model = attach(tiny_model("qwen3"), small_config())
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 9), attention_mask=mask)


def flattened(samples, **settings):
    collate = DataCollatorWithFlattening(return_tensors="pt", **settings)
    batch = collate([{"input_ids": ids.tolist()} for ids in samples])
    return {name: value for name, value in batch.items() if name != "labels"}


DOORS = {
    "position_ids": {},
    "cu_seq_lens_q and k": {"return_flash_attn_kwargs": True},
    "seq_idx too": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    "boundaries alone": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "seq_idx alone": {"return_seq_idx": True, "return_position_ids": False},
}


SAMPLES = [random_ids(1, length, seed=length)[0] for length in (40, 9, 31)]


@functools.cache
def each_alone(family):
    """Of every sample by itself: the stock model's logits, the routed one's, and its routes."""
    stock, model = tiny_model(family, initializer_range=0.3), routed(family)
    dense, logits, routes = [], [], []
    for ids in SAMPLES:
        dense.append(stock(ids[None]).logits[0].detach())
        logits.append(model(ids[None]).logits[0].detach())
        routes.append(last_routes(model).route.detach())
    return torch.cat(dense), torch.cat(logits), torch.cat(routes, 1)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_flattened_samples_never_see_each_other(family, door, use_cache):
    batch, model = flattened(SAMPLES, **DOORS[door]), routed(family)
    stock, alone, routes = each_alone(family)
    with override_routes(model, 0):
        torch.testing.assert_close(model(**batch, use_cache=use_cache).logits[0], stock, rtol=1e-4, atol=1e-4)
    together = model(**batch, use_cache=use_cache).logits[0]
    assert torch.equal(last_routes(model).route, routes)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def packed(model):
    cache = DynamicCache(config=model.config)
    model(**one_row(past_key_values=cache))
    return cache


def two_rows():
    return {"input_ids": random_ids(2, 8), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]] * 2)}


def filled(model):
    cache = DynamicCache(config=model.config)
    model(random_ids(1, 9), past_key_values=cache)
    return cache


def one_row(**more):
    return {"input_ids": random_ids(1, 8), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]), **more}


BAD_PACKING = {
    "two rows": (lambda model: two_rows(), "position_ids begin again within 2 rows"),
    "on a filled cache": (
        lambda model: one_row(past_key_values=filled(model)),
        "came with 1 rows, 9 cached tokens and no attention_mask; expected one row, no cache",
    ),
    "two stories": (
        lambda model: one_row(cu_seq_lens_q=torch.tensor([0, 4, 8]), cu_seq_lens_k=torch.tensor([0, 5, 8])),
        "cu_seq_lens_q and cu_seq_lens_k differ",
    ),
    "a token after it": (lambda model: {"input_ids": random_ids(1, 1), "past_key_values": packed(model)}, "cache of 2"),
    "lengths alone": (lambda model: one_row(max_length_q=4, max_length_k=4), "came without cu_seq_lens_q"),
    "not to the end": (
        lambda model: one_row(cu_seq_lens_q=torch.tensor([0, 4]), cu_seq_lens_k=torch.tensor([0, 4])),
        "from 0 to the row's 8 tokens",
    ),
}


@pytest.mark.parametrize("name", BAD_PACKING)
def test_packing_that_is_refused(name):
    make, message = BAD_PACKING[name]
    model = attach(tiny_model(), small_config())
    with pytest.raises(ValueError, match=message):
        model(**make(model))


def test_positions_that_only_begin_later_are_one_sample():
    model = attach(tiny_model(), small_config())
    model(random_ids(1, 20), position_ids=torch.arange(5, 25)[None])
    assert last_routes(model).lengths.tolist() == [20]
