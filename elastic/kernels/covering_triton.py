"""The Triton kernel of `elastic.kernels.block_choice` that finds the fewest entries of a row which hold a given sum.

Imported where Triton is at hand only.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
import triton
import triton.language as tl


@triton.jit
def entries_from(row_ptr, start, entries, BLOCK: tl.constexpr):
    """A block of the row; -1, which no cut lets in, from its end on."""
    place = start + tl.arange(0, BLOCK)
    return tl.load(row_ptr + place, mask=place < entries, other=-1.0)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def sums_from(row_ptr, entries, one, two, three, BLOCK: tl.constexpr, RUN: tl.constexpr):
    """Sums of the entries that are at least one cut, and two others: fp32 over `RUN` blocks, fp64 over these."""
    sum1, sum2, sum3 = tl.full((), 0, tl.float64), tl.full((), 0, tl.float64), tl.full((), 0, tl.float64)
    for begin in range(0, entries, RUN * BLOCK):
        part1, part2, part3 = (tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32),
                               tl.zeros((BLOCK,), tl.float32))  # fmt: skip
        for start in range(begin, min(begin + RUN * BLOCK, entries), BLOCK):
            mass = entries_from(row_ptr, start, entries, BLOCK)
            part1 += tl.where(mass >= one, mass, 0.0)
            part2 += tl.where(mass >= two, mass, 0.0)
            part3 += tl.where(mass >= three, mass, 0.0)
        sum1 += tl.sum(part1.to(tl.float64), 0)
        sum2 += tl.sum(part2.to(tl.float64), 0)
        sum3 += tl.sum(part3.to(tl.float64), 0)
    return sum1, sum2, sum3


@triton.jit
def covering(
    mass_ptr, need_ptr, cut_ptr, held_ptr, equal_ptr, entries, BLOCK: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """A row's cut, the largest entry such that those of at least the cut hold `need`; the sum of those above it; the
    number of those that equal it. The search is for the cut's bit pattern: a pass over the row leaves a quarter of the
    range.
    """
    row = tl.program_id(0)
    row_ptr = mass_ptr + row.to(tl.int64) * entries
    need = tl.load(need_ptr + row).to(tl.float64)
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, entries, BLOCK):
        most = tl.maximum(most, entries_from(row_ptr, start, entries, BLOCK))
    low, high = tl.full((), 0, tl.int32), tl.max(most, 0).to(tl.int32, bitcast=True) + 1
    while high - low > 1:
        step = (high - low + 3) // 4
        one, two, three = low + step, low + 2 * step, low + 3 * step
        sum1, sum2, sum3 = sums_from(row_ptr, entries, float_of(one), float_of(two), float_of(three), BLOCK, RUN)
        enough1 = (sum1 >= need) & (one < high)
        enough2 = enough1 & (sum2 >= need) & (two < high)
        enough3 = enough2 & (sum3 >= need) & (three < high)
        high = tl.where(enough3, high, tl.minimum(high, tl.where(enough2, three, tl.where(enough1, two, one))))
        low = tl.where(enough3, three, tl.where(enough2, two, tl.where(enough1, one, low)))
    held, _, _ = sums_from(row_ptr, entries, float_of(low + 1), float_of(low + 1), float_of(low + 1), BLOCK, RUN)
    equal = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, entries, BLOCK):
        equal += (entries_from(row_ptr, start, entries, BLOCK) == float_of(low)).to(tl.int32)
    tl.store(cut_ptr + row, float_of(low))
    tl.store(held_ptr + row, held)
    tl.store(equal_ptr + row, tl.sum(equal, 0))
