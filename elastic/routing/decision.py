"""A layer's decision: from the keys at the prompt's boundaries before RoPE (pooling, router, route), or from its reach
after RoPE (level routers). Boundary decisions in inference on a GPU run one fused kernel, everything else PyTorch;
reports say which.

Legend: N samples, B rows, S tokens, E hidden size, P pooled tokens at either end of the prompt, M = N * 2P, K KV heads,
D head dim.
"""

from typing import Any

from torch import Tensor

from elastic.attention.layout import Layout
from elastic.attention.modes import mode_ids
from elastic.attention.prompt_reach import prompt_reach
from elastic.attention.row_slice import RowSlice
from elastic.config import ElasticConfig
from elastic.kernels import unsupported_reason
from elastic.kernels.route_prompt import route_prompt
from elastic.routing.level import LevelRouter, log_length
from elastic.routing.pooling import Pooling, half_sums
from elastic.routing.reach_router import ReachRouter
from elastic.routing.relaxation import decide, sample_route
from elastic.routing.router import AttentionRouter, Decision, Router


def decide_from_keys(
    router: Router, keys_N2PKD: Tensor, pooling: Pooling, config: ElasticConfig, earlier_NKD: Tensor | None, *,
    row_slice: RowSlice, temperature: float = 1.0, gumbel_NK2: Tensor | None = None, fused: bool = True,
) -> tuple[Decision, Tensor]:  # fmt: skip
    """Pooling and decision from the pre-RoPE keys of the prompt's boundaries.

    Args:
        earlier_NKD: what an earlier turn summed up of the first P keys.
        temperature, gumbel_NK2: of the Gumbel-softmax in training; default noise: drawn here.
        fused: whether the kernel may decide where it can.

    Returns:
        the decision, and the sum [N, K, D] of the first P keys.
    """
    if fused and row_slice.size == 1 and is_fused(router, keys_N2PKD):
        return fused_decision(router, keys_N2PKD, pooling, config, earlier_NKD)
    first, last = row_slice.sum(half_sums(keys_N2PKD, pooling.weight_N2P)).unbind(1)
    first = first if earlier_NKD is None else first + earlier_NKD
    pooled = (first + last) / pooling.count_N11
    logits = router(pooled)
    bias = config.sparsity_bias
    route = sample_route(logits, temperature, gumbel_NK2) if router.training else decide(logits.detach(), bias)
    return Decision(route, logits, pooled.detach()), first


def decide_from_reach(
    router: LevelRouter | ReachRouter, q_BHSD: Tensor, k_BKSD: Tensor, layout: Layout, config: ElasticConfig,
    scale: float, earlier_NR: Tensor | None, *, kept_NHQD: Tensor | None = None, dropped_NK: Tensor | None = None,
    level_N: Tensor | None = None, temperature: float = 1.0, gumbel_NK2: Tensor | None = None,
) -> Decision:  # fmt: skip
    """Decision of a router by level or by reach from queries and keys after RoPE, at most the last 32 of what the user
    wrote.

    Args:
        earlier_NR: reach in the layers before; None in the first.
        kept_NHQD: the queries of a prompt that was read in pieces (`last_queries`), instead of those here.
        dropped_NK: bool; heads whose cached keys are not all there, so that they tell nothing.
        level_N: MSR that each sample is run at instead (level routers), see `at_level`.
        temperature, gumbel_NK2: of the Gumbel-softmax in training; default noise: drawn here.
    """
    found = prompt_reach(q_BHSD, k_BKSD, layout, config.sparse, scale, kept_NHQD)
    reached = router.with_earlier(found.largest, found.recent, earlier_NR, dropped_NK)
    log_N = layout.memo("length", lambda: log_length(layout.user_end_N - layout.begin_N, config.sparse))
    features = router.with_length(reached, log_N)
    logits = router(features)
    if level_N is not None and isinstance(router, LevelRouter):
        route = router.route_at(level_N.expand(features.shape[0]))
    elif router.training:
        route = sample_route(logits, temperature, gumbel_NK2)
    else:
        route = decide(logits.detach(), config.sparsity_bias)
    return Decision(route, logits, features.detach(), reach_NR=reached)


def is_fused(router: Router, keys_N2PKD: Tensor) -> bool:
    """Whether the kernel decides for this router on these keys: in inference, wherever the attention kernel runs, which
    is what reports state.
    """
    if router.training or not isinstance(router, AttentionRouter):
        return False
    return unsupported_reason(keys_N2PKD.device, keys_N2PKD.dtype, keys_N2PKD.shape[3]) is None


def fused_decision(
    router: Any, keys_N2PKD: Tensor, pooling: Pooling, config: ElasticConfig, earlier_NKD: Tensor | None
) -> tuple[Decision, Tensor]:
    """`decide_from_keys` in one launch, with the modes of the head plan."""
    task, head, sparse = router.task, router.head, config.sparse
    layers = (task[0], task[2], head[0], head[2], head[4])
    statistics = None if router.config.feature_norm == "none" else (router.mean, router.var, router.count)
    found = route_prompt(
        keys_N2PKD.contiguous(),
        pooling.weight_N2P,
        pooling.count_N11.flatten(),
        [parameter for layer in layers for parameter in (layer.weight, layer.bias)],
        statistics,
        earlier=earlier_NKD,
        offset=router.offset,
        bias=config.sparsity_bias,
        modes=mode_ids(sparse),
    )
    return Decision(found.route, found.logits, found.pooled, found.mode), found.first
