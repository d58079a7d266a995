"""Models with elastic caches, for the tests of these."""

from dataclasses import replace

import torch

from elastic.cache.elastic_cache import ElasticCache
from elastic.model.attach import attach, elastic_config
from elastic.model.layer_types import stock_layers
from tests.helpers.models import small_config, tiny_model, varied_routers

KINDS = ["full", "elastic"]


def routed(family="llama", kind="elastic", granule="token", seed=0):
    model = tiny_model(family, eos_token_id=None, initializer_range=0.3)
    attach(model, replace(small_config(granule=granule), kv_cache=kind))
    varied_routers(model, seed)
    return model


def new_cache(model, step=8, reserve=0, **changes):
    config = replace(elastic_config(model), **changes)
    return ElasticCache(model.config.num_hidden_layers, config, reserve, step, stock_layers(model.config))


def generate(model, ids, mask=None, cache=None, steps=40, **options):
    """Tokens and logits [steps, B, V]."""
    options = {"do_sample": False, "max_new_tokens": steps, **options}
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, output_logits=True,
                         return_dict_in_generate=True, **options)  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def same(found, expected, tolerance=1e-4):
    """The same tokens; logits, some units large, apart by rounding alone, which differs from processor to processor."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=tolerance)
