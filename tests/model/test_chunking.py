"""MLPs and norms in chunks of tokens: the same results, bounded work, and a stock model again after detach."""

import copy
from dataclasses import replace

import pytest
import torch

from elastic.config import ElasticConfig
from elastic.model.attach import attach, detach, elastic_config, set_config
from elastic.model.chunking import token_modules
from tests.helpers.models import FAMILIES, left_padded, random_ids, small_config, tiny_model, varied_routers


def chunked(family="llama", size=7):
    model = attach(tiny_model(family), replace(small_config(), chunk_tokens=size))
    varied_routers(model)
    return model


def widths(model):
    """Tokens of every call that reaches an MLP's or norm's own forward, recorded while the model runs."""
    seen = []
    for module in token_modules(model.get_decoder()):
        inner = module.forward.run

        def record(hidden, *args, inner=inner):
            seen.append(hidden.shape[1])
            return inner(hidden, *args)

        module.forward.run = record
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_results_are_the_same(family):
    model = chunked(family, size=0)
    ids, mask = left_padded(random_ids(2, 45), [0, 10])
    whole = model(ids, attention_mask=mask).logits
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for size in (1, 7, 44, 45, 1000):
        set_config(model, replace(elastic_config(model), chunk_tokens=size))
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, whole, rtol=1e-5, atol=1e-5)
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), tokens)


@torch.no_grad()
def test_no_module_sees_more_than_a_chunk():
    model = chunked("qwen3")
    seen = widths(model)
    model(random_ids(1, 45))
    assert max(seen) == 7 and 45 % 7 in seen


def test_training_is_not_chunked():
    model = chunked()
    seen = widths(model)
    model(random_ids(1, 45), use_cache=False)
    assert set(seen) == {45}


@torch.no_grad()
def test_copies_chunk_their_own_modules_and_detach_restores():
    model = chunked()
    ids = random_ids(1, 45)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert float(twin(ids).logits.abs().max()) > 0
    detach(twin)
    assert all("forward" not in vars(module) for module in token_modules(twin.get_decoder()))
    assert torch.equal(twin(ids).logits, tiny_model()(ids).logits)


@torch.no_grad()
def test_a_forward_that_was_replaced_before_is_kept():
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda hidden: hidden * 0
    attach(model, small_config())
    assert float(mlp(torch.ones(1, 3, 64)).abs().max()) == 0
    detach(model)
    assert float(mlp(torch.ones(1, 3, 64)).abs().max()) == 0 and "forward" in vars(mlp)


@pytest.mark.parametrize("tokens", [-1, 2.5])
def test_sizes_that_are_refused(tokens):
    with pytest.raises(ValueError, match="chunk_tokens"):
        ElasticConfig(chunk_tokens=tokens)
