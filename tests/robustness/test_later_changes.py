"""Models that are quantised before `attach`, adapted after it, or moved to another dtype."""

import pytest
import torch
from torch import nn

from elastic.model.attach import attach, detach, is_attached, override_routes, routers
from elastic.model.families import attention_layers
from elastic.model.layer_types import routed_layers
from tests.helpers.models import FAMILIES, KV_HEADS, doubled, random_ids, small_config, tiny_model, varied_routers


class Packed(nn.Module):
    """A projection as quantised layers have it: no `weight` (GPTQ, AWQ), or one of another shape (bitsandbytes)."""

    def __init__(self, inner, weight):
        super().__init__()
        self.register_buffer("qweight", inner.weight.detach().clone())
        self.register_buffer("add", None if inner.bias is None else inner.bias.detach().clone())
        if weight:
            packed = torch.zeros(inner.weight.numel() // 2, 1, dtype=torch.uint8)
            self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.qweight, self.add)


class Lora(nn.Module):
    """A linear layer wrapped as peft wraps it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, hidden):
        return self.base_layer(hidden) + self.lora_B(self.lora_A(hidden))


@pytest.mark.parametrize("weight", [True, False], ids=["packed", "without weight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_of_the_config_not_of_the_weights(family, weight):
    model, ids = tiny_model(family), random_ids(1, 40)
    expected, name = model(ids).logits, "qkv_proj" if family == "phi3" else "k_proj"
    for attention in attention_layers(model):
        setattr(attention, name, Packed(getattr(attention, name), weight))
    attach(model, small_config())
    assert {router.kv_heads for router in routers(model)} == {KV_HEADS}
    model(ids)
    with override_routes(model, 0):
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_detach_after_lora(family, merged):
    model, ids = attach(tiny_model(family), small_config()), random_ids(1, 40)
    name = "qkv_proj" if family == "phi3" else "q_proj"
    for layer in routed_layers(model.config):
        attention = model.model.layers[layer].self_attn
        wrapped = Lora(getattr(attention, name))
        setattr(attention, name, wrapped)
        if merged:
            with torch.no_grad():
                wrapped.base_layer.weight += wrapped.lora_B.weight @ wrapped.lora_A.weight
            setattr(attention, name, wrapped.base_layer)
    with override_routes(model, 0):
        expected = model(ids).logits
    detach(model)
    assert not is_attached(model) and not any("attn.router" in name for name, _ in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(ids).logits, expected)


MOVES = [lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.half(), doubled]


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_routers_stay_fp32(family, move):
    model = attach(tiny_model(family), small_config())
    varied_routers(model)
    before = [{k: v.clone() for k, v in router.state_dict().items()} for router in routers(model)]
    move(model)
    for router, values in zip(routers(model), before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in router.state_dict().items())
    assert model(random_ids(1, 40)).logits.dtype == model.dtype != torch.float32
