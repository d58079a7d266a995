"""Keys before RoPE of every family: rotating them gives the keys that the model caches (docs/porting.md, step 2)."""

from importlib import import_module

import pytest
import torch
from transformers import DynamicCache

from elastic.model.families import FAMILIES, attention_layers, prerope_keys
from tests.helpers import models
from tests.helpers.models import random_ids, tiny_model


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
    for attn, (hidden, kwargs), layer in zip(attention_layers(model), inputs, cache.layers, strict=True):
        keys = prerope_keys(attn, hidden).transpose(1, 2)
        cos, sin = kwargs["position_embeddings"]
        assert torch.equal(rotate(keys, keys, cos, sin)[1], layer.keys)
