"""`prompt_reach` of whole, padded, packed and continued layouts: that of every sample alone, cut out."""

import pytest
import torch
from torch import Tensor

from elastic.attention.layout import Layout, batch_layout, packed_layout
from elastic.attention.prompt_reach import prompt_reach
from elastic.config import SparseConfig
from elastic.kernels import Pattern, reach

SPARSE = SparseConfig(sink=16, window=32, block=16)
CPU = torch.device("cpu")
SCALE = 0.3


def operands(rows: int, queries: int, keys: int, heads: int = 6, kv_heads: int = 2) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(queries + keys)
    q = torch.randn(rows, heads, queries, 16, generator=gen)
    return q, torch.randn(rows, kv_heads, keys, 16, generator=gen)


def alone(q: Tensor, k: Tensor, row: int, begin: int, end: int, first: int | None = None):
    """Of keys [begin, end) of a row, and the queries from `first` on, cut out."""
    past = k.shape[2] - q.shape[2]
    start = max(begin if first is None else first, past)
    pattern = Pattern(SPARSE.sink, SPARSE.window, SPARSE.granule, SPARSE.block, SCALE)
    own_q, own_k = q[row : row + 1, :, start - past : end - past], k[row : row + 1, :, begin:end]
    return reach(own_q.transpose(1, 2), own_k.transpose(1, 2), pattern)


def check(q: Tensor, k: Tensor, layout: Layout, spans: list[tuple]) -> None:
    """Every sample as it is alone; tokens of no prompt are NaN."""
    used = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool)
    for row, begin, end, *_ in spans:
        used[row, begin:end] = True
    past = k.shape[2] - q.shape[2]
    k.transpose(1, 2)[~used], q.transpose(1, 2)[~used[:, past:]] = torch.nan, torch.nan
    found = prompt_reach(q, k, layout, SPARSE, SCALE)
    for n, span in enumerate(spans):
        wanted = alone(q, k, *span)
        assert (wanted.largest > 0).all()
        torch.testing.assert_close(found.largest[n], wanted.largest[0])
        torch.testing.assert_close(found.recent[n], wanted.recent[0])


def test_whole_rows() -> None:
    check(*operands(2, 90, 90), batch_layout(2, 90, 0, CPU), [(0, 0, 90), (1, 0, 90)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(side: str) -> None:
    mask = torch.ones(2, 100, dtype=torch.long)
    span = (1, 35, 100) if side == "left" else (1, 0, 65)
    mask[1] = 0
    mask[1, span[1] : span[2]] = 1
    check(*operands(2, 100, 100), batch_layout(2, 100, 0, CPU, mask), [(0, 0, 100), span])


def test_packed_rows_whose_prompts_end_before_the_answers() -> None:
    layout = packed_layout(torch.tensor([0, 80, 170, 260]), torch.tensor([70, 169, 250]), 260, CPU)
    check(*operands(1, 260, 260), layout, [(0, 0, 70), (0, 80, 169), (0, 170, 250)])


def test_a_later_turn_looks_back_into_the_cache() -> None:
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[1, :40] = 0
    layout = batch_layout(2, 20, 130, CPU, mask, torch.tensor([150, 143]))
    check(*operands(2, 20, 150), layout, [(0, 0, 150), (1, 40, 143)])


def test_only_queries_from_the_users_text_on_count() -> None:
    users = torch.tensor([[85, 90], [60, 80]])
    layout = batch_layout(2, 90, 0, CPU, user_spans=users)
    check(*operands(2, 90, 90), layout, [(0, 0, 90, 85), (1, 0, 80, 60)])
    q, k = operands(1, 20, 150)
    layout = batch_layout(1, 20, 130, CPU, user_spans=torch.tensor([[5, 150]]))
    check(q, k, layout, [(0, 0, 150, 5)])  # no query before the turn's own is here


def test_a_prompt_without_a_query_here_or_within_the_window_has_no_reach() -> None:
    q, k = operands(2, 20, 150)
    layout = batch_layout(2, 20, 130, CPU, None, torch.tensor([130, 100]))
    found = prompt_reach(q, k, layout, SPARSE, SCALE)
    assert not found.largest.any() and not found.recent.any()
    q, k = operands(1, 48, 48)
    found = prompt_reach(q, k, batch_layout(1, 48, 0, CPU), SPARSE, SCALE)
    assert not found.largest.any() and not found.recent.any()


def test_layers_share_the_ranges_and_take_no_gradient() -> None:
    q, k = operands(1, 90, 90)
    layout = packed_layout(torch.tensor([0, 90]), None, 90, CPU)
    one = prompt_reach(q.requires_grad_(), k, layout, SPARSE, SCALE)
    (kept,) = layout._memo.values()
    prompt_reach(q, k, layout, SPARSE, SCALE)
    assert next(iter(layout._memo.values())) is kept and not one.largest.requires_grad
