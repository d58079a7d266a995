"""Triton kernels of `elastic.kernels.block_choice` that score keys: FlashPrefill's pairs of blocks, and FlexPrefill's
vertical and slash lines. Scores are fp32 and never leave the multiprocessor; exponentials are powers of two.

Imported where Triton is at hand only. Legend: H query heads, L queries, S keys, D head dim, M query and N key blocks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

LN2, LOG2E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(x_ptr, head, head_stride, row, row_stride, end, D: tl.constexpr):
    """Rows of a head, [rows, D]; 0 from row `end` on."""
    at = x_ptr + head.to(tl.int64) * head_stride + row.to(tl.int64)[:, None] * row_stride
    return tl.load(at + tl.arange(0, D)[None, :], mask=row[:, None] < end, other=0)


@triton.jit(do_not_specialize=["past", "scored"])
def block_scores(
    q_ptr, k_ptr, log_ptr, past, scored, columns, group, q_head, q_row, log2_scale,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """log[h, m, n] = log of the sum of exp(scale q . k[n]) over the queries of block m that see the whole of key block
    n, whose mean key is k[n]; -inf where none does, and for query blocks from `scored` on.
    """
    head, block = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)  # those with most to do begin
    log_ptr += (head.to(tl.int64) * tl.num_programs(1) + block) * columns
    width = tl.where(
        block < scored, (past + (block + 1) * ROWS) // BLOCK, 0
    )  # key blocks that the last query sees whole
    row = block * ROWS + tl.arange(0, ROWS)
    q = rows_of(q_ptr, head, q_head, row, q_row, scored * ROWS, D)
    for start in tl.range(0, width, TILE):
        column = start + tl.arange(0, TILE)
        k = rows_of(k_ptr, head // group, columns * D, column, D, columns, D)
        score = tl.dot(k, tl.trans(q), input_precision="ieee") * log2_scale  # [TILE, ROWS]
        score = tl.where((column[:, None] + 1) * BLOCK <= past + row[None, :] + 1, score, float("-inf"))
        top = tl.max(score, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(score - top[:, None]), 1)
        tl.store(log_ptr + column, (top + tl.log2(total)) * LN2, mask=column < columns)
    for start in tl.range(tl.cdiv(width, TILE) * TILE, columns, TILE):
        column = start + tl.arange(0, TILE)
        tl.store(log_ptr + column, tl.full((TILE,), float("-inf"), tl.float32), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "run"])
def partial_lse(
    q_ptr, k_ptr, lse_ptr, rows, keys, run, group, q_head, q_row, k_head, k_row, log2_scale,
    ROWS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """lse[h, run, row] = log of the sum of exp(scale q . k) over the keys of a run that the row sees; the rows are the
    last queries, the first of them at position keys - rows.
    """
    head, part, row = tl.program_id(0), tl.program_id(1), tl.arange(0, ROWS)
    q = rows_of(q_ptr, head, q_head, row, q_row, rows, D)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in tl.range(part * run, tl.minimum((part + 1) * run, keys), TILE):
        key = start + tl.arange(0, TILE)
        k = rows_of(k_ptr, head // group, k_head, key, k_row, keys, D)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale  # [ROWS, TILE]
        score = tl.where(key[None, :] <= keys - rows + row[:, None], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(score - base[:, None]), 1)
        top = higher
    place = (head * tl.num_programs(1) + part) * ROWS + row
    tl.store(lse_ptr + place, (top + tl.log2(total)) * LN2)


@triton.jit(do_not_specialize=["rows"])
def line_shares(
    q_ptr, k_ptr, lse_ptr, lines_ptr, rows, keys, group, q_head, q_row, k_head, k_row, log2_scale,
    ROWS: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Mean attention of the last queries to a tile of keys, by key and by distance: lines [3, H, S]. A distance is the
    sum of the last two, because its diagonal may pass through two tiles. Needs ROWS <= TILE.
    """
    head, start, entry = tl.program_id(0), tl.program_id(1) * TILE, tl.arange(0, TILE)
    k = rows_of(k_ptr, head // group, k_head, start + entry, k_row, keys, D)
    by_key, here, wrapped = tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32), tl.zeros((TILE,), tl.float32)
    for begin in tl.range(0, ROWS, STEP, num_stages=1):
        row = begin + tl.arange(0, STEP)
        q = rows_of(q_ptr, head, q_head, row, q_row, rows, D)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * log2_scale  # [STEP, TILE]
        lse = tl.load(lse_ptr + head * ROWS + row, mask=row < rows, other=float("inf")) * LOG2E
        seen = start + entry[None, :] <= keys - rows + row[:, None]
        share = tl.where(seen, tl.exp2(score - lse[:, None]), 0.0)
        by_key += tl.sum(share, 0)
        # Turn row r by r entries. Then all rows have in entry e what lies at one distance, that of key e + r, or where
        # they wrapped TILE farther away.
        turned = entry[None, :] + row[:, None]
        share = tl.gather(share, turned & (TILE - 1), 1)
        here += tl.sum(tl.where(turned < TILE, share, 0.0), 0)
        wrapped += tl.sum(tl.where(turned < TILE, 0.0, share), 0)
    lines_ptr += head.to(tl.int64) * keys
    all_heads, distance = tl.num_programs(0).to(tl.int64) * keys, keys - rows - start - entry
    tl.store(lines_ptr + start + entry, by_key / rows, mask=start + entry < keys)
    tl.store(lines_ptr + all_heads + distance, here / rows, mask=distance >= 0)
    farther = distance + TILE
    tl.store(lines_ptr + 2 * all_heads + farther, wrapped / rows, mask=(farther >= 0) & (farther < keys))
