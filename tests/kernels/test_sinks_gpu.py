"""Attention sinks with the kernels on a GPU, against eager attention in fp64 and in the same type."""

from dataclasses import replace

import pytest
import torch

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import packed_layout
from elastic.attention.routed import backend_for, fused, routed_attention
from elastic.attention.torch_path import attend
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.console import say
from elastic.kernels import attention_decode, attention_forward, sinks_gradient
from elastic.kernels.attention_sinks import share_with_sinks
from elastic.model.attach import attach, override_routes
from tests.helpers.models import left_padded, random_ids, tiny_model
from tests.kernels.generators import random_problem
from tests.kernels.gpu import judge, needs_gpu, paths, run
from tests.kernels.gpu_backward import judge_gradients, run_backward, upstream
from tests.kernels.gpu_sinks import decode_with_sinks, expected_lse, largest_error, mean_errors, outcome, random_sinks
from tests.kernels.test_routed_attention import HAS_BACKWARD, layouts, valid
from tests.kernels.test_routed_attention import problem as layer_problem

pytestmark = [pytest.mark.gpu, needs_gpu]
CASES, CHUNK = 500, 100
SPARSE = SparseConfig(sink=64, window=64, block=64)
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("first", range(0, CASES, CHUNK))
def test_random_problems(first: int) -> None:
    """Poisoned outputs, every mode, packing and padding: output and LSE of all kernels, and all gradients, which are
    judged together: where one key has all the weight, eager attention is exact by luck, and a kernel that goes by its
    rounded output is not.
    """
    errors: list[tuple[list[float], list[float]]] = []
    for seed in range(first, first + CHUNK):
        problem = random_problem(seed)
        sinks, grad = random_sinks(seed, problem.q.shape[2]), upstream(problem, seed)
        exact, same = (outcome(problem, sinks, grad, dtype) for dtype in (torch.float64, problem.q.dtype))
        expected = exact[0], expected_lse(problem, sinks), largest_error(same[0], exact[0], problem)
        try:
            for path in paths():
                judge(*share_with_sinks(*run(problem, path), sinks), problem, expected)
            if not HAS_BACKWARD:
                continue
            out, lse = attention_forward(*problem.args(), sinks)
            found = run_backward(problem, grad, out, lse, deterministic=seed % 2 == 1)
            mine = judge_gradients(found, problem, (exact[1], [float("inf")] * 3))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        size = exact[2].norm().clamp_min(1e-2)  # less is nothing
        of_sinks = [((x - exact[2]).norm() / size).item() for x in (sinks_gradient(grad, out, lse, sinks), same[2])]
        errors.append(([*mine, of_sinks[0]], [*mean_errors(same, exact, problem), of_sinks[1]]))
    if errors:
        of_names = torch.tensor(errors).permute(2, 1, 0)
        for name, (mine_N, theirs_N) in zip(("dq", "dk", "dv", "dsinks"), of_names, strict=True):
            mean, largest = mine_N.mean() / theirs_N.mean(), mine_N.max() / theirs_N.max()
            say(f"{name}: mean error {mean:.2f} of eager's, largest {largest:.2f}")
            assert mine_N.isfinite().all() and mean <= 2 and largest <= 2, name


@pytest.mark.parametrize("name", ["rows", "left", "right", "decode", "chunk", "packed"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_layer_runs_the_kernel(name: str, head_dim: int) -> None:
    layout = layouts(DEVICE)[name]
    q, k, v, route = layer_problem(layout, torch.bfloat16, DEVICE, head_dim)
    plan = replace(HeadPlan.build(route, SPARSE, layout), sinks_H=random_sinks(0, 4).bfloat16())
    got = routed_attention(q, k, v, route, plan, 0.125).output
    assert torch.equal(got, fused(q, k, v, route, plan, 0.125))
    wide = replace(plan, sinks_H=plan.sinks_H.double())
    exact, same = attend(*(x.double() for x in (q, k, v)), wide, 0.125), attend(q, k, v, plan, 0.125)
    error, allowed = (valid(layout, out - exact).abs().max() for out in (got, same))
    assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps


@pytest.mark.skipif(not HAS_BACKWARD, reason="the backward kernels need compute capability 9.0")
def test_a_packed_row_trains_through_the_kernels() -> None:
    """Gradients of q, k, v, the routes and the sinks against the PyTorch path in fp32."""
    layout = packed_layout(torch.tensor([0, 1500, 1501, 4001]), None, 4001, DEVICE)
    gen = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (torch.randn(1, n, 4001, 64, generator=gen, device=DEVICE).bfloat16() for n in (8, 2, 2))
    route = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], device=DEVICE)
    grad = torch.randn(1, 4001, 8, 64, generator=gen, device=DEVICE).bfloat16()
    sinks, results = random_sinks(0, 8).bfloat16(), []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v, sinks)]
        routes = route.clone().requires_grad_()
        plan = replace(HeadPlan.build(routes, SPARSE, layout), sinks_H=leaves[3])
        out = routed_attention(*leaves[:3], routes, plan, 0.125).output
        results.append(torch.autograd.grad(out, (*leaves, routes), grad.to(dtype)))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 2e-2 * want.norm()


def test_a_graph_follows_lengths_that_change() -> None:
    problem = next(p for p in map(decode_with_sinks, range(100)) if int(p.spans[2].min()) > 1)
    call = (problem.q, problem.keys, problem.values, problem.base, *problem.spans)
    options = {"token_stride": problem.token_stride, "scale": problem.scale, "sinks": problem.sinks}
    attention_decode(*call, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_decode(*call, **options)
    for shorter in (0, 1, 1):
        problem.spans[2].sub_(shorter)
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(captured, attention_decode(*call, **options))


@torch.no_grad()
def test_a_model_with_sinks_answers_through_the_kernels(monkeypatch) -> None:
    """The first routed layer's output beside PyTorch's from the same input, and some decode steps."""
    config = ElasticConfig(RouterConfig(pool_tokens=8), SPARSE)
    model = attach(tiny_model("gpt_oss", hidden_size=256, head_dim=64).bfloat16().to(DEVICE), config)
    ids, mask = (x.to(DEVICE) for x in left_padded(random_ids(2, 300), [0, 70]))
    outputs: list[torch.Tensor] = []
    model.get_decoder().layers[1].self_attn.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    route = (torch.arange(12, device=DEVICE).view(3, 2, 2) % 3 == 1).float()
    with override_routes(model, route):
        model(ids, attention_mask=mask)
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert tokens.shape == (2, 306) and "attention_forward" in backend_for(DEVICE, torch.bfloat16, 64)
        monkeypatch.setattr("elastic.attention.routed.unsupported_reason", lambda *_: "switched off by the test")
        model(ids, attention_mask=mask)
    kernel, in_torch = (out[mask.bool()].float() for out in (outputs[0], outputs[-1]))
    assert not torch.equal(kernel, in_torch)
    assert (kernel - in_torch).norm() <= 2e-2 * in_torch.norm()
