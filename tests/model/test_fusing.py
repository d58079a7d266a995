"""Fused parts of a layer: what they compute is what transformers' modules compute, in every family, and other modules
run their own code. On the CPU the compiler's eager backend runs the functions; tests marked `gpu` let it make kernels.
"""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from elastic.model import fused_parts
from elastic.model.attach import attach, detach, handle_of, routers
from elastic.model.fused_parts import Parts
from elastic.model.fusing import ATTENTIONS, LAYERS, MLPS, NORMS, is_known
from tests.helpers.models import FAMILIES, left_padded, random_ids, small_config, tiny_model, varied_routers


def plainly(function: Any, *args: Any) -> Any:
    """In place of `Parts.run`, the function itself."""
    return function(*args)


def prepared(family: str, fused: bool, **changes: Any) -> Any:
    """An attached model whose parts run on the CPU too, or not at all."""
    model = attach(tiny_model(family, initializer_range=0.1), replace(small_config(), **changes))
    varied_routers(model)
    parts = handle_of(model).state.layer_parts
    parts.devices, parts.on = ("cpu",), fused
    parts.run = plainly
    return model


def calls(model: Any) -> list[str]:
    """Names of the parts that run from now on."""
    seen, parts = list[str](), handle_of(model).state.layer_parts
    run = parts.run

    def noted(function: Any, *args: Any) -> Any:
        seen.append(function.__name__)
        return run(function, *args)

    parts.run = noted
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_known_modules_compute_the_fused_functions(family: str) -> None:
    """Bit for bit, so that only the order of a kernel's roundings can differ."""
    found = 0
    for module in tiny_model(family, initializer_range=0.1).get_decoder().modules():
        if is_known(module, NORMS):
            weight, eps = module.weight, getattr(module, "variance_epsilon", getattr(module, "eps", None))
            weight.add_(torch.randn_like(weight) * 0.1)
            for dtype in (torch.float32, torch.bfloat16):
                hidden = torch.randn(2, 5, *weight.shape).to(dtype)
                module.to(dtype)
                got = NORMS[type(module).__name__](hidden, module.weight, eps)
                assert torch.equal(got, module(hidden))
            found += 1
        elif is_known(module, MLPS):
            assert {"gate_proj", "up_proj", "down_proj"} <= {name for name, _ in module.named_children()}
    assert found or family.startswith("cohere")


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_prompts_and_steps_are_the_same(family: str) -> None:
    ids, mask = left_padded(random_ids(2, 45), [0, 10])
    for size in (0, 7):
        plain, model = (prepared(family, fused, chunk_tokens=size) for fused in (False, True))
        seen = calls(model)
        want = plain(ids, attention_mask=mask).logits
        torch.testing.assert_close(model(ids, attention_mask=mask).logits, want, rtol=1e-5, atol=2e-5)
        assert seen or family == "cohere2" or "cohere" in family
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same(family: str) -> None:
    ids, found = random_ids(1, 60), list[list[Tensor]]()
    for fused in (False, True):
        model = prepared(family, fused).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        logits = model(ids, use_cache=False).logits
        weights = [p for router in routers(model) for p in router.parameters()]
        found.append([logits.detach(), *torch.autograd.grad(logits.square().mean(), weights)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_what_runs_fused_in_a_layer() -> None:
    model = prepared("qwen3", True)
    seen = calls(model)
    model(random_ids(1, 45))
    router = ["rms_norm"]  # its keys before RoPE
    assert seen == ["rms_norm", *router, "norm_rotate", "add_rms_norm", "silu_product"] * 3 + ["rms_norm"]
    for layer in model.model.layers:
        assert is_known(layer, LAYERS) and is_known(layer.self_attn, ATTENTIONS) and is_known(layer.mlp, MLPS)


@torch.no_grad()
def test_nothing_runs_fused_on_the_cpu_and_detach_gives_all_back() -> None:
    stock = tiny_model("qwen3")
    ids = random_ids(1, 45)
    want = stock(ids).logits
    model = attach(stock, small_config())
    seen = calls(model)
    model(ids)
    assert not seen
    detach(model)
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model(ids).logits, want)


@torch.no_grad()
def test_hooks_and_changed_modules_run() -> None:
    """What something hung on a module is heard, and a module that is not what its class says runs its own code."""
    ids = random_ids(1, 45)
    for name in ("post_attention_layernorm", "mlp", "mlp.down_proj", "self_attn.q_norm", "self_attn.o_proj"):
        models = [prepared("qwen3", fused) for fused in (False, True)]
        logits = []
        for model in models:
            module = model.model.layers[1].get_submodule(name)
            module.register_forward_hook(lambda _module, _args, out: out * 1.5)
            logits.append(model(ids).logits)
        torch.testing.assert_close(*logits, rtol=1e-5, atol=2e-5)
    models = [prepared("llama", fused) for fused in (False, True)]
    for model in models:
        model.model.layers[0].mlp.act_fn = nn.ReLU()
    torch.testing.assert_close(*(model(ids).logits for model in models), rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_layers_report_what_they_computed() -> None:
    """Sums are made in place, but never in what a layer was given or returned."""
    ids = random_ids(1, 45)
    states = [prepared("llama", fused)(ids, output_hidden_states=True).hidden_states for fused in (False, True)]
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_copies_run_their_own_modules() -> None:
    model, ids = prepared("qwen3", True), random_ids(1, 45)
    want = model(ids).logits
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(twin(ids).logits, want)
    parts = Parts()
    parts._compiled[fused_parts.rotate] = lambda: None
    assert pickle.loads(pickle.dumps(parts))._compiled == {}
