"""MSR and ESR, the two sparsity ratios (docs/design.md section 2; paper eq. 4 and 5), and the KV cache that the routes
need.

Legend: L layers, N samples, K KV heads.
"""

from functools import lru_cache

import torch
from torch import Tensor

from elastic.config import CHOOSING, SparseConfig
from elastic.visibility import lower_bound


def msr(route_LNK: Tensor) -> Tensor:
    """Model sparsity ratio per sample, [N]: share of (layer, KV head) pairs routed to route 1. Keeps the route's
    gradient.
    """
    return route_LNK.mean(dim=(0, 2))


def esr(
    route_LNK: Tensor,
    lengths_N: Tensor,
    sparse: SparseConfig,
    density_LNK: Tensor | None = None,
    begin_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Effective sparsity ratio per sample: share of causally visible (query, key) pairs that no visited block computes.

    Args:
        route_LNK: routes in {0, 1}.
        lengths_N: tokens of each sample.
        sparse: modes of the two routes and pattern sizes.
        density_LNK: share of the pairs in the blocks that heads chose, as the forward pass counted it; needed with
            a mode that chooses.
        begin_N: first query of each sample that counts, where earlier ones were read under other routes; default 0.

    Returns:
        (`esr_last`, `esr_all`), float64 [N] on the route's device: of the last layer, as the paper reports it, and the
        mean over layers.
    """
    begins = [0] * len(lengths_N) if begin_N is None else begin_N.tolist()
    queries = list(zip(begins, lengths_N.tolist(), strict=True))
    pruned = [_pruned(mode, route_LNK, queries, sparse, density_LNK) for mode in _modes(sparse)]
    per_layer = torch.lerp(pruned[0], pruned[1], route_LNK.detach().double()).mean(2)
    return per_layer[-1], per_layer.mean(0)


def xattention_heads(route_LNK: Tensor, sparse: SparseConfig) -> Tensor:
    """Which heads choose key blocks under a configuration with such a mode, boolean [L, N, K]."""
    return (route_LNK.detach() > 0.5) == (sparse.route1 in CHOOSING)


def density_by_layer(
    route_LNK: Tensor, sparse: SparseConfig, density_LNK: Tensor | None, weight_NK: Tensor | None = None
) -> list[list[float | None]]:
    """What the heads that choose blocks visited in each sample and layer, the mean over them, by `weight_NK` if given,
    [N][L]; None for a layer without such heads, empty lists for a configuration without them.
    """
    if density_LNK is None:
        return [[] for _ in range(route_LNK.shape[1])]
    runs_LNK = xattention_heads(route_LNK, sparse).cpu() * (1.0 if weight_NK is None else weight_NK)
    count_LN = runs_LNK.sum(-1)
    mean_LN = (density_LNK.detach().cpu() * runs_LNK).sum(-1) / count_LN
    pairs = zip(mean_LN.T.tolist(), count_LN.T.tolist(), strict=True)
    return [[mean if count else None for mean, count in zip(*of_sample, strict=True)] for of_sample in pairs]


def _pruned(
    mode: str, route_LNK: Tensor, queries: list[tuple[int, int]], sparse: SparseConfig, density_LNK: Tensor | None
) -> Tensor:
    """Share of the pairs of each sample's queries [begin, end) that heads of this mode leave out, float64 [L, N, K]."""
    if mode in CHOOSING:
        if density_LNK is None:
            raise ValueError(
                f"what the {mode} heads of {sparse.name} visit depends on the input; pass the density that the "
                "forward pass counted (routing(model).density, or that of route_of(cache))"
            )
        return 1 - density_LNK.to(route_LNK.device)
    shares = []
    for begin, end in queries:
        visited = visited_pairs(end, mode, sparse) - visited_pairs(begin, mode, sparse)
        shares.append(1 - visited / max(1, causal_pairs(end) - causal_pairs(begin)))
    return torch.tensor(shares, dtype=torch.float64).to(route_LNK.device)[:, None].expand(route_LNK.shape)


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


def window_pairs(length: int, window: int) -> int:
    """(query, key) pairs of a sliding layer of the backbone's own; a query sees `window` tokens, itself included."""
    return causal_pairs(length) - causal_pairs(max(0, length - window))


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
            f"the visited blocks of mode {mode!r} depend on the input; "
            "elastic.attention.block_selection.density counts them"
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
