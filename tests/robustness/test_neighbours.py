"""What lies beside an attached model is left alone: users' hooks, models that share a config, copies of caches, and
what is saved.
"""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic.cache.elastic_cache import ElasticCache
from elastic.model.attach import attach, detach, elastic_config, override_routes
from elastic.model.families import key_projection
from elastic.model.layer_types import routed_layers
from elastic.model.saving import SavePretrained
from tests.helpers.cached import new_cache, routed
from tests.helpers.models import FAMILIES, KV_HEADS, LAYERS, random_ids, small_config, tiny_model, varied_routers


def routed_layer(model):
    return model.get_decoder().layers[routed_layers(model.config)[0]].self_attn


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_of_users_run_once_and_see_whole_rows(family):
    model = attach(tiny_model(family), small_config())
    varied_routers(model)
    seen = []
    attention = routed_layer(model)
    watched = [
        module for module in (key_projection(attention), getattr(attention, "k_norm", None)) if module is not None
    ]
    for module in watched:
        module.register_forward_hook(lambda _, args, out: seen.append(out.shape[:2]))
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    model(random_ids(2, 30))
    late = family == "gemma3_text"  # its norm comes after the heads have parted
    assert seen == [torch.Size([2, 30])] * 2 + [torch.Size([2, KV_HEADS if late else 30])] * (2 * len(watched) - 2)


def test_global_hooks_see_no_pass_of_the_router_through_the_layer():
    model, seen = attach(tiny_model(), small_config()), []
    projections = {layer.self_attn.k_proj for layer in model.get_decoder().layers}
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m in projections))
    try:
        model(random_ids(1, 30))
    finally:
        hook.remove()
    assert sum(seen) == LAYERS


def twins(family):
    """Two models of the same weights and one config object."""
    one = tiny_model(family)
    two = type(one)(one.config).eval()
    two.load_state_dict(one.state_dict())
    assert one.config is two.config
    return one, two


@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_share_a_config_are_independent(family):
    one, two = twins(family)
    ids = random_ids(1, 40)
    stock = two(ids).logits
    attach(one, small_config())
    varied_routers(one)
    assert torch.equal(two(ids).logits, stock)
    attach(two, small_config())
    detach(one)
    with override_routes(two, 0):
        assert torch.equal(one(ids).logits, stock) and torch.equal(two(ids).logits, stock)
    detach(two)
    assert torch.equal(two(ids).logits, stock)


def test_a_copy_and_its_original_are_independent():
    one = attach(tiny_model(), small_config())
    two, ids = copy.deepcopy(one), random_ids(1, 40)
    detach(one)
    with override_routes(two, 1):
        sparse = two(ids).logits
    assert not torch.equal(sparse, one(ids).logits)


TENSORS = {
    "a copy of the cache": lambda cache, route: (copy.deepcopy(cache), route),
    "a copy of a copy": lambda cache, route: (copy.deepcopy(copy.deepcopy(cache)), route),
    "an equal tensor": lambda cache, route: (cache, route.clone()),
    "of another dtype": lambda cache, route: (cache, route.float()),
}


@pytest.mark.parametrize("name", TENSORS)
def test_decoding_under_the_routes_of_the_prompt_is_not_refused(name):
    model, route = routed(), torch.randint(0, 2, (LAYERS, KV_HEADS), generator=torch.Generator().manual_seed(1))
    ids, token = random_ids(1, 60), random_ids(1, 1, seed=5)
    cache, plain = new_cache(model), new_cache(model)
    with override_routes(model, route):
        model(ids, past_key_values=cache)
        model(ids, past_key_values=plain)
        expected = model(token, past_key_values=plain).logits
    cache, route = TENSORS[name](cache, route)
    with override_routes(model, route):
        assert torch.equal(model(token, past_key_values=cache).logits, expected)


def test_decoding_under_other_routes_is_refused_on_a_copy_too():
    model, route = routed(), torch.ones(LAYERS, KV_HEADS)
    cache = ElasticCache(LAYERS, elastic_config(model))
    with override_routes(model, route):
        model(random_ids(1, 60), past_key_values=cache)
    route = route.clone()
    route[0, 0] = 0
    with override_routes(model, route), pytest.raises(ValueError, match="override_routes changed after the prompt"):
        model(random_ids(1, 1), past_key_values=copy.deepcopy(cache))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_the_backbone(family, tmp_path, recwarn):
    model, ids = tiny_model(family), random_ids(1, 40)
    stock = model(ids).logits
    attach(model, small_config())
    for number, saved in enumerate((model, copy.deepcopy(model))):
        with pytest.warns(UserWarning, match=r"without its routers; elastic\.save_elastic"):
            saved.save_pretrained(tmp_path / str(number))
        assert any(name.endswith("self_attn.router.count") for name in saved.state_dict())
        again, told = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert not told["unexpected_keys"] and not told["missing_keys"]
        assert torch.equal(again(ids).logits, stock)
    detach(model)
    assert not isinstance(model.save_pretrained, SavePretrained) and not model._keys_to_ignore_on_save
    recwarn.clear()
    model.save_pretrained(tmp_path / "detached", state_dict=model.state_dict())
    assert not [warning for warning in recwarn if "routers" in str(warning.message)]
