"""Attention sinks (gpt-oss): outputs and gradients against softmax written out in fp64, and what does not run them."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from elastic.attention.block_selection import with_blocks
from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import batch_layout
from elastic.attention.routed import backend_for, fused, routed_attention
from elastic.attention.row_slice import RowSlice
from elastic.attention.torch_path import attend, attend_with_sinks
from elastic.config import SparseConfig
from elastic.inference.generate import new_cache
from elastic.model.attach import attach, override_routes, routers, set_row_slice
from tests.helpers.models import left_padded, random_ids, small_config, tiny_model, varied_routers
from tests.kernels.test_routed_attention import SPARSE as KERNEL_SPARSE
from tests.kernels.test_routed_attention import layouts, problem, valid

SPARSE = SparseConfig(sink=4, window=16, block=4)
DECODE = "attention_decode"


def written_out(q, k, v, mask, scale, sinks):
    """exp(scores) / (sum of exp(scores) + exp(sink)) in fp64."""
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, float("-inf"))
    total = torch.logaddexp(scores.logsumexp(-1), sinks.expand(scores.shape[:-1]))
    return (scores - total[..., None]).exp() @ v


def as_torch(q, k, v, mask, scale, sinks):
    """PyTorch's softmax with the sink as a key that has a bias and no value."""
    key, value = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf")).expand(*q.shape[:3], -1)
    bias = torch.cat([bias, sinks.expand(q.shape[:3])[..., None]], -1)
    return F.softmax(q @ key.transpose(2, 3) * scale + bias, -1) @ value


def outcome(function, tensors, weight, dtype):
    """The output, and the gradients of q, k, v and the sinks."""
    inputs = [x.to(dtype).requires_grad_() for x in tensors]
    mask = torch.ones(weight.shape[2], weight.shape[2]).tril().bool()
    out = function(*inputs[:3], mask, 8**-0.5, inputs[3])
    return [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)]


def errors_of(function, problems):
    """Relative errors [problems, 5] in fp32 against softmax written out in fp64."""
    rows = []
    for tensors, weight in problems:
        found, exact = (
            outcome(f, tensors, weight, d) for f, d in ((function, torch.float32), (written_out, torch.float64))
        )
        rows.append([float(((x - y).norm() / y.norm()).detach()) for x, y in zip(found, exact, strict=True)])
    return torch.tensor(rows)


def test_forward_and_backward_are_as_exact_as_pytorchs_softmax():
    """Over 500 problems, in the mean and at worst. (Of a single one PyTorch's own error may be small by luck.)"""
    generator, problems = torch.Generator().manual_seed(0), []
    for number in range(500):
        shape, spread = (1, 2, 3 + 7 * number % 40, 8), 0.2 + number % 20 / 3
        q, k, v, weight = (torch.randn(shape, generator=generator) for _ in range(4))
        problems.append(((spread * q, spread * k, v, spread * torch.randn(2, 1, generator=generator)), weight))
    ours, theirs = errors_of(attend_with_sinks, problems), errors_of(as_torch, problems)
    assert bool((ours.mean(0) <= 2 * theirs.mean(0)).all()) and float(theirs.mean(0).min()) > 0
    assert bool((ours.max(0).values <= 2 * theirs.max(0).values).all())


@pytest.mark.parametrize("modes", [[0, 0], [1, 1], [0, 1]], ids=["full", "streaming", "both"])
def test_modes_take_the_sink_of_each_query_head(modes):
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8), torch.randn(1, 2, 50, 8)
    plan = HeadPlan.build(torch.tensor([modes], dtype=torch.float32), SPARSE, batch_layout(1, 50, 0, q.device, None))
    plain = attend(q, k, v, plan, 8**-0.5)
    none = attend(q, k, v, replace(plan, sinks_H=torch.full((4,), -1e4)), 8**-0.5)
    torch.testing.assert_close(none, plain)
    sinks = torch.tensor([-1e4, 0.0, 3.0, 1e4])
    found = attend(q, k, v, replace(plan, sinks_H=sinks), 8**-0.5)
    torch.testing.assert_close(found[:, :, 0], plain[:, :, 0])
    assert float(found[:, :, 3].abs().max()) == 0
    assert bool((found[:, :, 1:3].abs() < plain[:, :, 1:3].abs() + 1e-6).all())
    ratio = found[:, :, 1:3] / plain[:, :, 1:3]
    assert float(ratio.std(-1).max()) < 1e-3  # one share for all of a head's numbers


XATTENTION = replace(KERNEL_SPARSE, route1="xattention", stride=8, threshold=0.5)


@pytest.mark.parametrize("name", ["rows", "left", "right", "chunk", "packed"])
@pytest.mark.parametrize("sparse", [KERNEL_SPARSE, XATTENTION], ids=["streaming", "xattention"])
def test_the_operators_equal_the_torch_path(name, sparse):
    """Output and the gradients of q, k, v, route and sinks, mixed routes, the operators' oracles for the kernels."""
    layout = layouts(torch.device("cpu"))[name]
    q, k, v, route = problem(layout, torch.float64, torch.device("cpu"), head_dim=16)
    sinks = torch.tensor([-1.0, 0.5, 2.0, 4.0], dtype=torch.float64)
    weight = torch.randn(layout.rows, layout.queries, 4, 16, generator=torch.Generator().manual_seed(1)).double()
    plan = HeadPlan.build(route, sparse, layout)
    if sparse is XATTENTION:
        plan = with_blocks(q, k, plan, 0.25, fused=False, both=True)
    results = []
    for run in (fused, lambda *args: routed_attention(*args).output):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, route, sinks)]
        out = valid(layout, run(*leaves[:4], replace(plan, sinks_H=leaves[4]), 0.25))
        results.append([out, *torch.autograd.grad((out * valid(layout, weight)).sum(), leaves)])
    for name, found, want in zip(("out", "q", "k", "v", "route", "sinks"), *results, strict=True):
        tolerance = 1e-5 if name == "route" else 1e-9  # the route's gradient is summed in fp32
        torch.testing.assert_close(found, want, rtol=tolerance, atol=tolerance, msg=lambda told, n=name: f"{n}: {told}")
        assert float(want.detach().norm()) > 0


@pytest.fixture
def operators_run(monkeypatch):
    """A layer's and a step's attention go to the operators, as on a GPU; the names of those that ran."""
    from elastic.attention import routed
    from elastic.cache import decode_attention

    ran = []
    for room, name in ((routed, "attention_forward"), (routed, "attention_backward"), (decode_attention, DECODE)):
        operator = getattr(room, name)
        monkeypatch.setattr(room, name, lambda *a, n=name, f=operator, **k: ran.append(n) or f(*a, **k))
    for room, name in ((routed, "unsupported_reason"), (routed, "unsupported_backward")):
        monkeypatch.setattr(room, name, lambda *_: None)
    monkeypatch.setattr(decode_attention, "unsupported_reason", lambda *_: None)
    return ran


def test_sinks_that_learn_need_the_backward_kernels(monkeypatch):
    """Where a GPU has none, PyTorch runs the layer, even if nothing else has a gradient."""
    from elastic.attention import routed

    monkeypatch.setattr(routed, "unsupported_reason", lambda *_: None)
    q, route = torch.randn(1, 2, 30, 8), torch.zeros(1, 2)
    plan = HeadPlan.build(route, SPARSE, batch_layout(1, 30, 0, q.device, None))
    sinks = torch.zeros(2, requires_grad=True)
    (in_torch,) = torch.autograd.grad(attend(q, q, q, replace(plan, sinks_H=sinks), 0.3).sum(), sinks)
    monkeypatch.setattr(routed, "fused", lambda *_: pytest.fail("a kernel ran"))
    found = routed_attention(q, q, q, route, replace(plan, sinks_H=sinks), 0.3).output
    assert torch.equal(*torch.autograd.grad(found.sum(), sinks), in_torch)


@pytest.mark.parametrize("kv_cache", ["full", "elastic"])
def test_a_model_with_sinks_reads_and_answers_through_the_operators(operators_run, monkeypatch, kv_cache):
    model = attach(tiny_model("gpt_oss"), replace(small_config(), kv_cache=kv_cache))
    ids, mask = left_padded(random_ids(2, 60), [0, 17])
    route = (torch.arange(12).view(3, 2, 2) % 3 == 1).float()
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.undo()
        cache = new_cache(model) if kv_cache == "elastic" else DynamicCache(config=model.config)
        with torch.no_grad(), override_routes(model, route):
            steps = [model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()]]
            for number in range(3):
                mask_now = torch.cat([mask, mask.new_ones(2, number + 1)], 1)
                token = random_ids(2, 1, seed=number)
                steps.append(model(token, attention_mask=mask_now, past_key_values=cache).logits)
        found.append(steps)
    for with_operators, in_torch in zip(*found, strict=True):
        torch.testing.assert_close(with_operators, in_torch, rtol=1e-4, atol=1e-4)
    assert operators_run.count("attention_forward") == 3 and operators_run.count(DECODE) == 9


def test_a_model_with_sinks_trains_through_the_operators(operators_run, monkeypatch):
    """The routers' gradients, and the sinks' once they are thawed."""
    model = attach(tiny_model("gpt_oss"), small_config()).train()
    varied_routers(model)
    sinks = [p for name, p in model.named_parameters() if name.endswith("sinks")]
    wanted = [p.requires_grad_() for p in (*sinks, *(r.head[-1].bias for r in routers(model)))]
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.undo()
        torch.manual_seed(0)
        loss = model(random_ids(2, 60), use_cache=False).logits.square().mean()
        found.append(torch.autograd.grad(loss, wanted))
    for with_operators, in_torch in zip(*found, strict=True):
        torch.testing.assert_close(with_operators, in_torch, rtol=1e-4, atol=1e-7)
        assert float(in_torch.norm()) > 0
    assert operators_run.count("attention_backward") == 3


def test_head_dim_256_runs_in_torch_with_the_reason():
    assert backend_for(torch.device("cuda"), torch.bfloat16, 256) == (
        "torch (cuda; bfloat16, head dim 256: the kernels take bf16 and fp16, 64 and 128)"
    )


SLICES = {"gpt_oss": "attention sinks|sliding layers", "olmo3": "this backbone's own sliding layers cross slices"}


@pytest.mark.parametrize(("family", "told"), SLICES.items())
def test_slices_of_rows_are_refused(family, told):
    class Half(RowSlice):
        size = 2

    model = attach(tiny_model(family), small_config())
    set_row_slice(model, Half())
    with pytest.raises(ValueError, match=told), torch.no_grad():
        model(random_ids(1, 20), cu_seq_lens=torch.tensor([0, 40]), use_cache=False)
