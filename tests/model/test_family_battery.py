"""What every family must do beyond routing a prompt: train packed rows, with checkpointing and compiled, and generate
over every cache. `tests/helpers/models.py` has the table of families; other files run over it too.
"""

import pytest
import torch

from elastic.model.attach import attach, last_routes, routers
from elastic.model.checkpoint import is_trainable
from elastic.model.compiling import compile_layers
from elastic.model.logits import logit_head
from elastic.routing.sparsity import msr
from elastic.training.losses import chunked_cross_entropy
from tests.helpers.cached import KINDS, generate, new_cache, routed, same
from tests.helpers.masked import masked_oracle
from tests.helpers.models import FAMILIES, left_padded, random_ids, small_config, tiny_model, varied_routers

BOUNDS, PROMPTS = torch.tensor([0, 40, 90]), torch.tensor([[0, 30], [40, 75]])


def trained(family):
    model = attach(tiny_model(family, initializer_range=0.1), small_config()).train()
    varied_routers(model)
    return model


def gradients(model):
    """Loss of a packed row of two samples, and the routers' gradients; the noise of the routes is fixed."""
    ids = random_ids(1, 90)
    places = torch.cat([torch.arange(40), torch.arange(50)])[None]
    torch.manual_seed(3)
    inputs = {"input_ids": ids, "position_ids": places, "cu_seq_lens": BOUNDS, "prompt_spans": PROMPTS}
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    loss = chunked_cross_entropy(hidden, logit_head(model), ids, 32) + msr(last_routes(model).route).mean()
    weights = [parameter for router in routers(model) for parameter in router.parameters()]
    return loss, torch.autograd.grad(loss, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_moves_the_routers_alone(family):
    model = trained(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, found = gradients(model)
    assert torch.isfinite(loss) and all(bool(torch.isfinite(g).all()) for g in found)
    assert any(bool(g.abs().max() > 0) for g in found)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, again = gradients(model)
    assert all(torch.equal(one, other) for one, other in zip(again, found, strict=True))
    for parameter, gradient in zip((p for router in routers(model) for p in router.parameters()), found, strict=True):
        parameter.grad = gradient
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(is_trainable(name) for name in moved)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_layers_train_as_before(family):
    model = trained(family)
    expected, wanted = gradients(model)
    torch.compiler.reset()
    compile_layers(model, backend="eager")
    loss, found = gradients(model)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_elastic_cache_equals_masked_attention_over_all_keys(family, kind):
    model = routed(family, kind)
    ids, mask = left_padded(random_ids(3, 50), [0, 9, 30])
    with masked_oracle(model):
        expected = generate(model, ids, mask, steps=10)
    same(generate(model, ids, mask, new_cache(model), steps=10), expected, 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_are_those_of_masked_attention(family):
    model, (ids, mask) = routed(family), left_padded(random_ids(2, 40), [0, 12])
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    with masked_oracle(model):
        expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), expected)
    assert torch.equal(model.generate(ids, past_key_values=new_cache(model), **options), expected)
