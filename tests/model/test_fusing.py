"""Fused parts of a layer: what they compute is what transformers' modules compute, in every family, and other modules
run their own code. On the CPU the compiler's eager backend runs the functions; tests marked `gpu` let it make kernels.
"""

import copy
import pickle
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.model import fused_parts, fusing
from elastic.model.attach import attach, detach, handle_of, override_routes, routers
from elastic.model.fused_parts import Function, Parts, always_fused
from elastic.model.fusing import ATTENTIONS, LAYERS, MLPS, NORMS, is_known
from tests.helpers.models import FAMILIES, left_padded, random_ids, small_config, tiny_model, varied_routers
from tests.kernels.gpu import needs_gpu


def plainly(function: Any, *args: Any) -> Any:
    """In place of `Parts.run`, the function itself."""
    return function(*args)


def prepared(family: str, fused: bool, **changes: Any) -> Any:
    """An attached model whose parts run on the CPU too, or not at all."""
    model = attach(tiny_model(family, initializer_range=0.1), replace(small_config(), **changes))
    varied_routers(model)
    parts = handle_of(model).state.layer_parts
    parts.devices, parts.on, parts.few = ("cpu",), fused, 0
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
    for size, rows in ((0, 2), (7, 2), (7, 1)):
        ids, mask = ids[-rows:], mask[-rows:]
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
def test_a_step_reads_weights_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bias and residual are added in the same launch; of many tokens every projection runs by itself."""
    few = 3
    monkeypatch.setattr(fusing, "unsupported_tokens", lambda x, *_: "many" if x.shape[:-1].numel() > few else None)
    launches = list[str]()
    for name in ("token_products", "token_gated"):
        plain = getattr(fusing, name)

        def noted(x: Tensor, *args: Any, plain: Any = plain, name: str = name) -> Any:
            assert x.shape[0] <= few
            launches.append(name)
            return plain(x, *args)

        monkeypatch.setattr(fusing, name, noted)
    for family in ("qwen3", "qwen2", "gemma3_text"):
        for rows in (1, 2, 4):
            ids, logits = random_ids(rows, 45), []
            for fused in (False, True):
                model = prepared(family, fused)
                found = model(ids[:, :-1], use_cache=True)
                launches.clear()
                logits.append(model(ids[:, -1:], past_key_values=found.past_key_values).logits)
            torch.testing.assert_close(*logits, rtol=1e-5, atol=2e-5)
            mlp = ["token_gated", "token_products"]
            layer = mlp if family == "gemma3_text" else ["token_products", "token_products", *mlp]
            assert launches == layer * len(model.model.layers) * (rows <= few)


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
def test_embeddings_in_another_order_in_memory() -> None:
    """Those that are [S, B, E] in memory, read in chunks."""
    for family in ("qwen3", "gemma3_text"):
        given = torch.randn(45, 2, 64).transpose(0, 1)
        models = [prepared(family, fused, chunk_tokens=7) for fused in (False, True)]
        logits = [model(inputs_embeds=given, use_cache=False).logits for model in models]
        torch.testing.assert_close(*logits, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_norms_of_heads_copy_nothing_and_keep_the_order_in_memory() -> None:
    model = prepared("gemma3_text", True)
    seen = calls(model)
    norm = model.model.layers[1].self_attn.q_norm
    heads = torch.randn(2, 7, 4, 16)
    want = norm(heads)
    for given in (heads, heads.transpose(1, 2)):
        seen.clear()
        found = norm(given)
        assert seen == ["rms_norm_offset"] and found.stride() == given.stride()
        assert torch.equal(found.transpose(1, 2) if given is not heads else found, want)
    seen.clear()
    assert torch.equal(norm(heads[:, ::2]), want[:, ::2]) and not seen, "what has gaps runs as in transformers"


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
    parts._compiled[fused_parts.rotate,] = lambda: None
    assert pickle.loads(pickle.dumps(parts))._compiled == {}


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape), requires_grad=False)


def operands(tokens: int) -> dict[Function, tuple[Any, ...]]:
    """What each function takes, for one token or several."""
    hidden, heads, turns = (tokens, 64), (tokens, 4, 16), (tokens, 16)
    made: dict[Function, tuple[Any, ...]] = {
        function: (hidden, weight(64), 1e-6) for function in set(NORMS.values())
    } | {
        fused_parts.add_rms_norm: (hidden, hidden, weight(64), 1e-6),
        fused_parts.silu_product: (hidden, hidden),
        fused_parts.gelu_product: (hidden, hidden),
        fused_parts.rotate: (heads, (tokens, 2, 16), turns, turns),
        fused_parts.norm_rotate: (heads, (tokens, 2, 16), weight(16), weight(16), 1e-6, turns, turns),
    }
    torch.manual_seed(tokens)
    return {
        function: tuple(torch.randn(x, requires_grad=True) if isinstance(x, tuple) else x for x in given)
        for function, given in made.items()
    }


def with_gradients(call: Any, given: tuple[Any, ...]) -> list[Tensor]:
    """Outputs, and gradients of what has one."""
    found = call(*given)
    outs = [found] if isinstance(found, Tensor) else list(found)
    leaves = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
    torch.manual_seed(0)
    loss = sum((out.float() * torch.randn(out.shape).to(out.device)).sum() for out in outs)
    assert isinstance(loss, Tensor)
    return [out.detach() for out in outs] + (list(torch.autograd.grad(loss, leaves)) if leaves else [])


def test_compiled_functions_and_their_gradients() -> None:
    """Any number of tokens after the first takes no new graph, and neither does one token."""
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    parts = Parts(("cpu",), backend=backend)
    frames = []
    for tokens in (7, 1, 30, 1, 9):
        for function, given in operands(tokens).items():
            got, want = (with_gradients(call, given) for call in (partial(parts.run, function), function))
            for one, other in zip(got, want, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        frames.append(backend.frame_count)
    assert frames[1:] == frames[1:2] * 4, "lengths share their graphs"


def test_no_use_of_a_model_is_one_too_many_for_the_compiler() -> None:
    """It compiles a code object 8 times, then leaves it to Python; widths, dtypes and uses of one model are more."""
    torch.compiler.reset()
    backend = CompileCounterWithBackend("eager")
    parts, count = Parts(("cpu",), backend=backend), 0
    for width in (64, 32, 16):
        for dtype in (torch.float32, torch.bfloat16):
            for use in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                for grad in (False, True):
                    hidden = torch.randn(7, width, dtype=dtype, requires_grad=grad)
                    with use():
                        parts.run(fused_parts.rms_norm, hidden, weight(width).to(dtype), 1e-6)
                    count += 1
    assert backend.frame_count == count


def test_passes_of_few_tokens_are_left_to_the_models_own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host is what takes time, unless a graph or gradients are being made."""
    monkeypatch.setattr(fused_parts, "unfused_reason", lambda _: None)
    model = attach(tiny_model("llama"), small_config())
    weights = sum(weight.numel() for weight in model.get_decoder().layers[0].parameters())
    parts = handle_of(model).state.layer_parts
    assert parts.few == int(1e-3 * 4e14 / (2 * weights))

    def taken(tokens: int, *heads: int) -> bool:
        shape = torch.Size((2, tokens // 2, *heads, 8))
        return parts.take(SimpleNamespace(device=torch.device("cuda"), shape=shape))  # type: ignore[arg-type]

    parts.few = 10
    assert taken(2)
    with torch.no_grad():
        assert [taken(tokens) for tokens in (2, 10, 12)] == [False, False, True]
        assert not taken(10, 6)
        with always_fused():
            assert taken(2)


@pytest.mark.gpu
@needs_gpu
def test_kernels_are_as_exact_as_the_functions() -> None:
    """In bf16, against fp32: outputs and gradients no worse than those of the plain functions."""
    parts = Parts()
    for tokens in (1, 2, 700):
        for function, given in operands(tokens).items():
            exact = with_gradients(function, placed(given, torch.float32, tokens > 1))
            rounded = placed(given, torch.bfloat16, tokens > 1)
            plain, found = (with_gradients(call, rounded) for call in (function, partial(parts.run, function)))
            for got, eager, want in zip(found, plain, exact, strict=True):
                allowed = (eager.float() - want).norm() + 1e-3 * want.norm()
                assert (got.float() - want).norm() <= 1.1 * allowed, function.__name__


def placed(given: tuple[Any, ...], dtype: torch.dtype, grads: bool) -> tuple[Any, ...]:
    """The operands on the GPU in this precision, all of them rounded to bf16 before; steps have no gradients."""
    found = list[Any]()
    for x in given:
        if isinstance(x, Tensor):
            moved = x.detach().bfloat16().to("cuda", dtype)
            known = isinstance(x, nn.Parameter)
            x = nn.Parameter(moved, False) if known else moved.requires_grad_(x.requires_grad and grads)
        found.append(x)
    return tuple(found)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
@torch.no_grad()
def test_models_answer_as_unfused_on_the_gpu(family: str) -> None:
    """A prompt and steps of one and of two rows: as close to fp32 as with transformers' own modules."""
    changes = {"hidden_size": 256, "head_dim": 64}
    config = ElasticConfig(RouterConfig(pool_tokens=8), SparseConfig(sink=64, window=64, block=64))
    logits = {}
    for name, dtype, fused in (("exact", torch.float32, False), ("plain", torch.bfloat16, False),
                               ("fused", torch.bfloat16, True)):  # fmt: skip
        model = attach(tiny_model(family, **changes).to(dtype), config).to("cuda")
        parts = handle_of(model).state.layer_parts
        parts.on, parts.few = fused, 0
        logits[name] = torch.cat([answers(model, rows) for rows in (1, 2)])
    error, allowed = ((logits[name] - logits["exact"]).norm() for name in ("fused", "plain"))
    assert error <= 1.2 * allowed


def answers(model: Any, rows: int) -> Tensor:
    """fp32 logits of a prompt and of three tokens after it, every head in full."""
    ids = random_ids(rows, 300).cuda()
    with override_routes(model, 0):
        found = model(ids[:, :-3], use_cache=True)
        steps = [found.logits]
        for place in range(-3, 0):
            token = ids[:, place : place + 1 or None]
            with always_fused():
                steps.append(model(token, past_key_values=found.past_key_values, use_cache=True).logits)
    return torch.cat(steps, 1).float().flatten(0, 1)
