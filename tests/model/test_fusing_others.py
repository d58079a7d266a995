"""Fused parts leave alone what somebody else did to a model: hooks, other classes, other weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from elastic.model import fusing
from tests.helpers.models import random_ids
from tests.model.test_fusing import prepared


@torch.no_grad()
def test_hooks_and_changed_modules_run() -> None:
    """What something hung on a module is heard, and a module that is not what its class says runs its own code."""
    ids = random_ids(1, 45)
    for name in (
        "post_attention_layernorm",
        "mlp",
        "mlp.down_proj",
        "mlp.up_proj",
        "self_attn.q_norm",
        "self_attn.o_proj",
    ):
        models = [prepared("qwen3", fused) for fused in (False, True)]
        logits = []
        for model in models:
            module = model.model.layers[1].get_submodule(name)
            module.register_forward_hook(lambda _module, _args, out: out * 1.5)
            found = model(ids, use_cache=True)
            logits.append(torch.cat([found.logits, model(ids[:, :1], past_key_values=found.past_key_values).logits], 1))
        torch.testing.assert_close(*logits, rtol=1e-5, atol=2e-5)
    for activation in (nn.ReLU(), SiLU()):
        models = [prepared("llama", fused) for fused in (False, True)]
        for model in models:
            model.model.layers[0].mlp.act_fn = activation
        torch.testing.assert_close(*(model(ids).logits for model in models), rtol=1e-5, atol=2e-5)


class SiLU(nn.Module):
    """By its name that of torch."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Another one."""
        return hidden.relu()


@pytest.mark.parametrize("kind", [LlamaRMSNorm, LlamaMLP, LlamaAttention, LlamaDecoderLayer])
@torch.no_grad()
def test_another_forward_of_a_class_runs(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is put there to change all models of a family, before they are attached."""
    own = kind.forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = own(self, *args, **kwargs)
        return (found[0] * 1.5, *found[1:]) if isinstance(found, tuple) else found * 1.5

    plain, ids = prepared("llama", False), random_ids(1, 45)
    before = plain(ids).logits
    monkeypatch.setattr(kind, "forward", other)
    logits = [prepared("llama", fused)(ids).logits for fused in (False, True)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(before, logits[0], rtol=1e-2)


def heard(fused: bool, name: str) -> list[str]:
    """Hooks that passes of a model call: those of all modules, and all kinds of one module."""
    model, found = prepared("qwen3", fused), list[str]()
    module = model.model.layers[1].get_submodule(name)
    handle = register_module_forward_hook(lambda one, *_: found.append(type(one).__name__))
    with torch.no_grad():
        model(random_ids(1, 45))
    handle.remove()
    module.register_forward_pre_hook(lambda *_: found.append("before"))
    with torch.no_grad():
        model(random_ids(1, 45))
    module.register_full_backward_hook(lambda *_: found.append("backward"))
    embeddings = torch.randn(1, 45, 64, requires_grad=True)
    model(inputs_embeds=embeddings, use_cache=False).logits.square().mean().backward()
    return sorted(found)


@pytest.mark.parametrize("name", ["self_attn.k_norm", "mlp.act_fn", "mlp", "post_attention_layernorm"])
def test_every_kind_of_hook_is_called_once(name: str) -> None:
    plain, fused = heard(False, name), heard(True, name)
    assert fused == plain and fused.count("before") == 2 and fused.count("backward") == 1


class Packed(Tensor):
    """A weight in the place of that of an `nn.Linear`, as quantisation libraries make them: without storage."""

    @staticmethod
    def __new__(cls, plain: Tensor) -> "Packed":
        made: Any = Tensor
        packed: Packed = made._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype)
        return packed

    def __init__(self, plain: Tensor) -> None:
        self.plain = plain

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.linear:
            hidden, weight, *bias = args
            return nn.functional.linear(hidden, weight.plain, *bias)
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function is torch.ops.aten.detach.default:
            return cls(args[0].plain)
        raise NotImplementedError(f"{function} of a packed weight")


@torch.no_grad()
def test_weights_of_other_classes_are_left_to_their_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "unsupported_tokens", lambda x, *_: None if x.shape[:-1].numel() == 1 else "many")
    for name in ("token_products", "token_gated"):
        monkeypatch.setattr(fusing, name, None)
    ids, logits = random_ids(1, 45), []
    for fused in (False, True):
        model = prepared("qwen3", fused, chunk_tokens=7)
        for layer in model.model.layers:
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.weight = nn.Parameter(Packed(module.weight.data), requires_grad=False)
                    assert type(module) is nn.Linear and isinstance(module.weight, nn.Parameter)
        found = model(ids[:, :-1], use_cache=True)
        logits.append(model(ids[:, -1:], past_key_values=found.past_key_values).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=2e-5)
