"""Keys before RoPE of every family: rotating them gives the keys that the model caches (docs/porting.md, step 2)."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from transformers import DynamicCache

from elastic.model.attach import attach, is_attached, last_routes, override_routes
from elastic.model.families import FAMILIES, attention_layers, prerope_keys
from tests.helpers import models
from tests.helpers.models import EXPERTS, STOCK_FAULTS, left_padded, random_ids, small_config, tiny_model


def test_every_supported_family_is_tested():
    assert sorted(models.FAMILIES) == sorted(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rotated_keys_are_the_cached_ones(family):
    model, ids = tiny_model(family), random_ids(2, 30)
    inputs = []
    for attn in attention_layers(model):
        attn.register_forward_pre_hook(
            lambda attn, args, kwargs: inputs.append((args[0] if args else kwargs["hidden_states"], kwargs)),
            with_kwargs=True,
        )
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    rotate = import_module(type(model).__module__).apply_rotary_pos_emb
    bare = [n for n, rope in enumerate(getattr(model.config, "no_rope_layers", [])) if not rope]  # SmolLM3
    bare += range(9) if family == "cohere2" else ()  # whose sliding layers alone have RoPE
    for attn, (hidden, kwargs) in zip(attention_layers(model), inputs, strict=True):
        keys = prerope_keys(attn, hidden).transpose(1, 2)
        if attn.layer_idx not in bare:
            keys = rotate(keys, keys, *kwargs["position_embeddings"])[1]
        assert torch.equal(keys, cache.layers[attn.layer_idx].keys)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("chunk_tokens", [0, 7])
def test_experts_report_and_balance_as_in_the_stock_model(family, chunk_tokens):
    model, (ids, mask) = tiny_model(family), left_padded(random_ids(2, 30), [0, 9])
    options = {"attention_mask": mask, "labels": ids, "output_router_logits": True}
    try:
        stock = model(ids, **options)
    except AttributeError:
        if family not in STOCK_FAULTS:
            raise
        pytest.skip(STOCK_FAULTS[family])
    attach(model, replace(small_config(), chunk_tokens=chunk_tokens))
    for grad in (True, False):
        with override_routes(model, 0), torch.set_grad_enabled(grad):
            found = model(ids, **options)
        assert torch.equal(found.loss, stock.loss) and torch.equal(found.aux_loss, stock.aux_loss)
        pairs = zip(found.router_logits, stock.router_logits, strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    model(ids, **options)
    last_routes(model)


REFUSED = {
    "residual dropout": ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop=0.1, expected 0 for a frozen backbone"),
    "noise of experts": ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1, expected 0"),
    "attention dropout": ("mixtral", {"attention_dropout": 0.1}, "attention_dropout=0.1, expected 0"),
    "a window everywhere": ("phi3", {"sliding_window": 8}, "own sliding window of 8 tokens"),
    "experts and a window": ("mixtral", {"sliding_window": 8}, "own sliding window of 8 tokens"),
    "no such family": ("gpt2", {}, "model family 'gpt2' is not supported; tested families are"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_attach_refuses_by_name(case):
    family, changes, told = REFUSED[case]
    model = tiny_model(family, **changes)
    before = sorted(vars(model))
    with pytest.raises(ValueError, match=told):
        attach(model, small_config())
    assert not is_attached(model) and sorted(vars(model)) == before
