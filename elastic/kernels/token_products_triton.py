"""Triton kernels of `elastic.kernels.token_products`, with fp32 sums: of one token a program takes a row of a weight,
of several a tile of rows.

Imported where Triton is at hand only. Legend: T tokens, F rows and K columns of a weight [F, K].
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl

BIAS, ROWS_OF_THEIR_OWN = tl.constexpr(1), tl.constexpr(2)  # what is added: [F], or [T, F]


@triton.jit
def row_sum(x_ptr, w_ptr, row, K: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of x times one row. The loop is unrolled, so that all of the row is on its way before any of it is used."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < K
        x = tl.load(x_ptr + column, mask=inside, other=0).to(tl.float32)
        w = tl.load(w_ptr + row.to(tl.int64) * K + column, mask=inside, other=0, eviction_policy="evict_first")
        total += w.to(tl.float32) * x
    return tl.sum(total, 0)


@triton.jit
def row_product(x_ptr, y_ptr, w_ptr, b_ptr, row, ADD: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """y[row] = x . w[row] + b[row]."""
    found = row_sum(x_ptr, w_ptr, row, K, BLOCK)
    if ADD:
        found += tl.load(b_ptr + row).to(tl.float32)
    tl.store(y_ptr + row, found.to(y_ptr.dtype.element_ty))


@triton.jit
def row_products(
    x_ptr, y0_ptr, y1_ptr, y2_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, end0, end1,
    ADD0: tl.constexpr, ADD1: tl.constexpr, ADD2: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`row_product` of up to three weights, whose rows end at end0, end1 and with the grid."""
    place = tl.program_id(0)
    if place < end0:
        row_product(x_ptr, y0_ptr, w0_ptr, b0_ptr, place, ADD0, K, BLOCK)
    elif place < end1:
        row_product(x_ptr, y1_ptr, w1_ptr, b1_ptr, place - end0, ADD1, K, BLOCK)
    else:
        row_product(x_ptr, y2_ptr, w2_ptr, b2_ptr, place - end1, ADD2, K, BLOCK)


@triton.jit
def activated(gate, GELU: tl.constexpr):
    """SiLU, or GELU with the tanh approximation, of which 0.5 (1 + tanh(t)) is sigmoid(2 t)."""
    if GELU:
        return gate * tl.sigmoid(2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    return gate * tl.sigmoid(gate)


@triton.jit
def row_gated(x_ptr, y_ptr, gate_ptr, up_ptr, GELU: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """y[f] = act(x . gate[f]) (x . up[f])."""
    row = tl.program_id(0)
    found = activated(row_sum(x_ptr, gate_ptr, row, K, BLOCK), GELU) * row_sum(x_ptr, up_ptr, row, K, BLOCK)
    tl.store(y_ptr + row, found.to(y_ptr.dtype.element_ty))


@triton.jit
def tile_product(
    x_ptr, y_ptr, w_ptr, b_ptr, tile, T, F, ADD: tl.constexpr,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[t, f] = x[t] . w[f] + b[f] or b[t, f], for the rows f of a tile; rows after the last read the first ones."""
    token, row = tl.arange(0, TOKENS)[None, :], (tile * ROWS + tl.arange(0, ROWS))[:, None]
    line = (row % F).to(tl.int64) * K
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, K, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        w = tl.load(w_ptr + line + column[None, :])
        x = tl.load(x_ptr + token * K + column[:, None], mask=token < T, other=0)
        total = tl.dot(w, x, total, input_precision="ieee")
    inside = (token < T) & (row < F)
    if ADD == BIAS:
        total += tl.load(b_ptr + row, mask=row < F, other=0).to(tl.float32)
    if ADD == ROWS_OF_THEIR_OWN:
        total += tl.load(b_ptr + token * F + row, mask=inside, other=0).to(tl.float32)
    tl.store(y_ptr + token * F + row, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def tile_products(
    x_ptr, y0_ptr, y1_ptr, y2_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, end0, end1, T, F0, F1, F2,
    ADD0: tl.constexpr, ADD1: tl.constexpr, ADD2: tl.constexpr,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`tile_product` of up to three weights, whose tiles end at end0, end1 and with the grid."""
    place = tl.program_id(0)
    if place < end0:
        tile_product(x_ptr, y0_ptr, w0_ptr, b0_ptr, place, T, F0, ADD0, K, TOKENS, ROWS, BLOCK, STAGES)
    elif place < end1:
        tile_product(x_ptr, y1_ptr, w1_ptr, b1_ptr, place - end0, T, F1, ADD1, K, TOKENS, ROWS, BLOCK, STAGES)
    else:
        tile_product(x_ptr, y2_ptr, w2_ptr, b2_ptr, place - end1, T, F2, ADD2, K, TOKENS, ROWS, BLOCK, STAGES)


@triton.jit
def tile_gated(
    x_ptr, y_ptr, gate_ptr, up_ptr, T, F, GELU: tl.constexpr,
    K: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y[t, f] = act(x[t] . gate[f]) (x[t] . up[f]) for the rows f of a tile."""
    token, row = tl.arange(0, TOKENS)[None, :], (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    line = (row % F).to(tl.int64) * K
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    for start in tl.range(0, K, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + token * K + column[:, None], mask=token < T, other=0)
        gate = tl.dot(tl.load(gate_ptr + line + column[None, :]), x, gate, input_precision="ieee")
        up = tl.dot(tl.load(up_ptr + line + column[None, :]), x, up, input_precision="ieee")
    found = activated(gate, GELU) * up
    tl.store(y_ptr + token * F + row, found.to(y_ptr.dtype.element_ty), mask=(token < T) & (row < F))
