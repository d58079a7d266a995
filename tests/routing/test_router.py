"""The router: size, neutral start, boundary pooling against the obvious loop, running statistics."""

import math

import pytest
import torch

from elastic.config import RouterConfig
from elastic.routing.kinds import build_router
from elastic.routing.pooling import BoundarySlots, half_sums
from elastic.routing.router import MIN_STATISTICS, AttentionRouter, entropy


def naive_pool(keys_SKD: torch.Tensor, begin: int, end: int, pool: int) -> torch.Tensor:
    """Spec section 3 word by word."""
    prompt = keys_SKD[begin:end].float()
    if end - begin < 2 * pool:
        return prompt.mean(0)
    return torch.cat([prompt[:pool], prompt[-pool:]]).mean(0)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("begin", [0, 3])
def test_pooling_takes_the_prompts_ends_once(length, begin):
    keys = torch.randn(begin + length + 5, 2, 4, generator=torch.Generator().manual_seed(length))
    slots = BoundarySlots.of(torch.tensor([begin]), torch.tensor([begin + length]), pool_tokens=8)
    pooled = half_sums(keys[slots.index_N2P], slots.weight_N2P).sum(1) / slots.weight_N2P.sum(1)[:, None, None]
    torch.testing.assert_close(pooled[0], naive_pool(keys, begin, begin + length, 8))


def test_size_and_neutral_start():
    router = AttentionRouter(8, 128, RouterConfig())
    assert sum(p.numel() for p in router.parameters()) == 263_682
    logits = router(torch.randn(5, 8, 128))
    assert logits.shape == (5, 8, 2)
    assert torch.equal(logits, torch.zeros_like(logits))
    assert entropy(logits).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_differences_between_inputs_reach_the_last_layer(head_dim):
    """They would come down to a sixtieth under PyTorch's default initialisation."""
    torch.manual_seed(0)
    router = AttentionRouter(2, head_dim, RouterConfig())
    features = torch.randn(64, 2, head_dim)
    spread = router.head[:-1](router.task(features)).std(0).mean() / features.std(0).mean()
    assert 0.3 < spread < 3


def test_statistics_equal_those_of_all_batches_at_once():
    router = AttentionRouter(2, 4, RouterConfig())
    batches = [torch.randn(n, 2, 4, generator=torch.Generator().manual_seed(n)) * 3 + 5 for n in (1, 7, 4)]
    for batch in batches:
        router.update_statistics(batch)
    everything = torch.cat(batches)
    assert router.count.item() == 12
    torch.testing.assert_close(router.mean, everything.mean(0))
    torch.testing.assert_close(router.var, everything.var(0, unbiased=False))
    standardised = router.standardise(everything)
    torch.testing.assert_close(standardised.mean(0), torch.zeros(2, 4), atol=1e-5, rtol=0)


def test_features_stay_raw_until_the_statistics_mean_something():
    router = AttentionRouter(2, 4, RouterConfig())
    pooled = torch.randn(MIN_STATISTICS - 1, 2, 4)
    router.update_statistics(pooled)
    assert torch.equal(router.standardise(pooled), pooled)
    router.update_statistics(pooled[:1])
    assert not torch.equal(router.standardise(pooled), pooled)


def test_the_papers_router_ignores_statistics():
    router = AttentionRouter(2, 4, RouterConfig(feature_norm="none"))
    pooled = torch.randn(20, 2, 4)
    router.update_statistics(pooled * 10)
    assert torch.equal(router.standardise(pooled), pooled)


def test_bf16_keys_give_fp32_logits_under_autocast():
    router = AttentionRouter(2, 4, RouterConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router(torch.randn(3, 2, 4, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["input", "static"])
def test_routers_can_begin_near_the_dense_model(kind):
    router = build_router(3, 16, RouterConfig(kind=kind))
    router.begin_at(-2.0)
    logits = router(torch.randn(5, 3, 16))
    assert torch.equal(logits, torch.tensor([0.0, -2.0]).expand(5, 3, 2))


def test_head_offsets_tell_heads_apart_that_standardised_features_cannot():
    """The same features for both heads: only offsets of their own let one head stay full and the other run sparse."""
    torch.manual_seed(0)
    features = torch.randn(32, 1, 8).expand(-1, 2, -1)
    wanted = torch.tensor([0.0, 1.0]).expand(32, 2)
    found = {}
    for offset in (False, True):
        router = build_router(2, 8, RouterConfig(feature_norm="none", head_offset=offset))
        assert [p.shape for p in router.head_logits()] == ([torch.Size([2, 2])] if offset else [])
        optimiser = torch.optim.Adam(router.parameters(), lr=3e-2)
        for _ in range(60):
            optimiser.zero_grad()
            logits = router(features)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[..., 1] - logits[..., 0], wanted)
            loss.backward()
            optimiser.step()
        found[offset] = loss.item()
    assert found[False] == pytest.approx(math.log(2), abs=1e-2) and found[True] < 0.3
