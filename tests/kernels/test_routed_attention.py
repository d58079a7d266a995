"""`routed_attention` through the fused operator: the plan's translation on the CPU, the kernels on a GPU."""

from dataclasses import replace

import pytest
import torch

import elastic
from elastic.attention.block_selection import density, with_blocks
from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import Layout, batch_layout, packed_layout
from elastic.attention.routed import _StraightThrough, backend_for, fused, routed_attention
from elastic.attention.torch_path import attend
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.kernels import devices, jit
from elastic.kernels.block_bits import mask_from_bits
from elastic.model.attach import last_routes, override_routes, routers
from tests.helpers.models import left_padded, random_ids, tiny_model, varied_routers
from tests.kernels.gpu import HAS_GPU, needs_gpu

HAS_BACKWARD = HAS_GPU and torch.cuda.get_device_capability() == (9, 0)
SPARSE = SparseConfig(sink=64, window=64, block=64)
TOKENS = SparseConfig(sink=64, window=128, block=64, granule="token")
BOUNDS = [0, 1, 130, 300]


def layouts(device: torch.device) -> dict[str, Layout]:
    """Whole rows, left padding, right padding, one new token after a padded prompt, packed samples."""
    mask = torch.ones(2, 300, dtype=torch.int64)
    mask[1, :77] = 0
    return {
        "rows": batch_layout(2, 300, 0, device),
        "left": batch_layout(2, 300, 0, device, mask),
        "right": batch_layout(2, 300, 0, device, mask.flip(1)),
        "decode": batch_layout(2, 1, 299, device, mask),
        "chunk": batch_layout(2, 40, 260, device, mask),
        "packed": packed_layout(torch.tensor(BOUNDS), None, 300, device),
    }


def valid(layout: Layout, out: torch.Tensor) -> torch.Tensor:
    """The output rows that belong to a sample."""
    return torch.cat([out[row, max(0, b - layout.past) : e - layout.past] for row, b, e in layout.spans])


def problem(layout: Layout, dtype: torch.dtype, device: torch.device, head_dim: int = 64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((layout.rows, 4, layout.queries, head_dim), *[(layout.rows, 2, layout.keys, head_dim)] * 2)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    route = (torch.arange(2 * len(layout.row_N)).view(-1, 2) % 3 == 1).float().to(device)
    return q, k, v, route


@pytest.mark.parametrize("name", ["rows", "left", "right", "decode", "chunk", "packed"])
@pytest.mark.parametrize("sparse", [SPARSE, TOKENS], ids=["block", "token"])
def test_the_operator_computes_what_the_plan_says(name, sparse):
    layout = layouts(torch.device("cpu"))[name]
    q, k, v, route = problem(layout, torch.float64, torch.device("cpu"))
    plan = HeadPlan.build(route, sparse, layout)
    got, expected = valid(layout, fused(q, k, v, route, plan, 0.125)), valid(layout, attend(q, k, v, plan, 0.125))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_the_backend_is_named():
    assert backend_for(torch.device("cpu"), torch.bfloat16, 128) == "torch (cpu)"


def test_a_gpu_without_backward_kernels_says_so(monkeypatch):
    monkeypatch.setattr(devices, "capability_of", lambda _index: (8, 0))
    monkeypatch.setattr(jit, "is_installed", lambda: True)
    ampere = torch.device("cuda", 63)  # the answers are cached by device
    assert backend_for(ampere, torch.bfloat16, 128) == "attention_forward_sm80 (sm_80)"
    chosen = backend_for(ampere, torch.bfloat16, 128, sparse=SparseConfig(route1="xattention"))
    assert chosen.endswith("(sm_80); key blocks are chosen in torch: the selection kernel needs compute capability 9.0")
    assert backend_for(ampere, torch.bfloat16, 128, sparse=SPARSE) == "attention_forward_sm80 (sm_80)"
    named = backend_for(ampere, torch.bfloat16, 128, training=True)
    assert named == "torch (cuda; the backward kernels need compute capability 9.0)"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", ["rows", "left", "right", "decode", "chunk", "packed"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_runs_where_no_gradient_is_wanted(name, head_dim):
    device = torch.device("cuda", 0)
    layout = layouts(device)[name]
    q, k, v, route = problem(layout, torch.bfloat16, device, head_dim)
    plan = HeadPlan.build(route, SPARSE, layout)
    assert "attention_forward" in backend_for(device, torch.bfloat16, head_dim)
    got = routed_attention(q, k, v, route, plan, 0.125).output
    assert torch.equal(got, fused(q, k, v, route, plan, 0.125))
    exact = attend(*(x.double() for x in (q, k, v)), plan, 0.125)
    same = attend(q, k, v, plan, 0.125)
    error, allowed = (valid(layout, out - exact).abs().max() for out in (got, same))
    assert error <= 2 * allowed + torch.finfo(torch.bfloat16).eps
    assert routed_attention(q.requires_grad_(), k, v, route, plan, 0.125).output.requires_grad


XA_MODES = {"FA-XA": ("full", "xattention"), "XA-SSA": ("xattention", "streaming")}


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not HAS_BACKWARD, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("name", ["rows", "left", "chunk", "packed"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("configuration", XA_MODES)
def test_chosen_blocks_go_through_the_kernels(name, block, configuration):
    """Output and all gradients, the routes' too, against the PyTorch path in fp64 under the same block choice."""
    device = torch.device("cuda", 0)
    layout = layouts(device)[name]
    sizes = {"sink": block, "window": block, "block": block, "stride": 8, "threshold": 0.5}
    sparse = SparseConfig(*XA_MODES[configuration], **sizes)
    q, k, v, route = problem(layout, torch.bfloat16, device)
    q, k = 2 * q, 2 * k
    plan = HeadPlan.build(route, sparse, layout)
    plan = with_blocks(q, k, plan, 0.125, fused=False, both=True)
    weight = torch.randn(
        layout.rows, layout.queries, 4, 64, generator=torch.Generator(device).manual_seed(1), device=device
    )
    results = []
    for run, dtype in ((fused, torch.bfloat16), (twin, torch.bfloat16), (twin, torch.float64)):
        operands = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        routes = route.clone().requires_grad_()
        out = valid(layout, run(*operands, routes, plan, 0.125))
        gradients = torch.autograd.grad((out * valid(layout, weight)).sum(), (*operands, routes))
        results.append([x.double() for x in (out, *gradients)])
    for kernel, same, exact in zip(*results, strict=True):
        error, allowed = (kernel - exact).norm(), (same - exact).norm()
        assert error <= 2 * allowed + 1e-2 * exact.norm(), (float(error), float(allowed), float(exact.norm()))
    if (name, block) != ("packed", 128):  # samples of two blocks: every mode sees all of them
        assert float(results[-1][-1].norm()) > 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not HAS_BACKWARD, reason="needs a GPU of compute capability 9.0")
@pytest.mark.parametrize("name", ["rows", "left", "chunk", "packed"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_blocks_are_chosen_on_the_gpu(name, head_dim):
    """With nothing chosen in advance: the operator's bits, nearly the oracle's, and the output under just these."""
    device = torch.device("cuda", 0)
    layout = layouts(device)[name]
    sparse = SparseConfig("full", "xattention", sink=64, window=64, block=64, stride=8, threshold=0.5)
    q, k, v, route = problem(layout, torch.bfloat16, device, head_dim)
    q, k = 2 * q, 2 * k
    plan = HeadPlan.build(route, sparse, layout)
    found = routed_attention(q, k, v, route, plan, 0.125)
    chosen = found.plan
    slow = with_blocks(q, k, plan, 0.125, fused=False, both=False)
    differ = (mask_from_bits(chosen.bits) != mask_from_bits(slow.bits)).any(-1)
    assert float(differ.float().mean()) <= 0.05  # masses on the threshold fall to either side
    assert (found.density - density(slow)).abs().max() < 0.02
    out = valid(layout, found.output)
    assert torch.equal(out, valid(layout, fused(q, k, v, route, chosen, 0.125)))
    exact = valid(layout, attend(*(x.double() for x in (q, k, v)), chosen, 0.125))
    assert (out - exact).abs().max() < 2e-2 * exact.abs().max()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.skipif(not HAS_BACKWARD, reason="needs a GPU of compute capability 9.0")
def test_a_model_with_xattention_heads_trains_and_generates_on_the_gpu():
    """At threshold 1 it is the dense model; below, fewer pairs are visited, and the routers get a gradient."""
    ids, mask = left_padded(random_ids(2, 400), [0, 130])
    ids, mask = ids.cuda(), mask.cuda()
    model = tiny_model(hidden_size=256, head_dim=64).bfloat16()
    sparse = SparseConfig("xattention", "streaming", sink=64, window=64, block=64, stride=16, threshold=1.0)
    elastic.attach(model, ElasticConfig(RouterConfig(pool_tokens=8), sparse)).cuda()
    with torch.no_grad():
        with override_routes(model, 0):
            whole = model(ids, attention_mask=mask).logits[mask.bool()]
        with override_routes(model, 0, sparse.dense):
            dense = model(ids, attention_mask=mask).logits[mask.bool()]
        torch.testing.assert_close(whole, dense, rtol=0, atol=0.05)
        with override_routes(model, 0, replace(sparse, threshold=0.3)):
            model(ids, attention_mask=mask)
            assert float(last_routes(model).density.max()) < 0.9
            tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 404)
    varied_routers(model)
    model.train()(ids, attention_mask=mask).logits.float().square().mean().backward()
    assert all(router.head[-1].bias.grad.abs().sum() > 0 for router in routers(model))


def twin(q, k, v, route, plan, scale):
    """`routed_attention` of the PyTorch path, on any device."""
    out = attend(q, k, v, plan, scale)
    with torch.no_grad():
        other = attend(q, k, v, plan.flipped(), scale)
    return _StraightThrough.apply(out, other, route, plan.layout)


@pytest.mark.gpu
@needs_gpu
def test_a_routed_model_generates_through_the_kernel(monkeypatch):
    """Left-padded batch with mixed routes: logits as close to fp32 as those of the PyTorch path in the same dtype."""
    ids, mask = left_padded(random_ids(3, 300), [0, 50, 120])
    ids, mask = ids.cuda(), mask.cuda()
    pattern = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]] * 3, device="cuda")
    outputs = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(hidden_size=256, head_dim=64).to(dtype)
        elastic.attach(model, ElasticConfig(RouterConfig(pool_tokens=8), SPARSE))
        varied_routers(model)
        model.to("cuda")
        with torch.no_grad(), override_routes(model, pattern):
            outputs.append(model(ids, attention_mask=mask).logits.float())
    exact, kernel = outputs
    with torch.no_grad():
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tokens.shape == (3, 308)
    monkeypatch.setattr("elastic.attention.routed.unsupported_reason", lambda *_: "switched off by the test")
    with torch.no_grad(), override_routes(model, pattern):
        twin = model(ids, attention_mask=mask).logits.float()
    assert not torch.equal(kernel, twin)
    error, allowed = ((out - exact)[mask.bool()].abs().max() for out in (kernel, twin))
    assert error <= 2 * allowed
