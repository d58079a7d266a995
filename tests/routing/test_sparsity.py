"""MSR, ESR and KV bytes against brute force."""

import pytest
import torch

from elastic.attention.reference import dense_mask
from elastic.config import SparseConfig
from elastic.routing.sparsity import causal_pairs, esr, kv_bytes_kept, msr, visited_pairs


def brute_force(length: int, sparse: SparseConfig) -> int:
    """Causal pairs in every block that holds a visible pair."""
    mask = dense_mask(length, "streaming", sparse)
    causal = dense_mask(length, "full", sparse)
    pairs = 0
    for m in range(0, length, sparse.block):
        for n in range(0, length, sparse.block):
            rows, columns = slice(m, m + sparse.block), slice(n, n + sparse.block)
            if mask[rows, columns].any():
                pairs += int(causal[rows, columns].sum())
    return pairs


@pytest.mark.parametrize("granule", ["token", "block"])
@pytest.mark.parametrize(("sink", "window"), [(0, 4), (4, 16), (8, 8), (12, 40), (64, 8)])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 31, 64, 101])
def test_visited_pairs_count_blocks(granule, sink, window, length):
    sparse = SparseConfig(sink=sink, window=window, block=4, granule=granule)
    assert visited_pairs(length, "streaming", sparse) == brute_force(length, sparse)
    assert visited_pairs(length, "full", sparse) == causal_pairs(length) == length * (length + 1) // 2


def test_ratios_of_a_mixed_route():
    sparse = SparseConfig(sink=4, window=16, block=4)
    route = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]], [[0.0, 0.0]]])  # [L=3, N=1, K=2]
    length = torch.tensor([200])
    pruned = 1 - visited_pairs(200, "streaming", sparse) / causal_pairs(200)
    last, overall = esr(route, length, sparse)
    assert msr(route).tolist() == [0.5]
    assert last.tolist() == [0.0]
    assert overall.tolist() == pytest.approx([pruned / 2])
    assert kv_bytes_kept(route, length, sparse, head_dim=64, element_size=2).tolist() == [
        (3 * 200 + 3 * 20) * 2 * 64 * 2
    ]


def test_msr_carries_the_routes_gradient():
    route = torch.zeros(3, 2, 4, requires_grad=True)
    msr(route).sum().backward()
    torch.testing.assert_close(route.grad, torch.full_like(route, 1 / 12))


def test_input_dependent_modes_have_no_closed_form():
    with pytest.raises(ValueError, match="depend on the input"):
        visited_pairs(100, "xattention", SparseConfig())
