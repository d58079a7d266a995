"""attach and calls of an attached model: what is refused, and with which words."""

import pytest
import torch
from transformers import DynamicCache

from elastic.config import ElasticConfig, RouterConfig
from elastic.model.attach import (
    attach,
    detach,
    elastic_config,
    last_features,
    last_routes,
    override_routes,
    route_of,
    routers,
    set_config,
    set_temperature,
)
from tests.helpers.models import KV_HEADS, LAYERS, random_ids, small_config, tiny_model


def call_without_decoder(model):
    hidden = torch.zeros(1, 3, 64)
    model.model.layers[0].self_attn(hidden_states=hidden, position_embeddings=(hidden, hidden), attention_mask=None)


def stale_cache(model):
    cache = DynamicCache(config=model.config)
    detach(model)
    model(random_ids(1, 9), past_key_values=cache)
    attach(model, small_config())
    model(random_ids(1, 1), past_key_values=cache)


def override(route):
    def use(model):
        with override_routes(model, route):
            pass

    return use


BAD_CALLS = {
    "attached twice": (lambda m: attach(m), ValueError, "already has routers; call elastic.detach"),
    "other router settings": (
        lambda m: set_config(m, ElasticConfig(RouterConfig(pool_tokens=9))),
        ValueError,
        "router settings are fixed at attach",
    ),
    "no forward yet": (last_routes, RuntimeError, "no routes yet: run a forward pass"),
    "statistics before forward": (last_features, RuntimeError, "no routes yet"),
    "temperature": (lambda m: set_temperature(m, 0.0), ValueError, "temperature=0.0 is not positive"),
    "override value": (override(2), ValueError, "route=2; expected 0, 1, a tensor"),
    "override shape": (override(torch.zeros(2, 2)), ValueError, r"shape \[2, 2\] do not fit; expected \[3, 2\]"),
    "override content": (override(torch.full((3, 2), 0.5)), ValueError, "values other than 0"),
    "override samples": (
        lambda m: override_samples(m),
        ValueError,
        r"route has shape \[3, 2\], expected \[1, KV heads\]",
    ),
    "mask shape": (
        lambda m: m(random_ids(2, 9), attention_mask=torch.ones(2, 1, 9, 9)),
        ValueError,
        r"attention_mask has shape \[2, 1, 9, 9\], expected \[2, 9\]",
    ),
    "mask with a hole": (
        lambda m: m(random_ids(1, 4), attention_mask=torch.tensor([[1, 0, 1, 1]])),
        ValueError,
        "padding between valid tokens; pad on one side",
    ),
    "empty prompt": (
        lambda m: m(random_ids(2, 4), attention_mask=torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])),
        ValueError,
        "row 1 of attention_mask has no valid token; drop empty prompts",
    ),
    "no input": (lambda m: m(), ValueError, "without input_ids and inputs_embeds|exactly one of input_ids"),
    "packed rows": (
        lambda m: m(random_ids(2, 9), cu_seq_lens=torch.tensor([0, 9])),
        ValueError,
        "came with 2 rows, 0 cached tokens and no attention_mask",
    ),
    "bounds": (
        lambda m: m(random_ids(1, 9), cu_seq_lens=torch.tensor([0, 5, 8])),
        ValueError,
        r"cu_seq_lens=\[0, 5, 8\] is not an increasing run of boundaries from 0 to the row's 9 tokens",
    ),
    "span shape": (
        lambda m: m(random_ids(1, 9), prompt_spans=torch.tensor([0, 5])),
        ValueError,
        r"prompt_spans has shape \[2\], expected \[samples, 2\]",
    ),
    "span count": (
        lambda m: m(random_ids(1, 9), prompt_spans=torch.tensor([[0, 5], [5, 9]])),
        ValueError,
        "2 prompts for 1 samples",
    ),
    "empty span": (
        lambda m: m(random_ids(1, 9), prompt_spans=torch.tensor([[0, 0]])),
        ValueError,
        r"prompt span \[0, 0\) of sample 0 does not fit; its tokens are \[0, 9\)",
    ),
    "layer called alone": (call_without_decoder, ValueError, "outside the attached model's decoder"),
    "foreign cache": (stale_cache, ValueError, "holds 9 tokens but no route for layer 0"),
    "cache without routes": (lambda m: route_of(DynamicCache()), ValueError, "DynamicCache holds no routes"),
}


def override_samples(model):
    with override_routes(model, torch.zeros(LAYERS, 3, KV_HEADS)):
        model(random_ids(1, 9))


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(case):
    call, error, message = BAD_CALLS[case]
    model = attach(tiny_model(), small_config())
    with pytest.raises(error, match=message):
        call(model)


BAD_MODELS = {
    "sliding window": (lambda: tiny_model("mistral", sliding_window=32), small_config, "sliding window of 32 tokens"),
    "dropout": (lambda: tiny_model(attention_dropout=0.1), small_config, "attention_dropout=0.1, expected 0"),
    "family": (lambda: torch.nn.Linear(2, 2), small_config, "family 'Linear' is not supported; tested families are"),
    "eager": (lambda: tiny_model(attn_implementation="eager"), small_config, "'eager', expected 'sdpa'"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_cannot_be_routed(case):
    model, config, message = BAD_MODELS[case]
    with pytest.raises(ValueError, match=message):
        attach(model(), config())


def test_calls_without_routers_name_the_way_out():
    for call in (detach, last_routes, routers, elastic_config):
        with pytest.raises(ValueError, match=r"no routers; call elastic\.attach"):
            call(tiny_model())
