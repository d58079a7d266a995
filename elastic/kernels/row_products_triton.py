"""Triton kernels of `elastic.kernels.row_products`: one program for each row of a weight, fp32 sums.

Imported where Triton is at hand only. Legend: F rows and K columns of a weight [F, K].
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl


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
def products(
    x_ptr, y_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, end0, end1,
    ADD0: tl.constexpr, ADD1: tl.constexpr, ADD2: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[f] = x . w[f] + b[f] over up to three weights, whose rows end at end0, end1 and with the grid."""
    place = tl.program_id(0)
    if place < end0:
        found = row_sum(x_ptr, w0_ptr, place, K, BLOCK)
        if ADD0:
            found += tl.load(b0_ptr + place).to(tl.float32)
    elif place < end1:
        found = row_sum(x_ptr, w1_ptr, place - end0, K, BLOCK)
        if ADD1:
            found += tl.load(b1_ptr + place - end0).to(tl.float32)
    else:
        found = row_sum(x_ptr, w2_ptr, place - end1, K, BLOCK)
        if ADD2:
            found += tl.load(b2_ptr + place - end1).to(tl.float32)
    tl.store(y_ptr + place, found.to(y_ptr.dtype.element_ty))


@triton.jit
def gated(x_ptr, y_ptr, gate_ptr, up_ptr, GELU: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """y[f] = act(x . gate[f]) (x . up[f])."""
    row = tl.program_id(0)
    gate = row_sum(x_ptr, gate_ptr, row, K, BLOCK)
    up = row_sum(x_ptr, up_ptr, row, K, BLOCK)
    if GELU:  # 0.5 (1 + tanh(t)) is sigmoid(2 t)
        active = gate * tl.sigmoid(2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))
    else:
        active = gate * tl.sigmoid(gate)
    tl.store(y_ptr + row, (active * up).to(y_ptr.dtype.element_ty))
