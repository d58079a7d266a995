"""XAttention's choice of key blocks, spelled out: the readable twin of the selection kernel (arXiv 2503.16428).

A sample's queries are cut into rows and its keys into cells of `stride` tokens, both from the sample's first token on;
a ragged tail is filled with zeros. Row i scores cell j by the antidiagonals of their stride x stride square,
    score(i, j) = scale / stride * sum over r < stride of q[i stride + stride - 1 - r] . k[j stride + r],
and the softmax over the cells that begin at or before the row's last query (with Lq = Lk: j <= i, the diagonal cell
counts whole) estimates where the row's attention goes. Its sum over a query block's rows and a key block's cells is
the mass of that pair. A query block visits key block 0, the key blocks that hold its own positions, and then the
heaviest others until they hold `threshold` of its mass: the fewest that do, of equal ones the first. Nothing depends
on how the work is cut. Legend: H query heads, K KV heads, G = H / K, L tokens, D head dim, M query and N key blocks.
"""

import torch
from torch import Tensor

from elastic.kernels.block_bits import bits_from_mask, query_block
from elastic.kernels.params import BLOCK_SPARSE, WHOLE_ROWS, Pattern, Ranges

UNITS = 1 << 24  # masses are compared as whole numbers of 2^-24, so that sums have no order
_CHUNK_SCORES = 1 << 24  # scores that exist at a time


def block_mass(q_HLD: Tensor, k_KLD: Tensor, stride: int, block: int, scale: float) -> Tensor:
    """Estimated attention mass [H, M, N] of one sample in fp32 (fp64 for fp64 input); each row of queries adds 1."""
    wide = torch.promote_types(q_HLD.dtype, torch.float32)
    heads, queries, _ = q_HLD.shape
    kv_heads, keys, _ = k_KLD.shape
    # A row is turned round, so that a plain product of rows and cells runs along the antidiagonals.
    rows_HRE = _cut(q_HLD.to(wide), stride).flip(2).flatten(2)
    cells_KCE = _cut(k_KLD.to(wide), stride).flatten(2)
    rows, cells = rows_HRE.shape[1], cells_KCE.shape[1]
    last_R = torch.arange(rows, device=q_HLD.device) + -(-(keys - queries) // stride)  # last cell that a row sees
    hidden_RC = torch.arange(cells, device=q_HLD.device) > last_R[:, None]
    per_query_block, per_key_block = query_block(block) // stride, block // stride
    chunk = per_query_block * max(1, _CHUNK_SCORES // max(1, heads * cells * per_query_block))
    parts = []
    for first in range(0, rows, chunk):
        here = slice(first, first + chunk)
        rows_KGE = torch.unflatten(rows_HRE[:, here], 0, (kv_heads, -1)).flatten(1, 2)
        scores = (rows_KGE @ cells_KCE.transpose(1, 2) * (scale / stride)).view(heads, -1, cells)
        share = torch.softmax(scores.masked_fill(hidden_RC[here], float("-inf")), dim=-1)
        parts.append(_sum_runs(_sum_runs(share, 2, per_key_block), 1, per_query_block))
    return torch.cat(parts, dim=1)


def choose(mass_HMN: Tensor, own_MN: Tensor, seen_MN: Tensor, threshold: float, lagging_rows: int = 0) -> Tensor:
    """Boolean [H, M, N]: the key blocks that each query block visits.

    With u = floor(2^24 mass) and total = sum of u over the seen blocks, blocks are taken until the sum of their u is at
    least ceil(threshold * total), the product in fp64.

    Args:
        own_MN: key blocks that hold the query block's own positions.
        seen_MN: key blocks that begin at or before its last query.
        lagging_rows: so many first query blocks follow the published code's rule for its first chunk of queries: block
            0 is chosen beside the others but not counted in advance, and the sum counts a block one step late, so that
            about one block too many is taken.
    """
    forced_MN = own_MN.clone()
    forced_MN[lagging_rows:, :1] |= seen_MN[lagging_rows:, :1]
    units = (mass_HMN.double().nan_to_num(nan=0.0) * UNITS).floor().long().masked_fill(~seen_MN, 0)
    need = torch.ceil(threshold * units.sum(-1).double()).long() - (units * forced_MN).sum(-1)
    others = units.masked_fill(forced_MN | ~seen_MN, -1)
    order = others.argsort(dim=-1, descending=True, stable=True)
    ranked = others.gather(-1, order)
    before = ranked.clamp(min=0).cumsum(-1) - ranked.clamp(min=0)
    lagging = before[:, :lagging_rows]
    before[:, :lagging_rows] = torch.cat([torch.full_like(lagging[..., :1], -UNITS * 256), lagging[..., :-1]], dim=-1)
    taken = (before < need[..., None]) & (ranked >= 0)
    chosen = torch.zeros_like(taken).scatter(-1, order, taken) | forced_MN
    chosen[:, :lagging_rows, :1] = True
    return chosen & seen_MN


def block_relations(queries: int, keys: int, block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(own, seen), boolean [M, N] each, see `choose`. The queries are the sample's last positions."""
    size, past = query_block(block), keys - queries
    begin_M = torch.arange(0, queries, size, device=device)[:, None]
    last_M = (begin_M + size).clamp(max=queries) - 1 + past
    begin_N = torch.arange(0, keys, block, device=device)
    seen_MN = begin_N <= last_M
    return seen_MN & (begin_N + block > begin_M + past), seen_MN


def select_oracle(
    q: Tensor, k: Tensor, mode: Tensor, pattern: Pattern, ranges: Ranges = WHOLE_ROWS, *, stride: int, threshold: float,
    published_chunk: int = 0,
) -> Tensor:  # fmt: skip
    """Bits of all block-sparse heads, 0 for the others; the arguments are those of `select_blocks`.

    Args:
        published_chunk: tokens of the published code's first chunk, whose rows it treats differently (see `choose`);
            0 is our rule everywhere. Samples with cached keys have no such rows.
    """
    block, scale = pattern.block, pattern.scale_for(q.shape[3])
    samples, kv_heads = mode.shape
    group, size = q.shape[2] // kv_heads, query_block(block)
    shape = (samples, q.shape[2], -(-q.shape[1] // size), -(-k.shape[1] // (32 * block)))
    bits = torch.zeros(shape, dtype=torch.int32, device=q.device)
    for n, (row, begin_q, end_q, begin_k, end_k) in enumerate(ranges.on_host(samples, q.shape[1], k.shape[1])):
        kv_chosen = (mode[n] == BLOCK_SPARSE).nonzero()[:, 0]
        if kv_chosen.numel() == 0 or begin_q >= end_q:
            continue
        heads = (kv_chosen[:, None] * group + torch.arange(group, device=q.device)).flatten()
        q_HLD = q[row, begin_q:end_q][:, heads].transpose(0, 1)
        k_KLD = k[row, begin_k:end_k][:, kv_chosen].transpose(0, 1)
        own, seen = block_relations(end_q - begin_q, end_k - begin_k, block, q.device)
        lagging = published_chunk // size if q_HLD.shape[1] == k_KLD.shape[1] else 0
        chosen = choose(block_mass(q_HLD, k_KLD, stride, block, scale), own, seen, threshold, lagging)
        of_sample = bits_from_mask(chosen)
        bits[n, heads, : of_sample.shape[1], : of_sample.shape[2]] = of_sample
    return bits


def _cut(x_HLD: Tensor, stride: int) -> Tensor:
    """[heads, L, D] -> [heads, ceil(L / stride), stride, D], the tail filled with zeros."""
    padded = torch.nn.functional.pad(x_HLD, (0, 0, 0, -x_HLD.shape[1] % stride))
    return torch.unflatten(padded, 1, (-1, stride))


def _sum_runs(x: Tensor, dim: int, size: int) -> Tensor:
    """Sums over runs of `size` entries along `dim`; the last run may be shorter."""
    missing = [0, 0] * (x.dim() - 1 - dim) + [0, -x.shape[dim] % size]
    return torch.unflatten(torch.nn.functional.pad(x, missing), dim, (-1, size)).sum(dim + 1)
