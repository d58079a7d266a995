"""The fused router against its twin in PyTorch, on a GPU."""

import pytest
import torch
from torch import Tensor, nn

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.kernels.route_prompt import RoutedPrompt, route_prompt
from elastic.model.attach import attach, last_features, last_routes
from elastic.routing.relaxation import decide
from elastic.routing.router import AttentionRouter, Dense
from tests.helpers.models import tiny_model, varied_routers
from tests.kernels.gpu import needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]


def trained_router(kv_heads: int, dim: int, norm: str = "running", samples: int = 20) -> AttentionRouter:
    """A router whose weights and statistics are those of no fresh one."""
    torch.manual_seed(kv_heads + dim)
    router = AttentionRouter(kv_heads, dim, RouterConfig(feature_norm=norm)).cuda()
    nn.init.normal_(router.head[-1].weight, std=0.05)  # logits of about one: tolerances below are absolute
    with torch.no_grad():
        router.head[-1].bias.copy_(torch.tensor([0.01, -0.02]))
    router.update_statistics(0.3 * torch.randn(samples, kv_heads, dim, device="cuda") + 0.1)
    return router


def linears(router: AttentionRouter) -> list[Tensor]:
    layers = [m for m in (*router.task, *router.head) if isinstance(m, Dense)]
    return [x for layer in layers for x in (layer.weight, layer.bias)]


def operands(samples: int, kv_heads: int, dim: int, dtype: torch.dtype, pool: int = 100):
    """Keys with NaN where the weight is 0."""
    keys = (torch.randn(samples, 2 * pool, kv_heads, dim, device="cuda") + torch.randn(dim, device="cuda")).to(dtype)
    weight = (torch.rand(samples, 2 * pool, device="cuda") < 0.9).float()
    weight[0] = 1.0
    keys[weight == 0] = float("nan")
    return keys, weight, weight.sum(1).clamp_min(1.0)


def twin(router: AttentionRouter, keys: Tensor, weight: Tensor, count: Tensor, earlier: Tensor | None, bias: float):
    half = keys.shape[1] // 2
    wide = torch.where(weight[:, :, None, None] > 0, keys.float(), 0.0)
    first, last = wide[:, :half].sum(1), wide[:, half:].sum(1)
    first = first if earlier is None else first + earlier
    pooled = (first + last) / count[:, None, None]
    logits = router(pooled).detach()
    return pooled, first, logits, decide(logits, bias)


def agree(found: RoutedPrompt, wanted: tuple[Tensor, ...], bias: float, modes: tuple[int, int]) -> None:
    for one, other in zip(found[:3], wanted[:3], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)
    sure = (wanted[2][..., 1] + bias - wanted[2][..., 0]).abs() > 1e-4
    assert sure.float().mean() > 0.9
    assert torch.equal(found.route[sure], wanted[3][sure])
    assert torch.equal(found.mode, torch.where(found.route > 0.5, modes[1], modes[0]).int())


@pytest.mark.parametrize("norm", ["running", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("samples", "kv_heads"), [(1, 8), (1, 2), (3, 3), (17, 8), (64, 4)])
def test_the_twins_agree(samples: int, kv_heads: int, dim: int, dtype: torch.dtype, norm: str) -> None:
    router = trained_router(kv_heads, dim, norm)
    keys, weight, count = operands(samples, kv_heads, dim, dtype)
    statistics = None if norm == "none" else (router.mean, router.var, router.count)
    earlier = torch.randn(samples, kv_heads, dim, device="cuda") if samples == 3 else None
    bias, modes = (0.1, (0, 1)) if dim == 64 else (0.0, (1, 2))
    found = route_prompt(keys, weight, count, linears(router), statistics, earlier=earlier, bias=bias, modes=modes)
    agree(found, twin(router, keys, weight, count, earlier, bias), bias, modes)
    for _ in range(5):
        again = route_prompt(keys, weight, count, linears(router), statistics, earlier=earlier, bias=bias, modes=modes)
        assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_offsets_of_the_heads_are_added() -> None:
    torch.manual_seed(0)
    router = AttentionRouter(8, 128, RouterConfig(head_offset=True)).cuda()
    nn.init.normal_(router.offset)
    keys, weight, count = operands(3, 8, 128, torch.bfloat16)
    statistics = (router.mean, router.var, router.count)
    found = route_prompt(keys, weight, count, linears(router), statistics, offset=router.offset.detach())
    agree(found, twin(router, keys, weight, count, None, 0.0), 0.0, (0, 1))
    assert torch.equal(found.route, (router.offset[:, 1] > router.offset[:, 0]).float().expand(3, -1))


def test_statistics_of_few_samples_leave_features_raw() -> None:
    router = trained_router(8, 128, samples=7)
    keys, weight, count = operands(2, 8, 128, torch.bfloat16)
    found = route_prompt(keys, weight, count, linears(router), (router.mean, router.var, router.count))
    agree(found, twin(router, keys, weight, count, None, 0.0), 0.0, (0, 1))


def test_an_undecided_router_chooses_full_attention() -> None:
    router = AttentionRouter(8, 128, RouterConfig()).cuda()
    found = route_prompt(*operands(2, 8, 128, torch.bfloat16), linears(router), (router.mean, router.var, router.count))
    assert not found.route.any() and not found.mode.any() and not found.logits.any()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_routes_as_in_pytorch(family: str) -> None:
    """Left-padded prompts and a later turn on the same cache; both ways decide alike wherever the logits are apart."""
    from transformers import DynamicCache

    model = tiny_model(family, hidden_size=256, head_dim=64).bfloat16()
    attach(model, ElasticConfig(RouterConfig(pool_tokens=16), SparseConfig(sink=128, window=128)))
    varied_routers(model)
    model.cuda()
    ids = torch.randint(1, 90, (3, 300), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :250], mask[2, :290] = 0, 0
    turn = torch.ones(3, 350, dtype=torch.long, device="cuda")
    turn[:, :300] = mask
    found = []
    for fused in (True, False):
        model._elastic_handle.state.fused = fused
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            first = last_routes(model)
            model(ids[:, :50], attention_mask=turn, past_key_values=cache)
        decisions = model._elastic_handle.state.last.record.decisions
        kernel = all(decision.mode_NK is not None for decision in decisions.values())
        assert kernel == fused
        found.append((first, last_routes(model), last_features(model)))
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-2, atol=1e-2)
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        sure = (other.logits[..., 1] - other.logits[..., 0]).abs() > 0.05  # later layers read bf16 outputs of earlier
        assert sure.any() and torch.equal(one.route[sure], other.route[sure])


def test_what_does_not_fit_is_named() -> None:
    router = trained_router(8, 128)
    keys, weight, count = operands(2, 8, 128, torch.bfloat16)
    statistics = (router.mean, router.var, router.count)
    with pytest.raises(ValueError, match=r"count is torch.float32 \[3\].*expected contiguous torch.float32 \[2\]"):
        route_prompt(keys, weight, count.new_ones(3), linears(router), statistics)
    with pytest.raises(ValueError, match="the fused router cannot run here: float32"):
        route_prompt(keys.float(), weight, count, linears(router), statistics)
    with pytest.raises(ValueError, match="9 parameters; expected 10"):
        route_prompt(keys, weight, count, linears(router)[:9], statistics)
    with pytest.raises(ValueError, match=r"expected contiguous \[N, 2P, K, D\]"):
        route_prompt(keys.transpose(1, 2), weight, count, linears(router), statistics)
