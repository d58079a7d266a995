"""MSR and ESR, the two sparsity ratios (spec section 2; paper eq. 4 and 5), and the KV cache that the routes need.

Legend: L layers, N samples, K KV heads.
"""

from functools import lru_cache

import torch
from torch import Tensor

from elastic.config import SparseConfig
from elastic.visibility import lower_bound


def msr(route_LNK: Tensor) -> Tensor:
    """Model sparsity ratio per sample, [N]: share of (layer, KV head) pairs routed to route 1. Keeps the route's
    gradient.
    """
    return route_LNK.mean(dim=(0, 2))


def esr(route_LNK: Tensor, lengths_N: Tensor, sparse: SparseConfig) -> tuple[Tensor, Tensor]:
    """Effective sparsity ratio per sample: share of causally visible (query, key) pairs that no visited block computes.

    Args:
        route_LNK: routes in {0, 1}.
        lengths_N: tokens of each sample.
        sparse: modes of the two routes and pattern sizes.

    Returns:
        (`esr_last`, `esr_all`), float64 [N] on the route's device: of the last layer, as the paper reports it, and the
        mean over layers.
    """
    lengths, device = lengths_N.tolist(), route_LNK.device
    pruned = torch.tensor(
        [[1 - visited_pairs(n, mode, sparse) / causal_pairs(n) for n in lengths] for mode in _modes(sparse)],
        dtype=torch.float64,
    ).to(device)
    per_layer = torch.lerp(pruned[0], pruned[1], route_LNK.detach().double().mean(2))
    return per_layer[-1], per_layer.mean(0)


def kv_bytes_kept(
    route_LNK: Tensor, lengths_N: Tensor, sparse: SparseConfig, head_dim: int, element_size: int
) -> Tensor:
    """Bytes of keys and values that the routes need after prefill, int64 [N]: streaming heads keep sink + window
    tokens, others all.

    This is what an elastic KV cache holds; the ordinary cache keeps every token of every head.
    """
    lengths = lengths_N.detach().cpu()
    kept = torch.stack(
        [lengths.clamp(max=sparse.sink + sparse.window) if mode == "streaming" else lengths for mode in _modes(sparse)]
    )
    heads = (route_LNK.detach().cpu() > 0.5).sum(dim=(0, 2))
    total = route_LNK.shape[0] * route_LNK.shape[2]
    return ((total - heads) * kept[0] + heads * kept[1]) * (2 * head_dim * element_size)


def causal_pairs(length: int) -> int:
    """(query, key) pairs with key <= query."""
    return length * (length + 1) // 2


@lru_cache(maxsize=4096)
def visited_pairs(length: int, mode: str, sparse: SparseConfig) -> int:
    """Causally visible pairs inside the blocks that a head of this mode visits, for a sample of `length` tokens."""
    if mode == "full":
        return causal_pairs(length)
    if mode != "streaming":
        raise ValueError(
            f"the visited blocks of mode {mode!r} depend on the input; pass its head plan's counts instead"
        )
    block = sparse.block
    pairs = 0
    for start in range(0, length, block):
        rows = min(block, length - start)
        local = max(0, lower_bound(start, sparse.window, sparse.granule, block)) // block
        sink = min(-(-sparse.sink // block), local)
        earlier = start // block - local + sink  # visited blocks left of the diagonal
        pairs += earlier * block * rows + causal_pairs(rows)
    return pairs


def _modes(sparse: SparseConfig) -> tuple[str, str]:
    return sparse.route0, sparse.route1
