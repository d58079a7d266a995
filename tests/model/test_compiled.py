"""`compile_layers`: torch.compile around attention changes nothing but speed."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.model.attach import attach, detach, handle_of, last_routes, routers
from elastic.model.compiling import compile_layers
from elastic.routing.sparsity import msr
from elastic.training.module import ElasticModule
from tests.helpers.models import random_ids, small_config, tiny_model, varied_routers
from tests.kernels.gpu import needs_gpu

LENGTHS = (120, 133, 171)


def step(model: Any, length: int, device: str = "cpu", seed: int = 3) -> tuple[Tensor, list[Tensor]]:
    """Final hidden states of a packed row in training mode, and the routers' gradients (the routes' seed is fixed)."""
    batch = {
        "input_ids": random_ids(1, length),
        "cu_seq_lens": torch.tensor([0, 50, length], dtype=torch.int32),
        "prompt_spans": torch.tensor([[0, 30], [50, 90]]),
    }
    torch.manual_seed(seed)
    inputs: dict[str, Any] = {name: x.to(device) for name, x in batch.items()}
    hidden = model.get_decoder()(**inputs, use_cache=False).last_hidden_state
    weights = [p for router in routers(model) for p in router.parameters()]
    loss = hidden.float().square().mean() + msr(last_routes(model).route).mean()
    return hidden.detach(), list(torch.autograd.grad(loss, weights))


def trained(family: str, checkpointing: bool) -> Any:
    model = attach(tiny_model(family, num_hidden_layers=6), small_config()).train()
    varied_routers(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_training_is_the_same(family: str, checkpointing: bool) -> None:
    model = trained(family, checkpointing)
    expected = [step(model, length) for length in LENGTHS]
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compile_layers(model, backend=backend)
    frames = []
    for length, (hidden, gradients) in zip(LENGTHS, expected, strict=True):
        got, found = step(model, length)
        frames.append(backend.frame_count)
        torch.testing.assert_close(got, hidden, rtol=0, atol=1e-6)
        for one, other in zip(found, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert 0 < frames[0] < 12, "layers share their graphs"
    assert frames == frames[:1] * len(LENGTHS), "another length needs no new graph"


def test_generation_is_the_same_and_detach_undoes_it() -> None:
    plain = tiny_model(num_hidden_layers=10)
    ids = random_ids(2, 60)
    with torch.no_grad():
        stock = plain(ids).logits
    model = attach(plain, small_config())
    varied_routers(model)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    torch.compiler.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compile_layers(model, backend=backend)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert 0 < backend.frame_count < 10, "layers share their graphs"
    frames, restored = backend.frame_count, detach(model)
    with torch.no_grad():
        assert torch.equal(restored(ids).logits, stock) and backend.frame_count == frames


def test_a_training_run_asks_for_it_by_a_setting() -> None:
    for compiled in (False, True):
        module = ElasticModule("tiny", compiled=compiled)
        module.configure_model()
        parts = [part for part, _ in handle_of(module.model).compiled]
        assert {layer.self_attn in parts for layer in module.model.get_decoder().layers} == {compiled}


def test_a_model_without_routers_is_refused() -> None:
    with pytest.raises(ValueError, match="this model has no routers"):
        compile_layers(tiny_model())


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_inductor_trains_through_the_kernels(family: str, checkpointing: bool) -> None:
    """Two steps of different lengths: hidden states and router gradients as close to fp32 as those of the uncompiled
    model in bf16. Roundings may turn a route that is drawn near its threshold; other noise is taken then.
    """
    models = {}
    for name, dtype in (("exact", torch.float32), ("eager", torch.bfloat16), ("compiled", torch.bfloat16)):
        model = tiny_model(family, hidden_size=256, head_dim=64).to(dtype)
        attach(model, ElasticConfig(RouterConfig(pool_tokens=8), SparseConfig(sink=64, window=64, block=64))).train()
        varied_routers(model)
        models[name] = model.to("cuda")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.compiler.reset()
    compile_layers(models["compiled"])
    for length in (700, 900):
        hidden, gradients = like_routes(models, length)
        error, allowed = ((hidden[name] - hidden["exact"]).abs().max() for name in ("compiled", "eager"))
        assert error <= 2 * allowed
        error, allowed = ((gradients[name] - gradients["exact"]).norm() for name in ("compiled", "eager"))
        assert error <= 2 * allowed + 1e-3 * gradients["exact"].norm()


def like_routes(models: dict[str, Any], length: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Hidden states and flat gradients of one step by model, with noise under which all take the same routes."""
    for seed in range(3, 13):
        results, routes = {}, []
        for name, model in models.items():
            results[name] = step(model, length, "cuda", seed)
            routes.append(last_routes(model).route > 0.5)
        if all(torch.equal(route, routes[0]) for route in routes):
            return (
                {name: hidden.float() for name, (hidden, _) in results.items()},
                {name: torch.cat([g.flatten() for g in grads]) for name, (_, grads) in results.items()},
            )
    raise AssertionError("the models take different routes under every noise tried")
