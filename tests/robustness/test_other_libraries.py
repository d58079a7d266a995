"""Models that peft, bitsandbytes, accelerate or torch.compile have changed, before `attach` and after it: the same
answers, or one clear error with the model as it was.
"""

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from elastic.model import attach as attach_file
from elastic.model import fusing
from elastic.model.attach import (
    attach,
    detach,
    elastic_config,
    is_attached,
    last_routes,
    override_routes,
    routers,
)
from elastic.model.checkpoint import load_into, save_elastic
from elastic.model.layer_types import stock_implementation
from tests.helpers.models import FAMILIES, LINEAR, random_ids, small_config, tiny_model, varied_routers

IDS = random_ids(2, 40)


class Wrapper(nn.Module):
    """As peft's models: the transformers model two modules further in, its attributes handed through."""

    def __init__(self, base_model):
        super().__init__()
        self.base_model = base_model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)

    def forward(self, *args, **options):
        return self.base_model(*args, **options)


def twice_wrapped(model):
    outer = Wrapper(Wrapper(model))
    outer.prompt = nn.Parameter(torch.zeros(4, 64))  # as for prompt tuning
    return outer


def compiled(model):
    return torch.compile(model, backend="eager")


def outside(model):
    """Everything of a model that `attach` might change."""
    parts = {
        name: (sorted(vars(part)), part.training, list(part._modules), len(part._forward_pre_hooks))
        for name, part in model.named_modules()
    }
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return parts, flags, model.config.to_dict(), model.config._attn_implementation


# Each step of `attach`, and the call of it that fails.
STEPS = [
    (attach_file, "build_router", 1),
    (attach_file, "build_router", 3),
    (attach_file, "watch", 1),
    (attach_file, "fuse", 1),
    (fusing, "FusedLayer", 2),
    (nn.Module, "add_module", 1),
    (nn.Module, "add_module", 3),
    (nn.Module, "register_forward_pre_hook", 2),
    (nn.Module, "register_forward_pre_hook", 4),
    (PreTrainedModel, "set_attn_implementation", 1),
]


@pytest.mark.parametrize(("owner", "name", "call"), STEPS, ids=[f"{name} {call}" for _, name, call in STEPS])
def test_an_attach_that_fails_leaves_the_model_as_it_was(owner, name, call):
    model, plain, calls = tiny_model("qwen3"), getattr(owner, name), []
    next(model.parameters()).requires_grad_(False)
    before, expected = outside(model), model(IDS).logits

    def fails(*args, **options):
        calls.append(name)
        if len(calls) == call:
            raise MemoryError(name)
        return plain(*args, **options)

    with mock.patch.object(owner, name, fails), pytest.raises(MemoryError):
        attach(model, small_config())
    assert outside(model) == before and torch.equal(model(IDS).logits, expected)
    detach(attach(model, small_config()))
    assert outside(model) == before


class Fused(nn.Module):
    """Attention with its projections in one, as AWQ's fused layers."""

    attention_dropout = 0.0


UNFIT = {
    "fused": (
        lambda m: setattr(m.model.layers[1], "self_attn", Fused()),
        "layer 1 runs attention by Fused.*neither k_proj",
    ),
    "tensor parallel": (lambda m: setattr(m, "_tp_size", 2), "cut into 2 parts by tensor parallelism.*nothing says"),
    "no values": (lambda m: m.to("meta"), "layer 0 is on the meta device.*from_pretrained before routers"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_model_that_cannot_be_routed_is_refused_before_anything_is_touched(case):
    change, message = UNFIT[case]
    model = tiny_model()
    change(model)
    before = outside(model)
    with pytest.raises(ValueError, match=message):
        attach(model, small_config())
    assert outside(model) == before and not is_attached(model)


@pytest.mark.parametrize("wrap", [twice_wrapped, compiled])
@pytest.mark.parametrize("inner_first", [True, False])
def test_wrapper_and_model_are_one(wrap, inner_first):
    """Whichever of the two routers are attached to, both are attached, and either detaches."""
    model = tiny_model()
    wrapped = wrap(model)
    before, expected = outside(model), model(IDS).logits
    first, second = (model, wrapped) if inner_first else (wrapped, model)
    assert attach(first, small_config()) is first
    assert is_attached(model) and is_attached(wrapped) and elastic_config(model) is elastic_config(wrapped)
    with pytest.raises(ValueError, match="already has routers"):
        attach(second, small_config())
    flags = {name: parameter.requires_grad for name, parameter in first.named_parameters() if "router" not in name}
    assert not any(flags.values())
    with override_routes(second, 0):
        assert torch.equal(wrapped(IDS).logits, expected)
    detach(second)
    assert all(parameter.requires_grad for parameter in wrapped.parameters())
    assert not is_attached(model) and not is_attached(wrapped)
    assert outside(model) == before and torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_lookup_of_a_wrapped_model_is_verified(family):
    """The judge of `generate` is where transformers looks for it, not on the wrapper."""
    model = tiny_model(family)
    wrapped = twice_wrapped(model)
    attach(wrapped, small_config())
    varied_routers(wrapped)
    ids = random_ids(1, 12).repeat(1, 4)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    greedy = wrapped.generate(ids, **options)
    if family in LINEAR:
        with pytest.raises(ValueError, match="prompt_lookup_num_tokens takes tokens back, but the backbone's linear"):
            wrapped.base_model.generate(ids, prompt_lookup_num_tokens=3, **options)
    else:
        assert torch.equal(wrapped.base_model.generate(ids, prompt_lookup_num_tokens=3, **options), greedy)
    with pytest.raises(ValueError, match=r"penalty_alpha=0\.6 is not supported"):
        model.generate(ids, penalty_alpha=0.6, **options)
    pieces = wrapped.generate(ids, prefill_chunk_size=8, **options)
    assert torch.equal(model.generate(ids, prefill_chunk_size=8, **options), pieces)


def test_what_replaces_linear_layers_leaves_routers_alone():
    model = attach(tiny_model(), small_config())
    varied_routers(model)
    model(IDS)
    route = last_routes(model).route
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    assert linear and not any("router" in name for name in linear)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.model.layers[0].self_attn.k_proj) is not nn.Linear
    for router, before in zip(routers(quantised), routers(model), strict=True):
        assert all(torch.equal(value, before.state_dict()[name]) for name, value in router.state_dict().items())
    quantised(IDS)
    assert last_routes(quantised).route.shape == route.shape


class Offload:
    """A hook of accelerate, as far as it says where a module runs."""

    def __init__(self, device):
        self.execution_device = device


class Sequence:
    def __init__(self, *hooks):
        self.hooks = hooks


@pytest.mark.parametrize("hook", [Offload("cpu"), Sequence(object(), Offload(torch.device("cpu")))])
def test_routers_are_where_an_offloaded_layer_runs(hook):
    model = tiny_model()
    for layer in model.model.layers:
        layer.self_attn.k_proj.to("meta")._hf_hook = hook
    attach(model, small_config())
    assert {tensor.device.type for router in routers(model) for tensor in router.state_dict().values()} == {"cpu"}


def on_disk(model, folder, **where):
    model.save_pretrained(folder)
    options = {"attn_implementation": stock_implementation(model.config), "device_map": where or {"": "disk"}}
    return AutoModelForCausalLM.from_pretrained(folder, offload_folder=folder / "away", **options).eval()


PART = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
        "model.layers.0": "cpu", **{f"model.layers.{n}": "disk" for n in range(1, 5)}}  # fmt: skip


@pytest.mark.parametrize("where", [{}, PART], ids=["all", "some layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_disk_are_routed_as_in_memory(family, where, tmp_path):
    pytest.importorskip("accelerate", reason="the extra `demo` is not installed")
    here = tiny_model(family)
    away, expected = on_disk(here, tmp_path / "model", **where), here(IDS).logits
    assert torch.equal(away(IDS).logits, expected)
    before = outside(away)  # after a pass, in which accelerate unties tied weights
    torch.manual_seed(0)
    attach(here, small_config())
    varied_routers(here)
    save_elastic(tmp_path / "routers", here, "tiny")
    load_into(away, tmp_path / "routers")
    with override_routes(away, 0):
        assert torch.equal(away(IDS).logits, expected)
    for model in (here, away):
        model(IDS)
    assert torch.equal(last_routes(away).route, last_routes(here).route)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(away.generate(IDS, **options), here.generate(IDS, **options))
    save_elastic(tmp_path / "again", away, "tiny")
    detach(away)
    assert outside(away) == before and torch.equal(away(IDS).logits, expected)


def test_routers_that_are_offloaded_with_the_model_are_refused(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="the extra `demo` is not installed")
    model = attach(tiny_model(), small_config())
    with override_routes(model, 0):
        expected = model(IDS).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for use in (lambda: model(IDS), lambda: save_elastic(tmp_path / "routers", model, "tiny")):
        with pytest.raises(ValueError, match=r"router of layer 0 was offloaded.*offload first.*then attach"):
            use()
    assert not (tmp_path / "routers").exists()
    with override_routes(model, 0):
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(detach(model)(IDS).logits, expected)


def adapter(**settings):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **settings)


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_attach_after_peft(family, outer):
    peft, lora = adapter(target_modules="all-linear")
    wrapped = peft.get_peft_model(tiny_model(family), lora).eval()
    options = {"input_ids": IDS, "max_new_tokens": 3, "do_sample": False}
    expected, tokens, before = wrapped(IDS).logits, wrapped.generate(**options), outside(wrapped)
    attach(wrapped if outer else wrapped.get_base_model(), small_config())
    varied_routers(wrapped)
    with override_routes(wrapped, 0):
        assert torch.equal(wrapped(IDS).logits, expected)
        assert torch.equal(wrapped.generate(**options), tokens)
    detach(wrapped)
    assert outside(wrapped) == before and torch.equal(wrapped(IDS).logits, expected)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("target", ["all-linear", ["q_proj", "k_proj"]])
def test_peft_after_attach(target, merged, tmp_path):
    peft, lora = adapter(target_modules=target)
    model = attach(tiny_model(), small_config())
    varied_routers(model)
    before = [{name: value.clone() for name, value in router.state_dict().items()} for router in routers(model)]
    wrapped = peft.get_peft_model(model, lora).eval()
    if merged:
        wrapped = wrapped.merge_and_unload()
    for router, values in zip(routers(wrapped), before, strict=True):
        assert router.state_dict().keys() == values.keys()
        assert all(torch.equal(value, values[name]) for name, value in router.state_dict().items())
    with override_routes(wrapped, 0):
        expected = wrapped(IDS).logits
    save_elastic(tmp_path / "routers", wrapped, "tiny")
    detach(wrapped)
    assert not is_attached(model) and torch.equal(wrapped(IDS).logits, expected)
    load_into(wrapped, tmp_path / "routers")


def test_routers_that_peft_trains_are_saved_once_unwrapped(tmp_path):
    peft, lora = adapter(target_modules=["q_proj"], modules_to_save=["router"])
    model = attach(tiny_model(), small_config())
    wrapped = peft.get_peft_model(model, lora)
    trained = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad and "router" in name}
    assert trained
    with pytest.raises(ValueError, match=r"router of layer 0 was wrapped in a ModulesToSaveWrapper.*merge_and_unload"):
        save_elastic(tmp_path / "routers", wrapped, "tiny")
    with torch.no_grad():
        dict(wrapped.named_parameters())[min(trained)].fill_(7.0)
    merged = wrapped.merge_and_unload()
    save_elastic(tmp_path / "routers", merged, "tiny")
    assert any(bool((value == 7.0).all()) for router in routers(merged) for value in router.state_dict().values())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_bitsandbytes(family, bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    tiny_model(family, intermediate_size=128).save_pretrained(tmp_path)
    packing = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {"load_in_8bit": True}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**packing), attn_implementation="sdpa", device_map={"": "cpu"}
    ).eval()
    with torch.no_grad():
        expected = model(IDS).logits
        attach(model, small_config())
        varied_routers(model)
        with override_routes(model, 0):
            assert torch.equal(model(IDS).logits, expected)
        model(IDS)
        assert 0 < last_routes(model).route.mean() < 1
        model.generate(IDS, max_new_tokens=3)
        assert torch.equal(detach(model)(IDS).logits, expected)
