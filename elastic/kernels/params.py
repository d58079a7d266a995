"""What one launch reads: `Pattern`, `Ranges`, and the structure that `cuda_src/include/elastic/params.cuh` declares.

The numbers here are the only ones in Python; `tests/kernels/test_constants.py` compares them with those of `cuda_src`.
Legend: B batch rows, N samples, S tokens.
"""

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

FULL, STREAMING, BLOCK_SPARSE = 0, 1, 2  # modes of a head
QUERY_BLOCK, KEY_BLOCK, HALF_BLOCK = 128, 128, 64  # tokens: of a query tile, of a key tile, of half a key tile
PARAMS_BYTES, BACKWARD_BYTES, SELECTION_BYTES, REACH_BYTES, PAGED_BYTES = 768, 960, 832, 832, 832
BACKWARD_TILE = 8192  # query rows of a backward tile times head dim
ROW_TILE, KEY_CELLS = 128, 256  # of the block selection: rows of a tile, cells of a key tile, of `stride` tokens each
REACH_QUERIES, REACH_RECENT, REACH_TILE = 32, 8, 128  # last queries looked at, and of these the last; keys of a tile
MAP_BYTES, WARP_ROWS = 128, 16  # of a tensor map; query rows that a warp stores at once
_POINTERS, _SIZES = struct.Struct("<13Q"), struct.Struct("<12q12i2f")
_ADDRESSES, _STRIDES = struct.Struct("<7Q"), struct.Struct("<12qi36x")
_SELECTION, _ANSWERS = struct.Struct("<dQ4i32x"), struct.Struct("<2Q48x")
_PAGES = struct.Struct("<Q2i")


class Pattern(NamedTuple):
    """Sizes of the sparse modes, and the softmax scale, of one launch. Which query sees which key is defined in
    `elastic.visibility`; full heads read the scale alone.

    Attributes:
        sink: tokens at the start of a sample that streaming heads always see, at least 0.
        window: tokens up to and including the query's own that streaming heads see, at least 1.
        granule: `token`; or `block`: the window moves by whole blocks, and sink and window are multiples of `block`.
        block: tokens of a block, for the granule and for the bits of block-sparse heads (there 64 or 128).
        scale: softmax scale, positive; None: D ** -0.5.
    """

    sink: int
    window: int
    granule: str = "token"
    block: int = 128
    scale: float | None = None

    @classmethod
    def without_streaming(cls, block: int = 128, scale: float | None = None) -> "Pattern":
        """For launches whose heads are full or block-sparse, which read no sink and no window."""
        return cls(0, 1, "token", block, scale)

    def scale_for(self, head_dim: int) -> float:
        """The softmax scale of heads of D = `head_dim`."""
        return head_dim**-0.5 if self.scale is None else self.scale


class Ranges(NamedTuple):
    """Where the samples of one launch lie: int32 [N] each, contiguous, on the operands' device, read there and not by
    the host. Packing and padding are both expressed this way.

    Sample n is queries [begin_q, end_q) and keys [begin_k, end_k) of batch row row[n]. Its queries are its last
    positions (bottom-right causal), so it has at least as many keys. Samples must not share query rows, in a backward
    pass nor keys.

    Attributes:
        begin_q, end_q, begin_k, end_k: tokens of the row; None: 0, Sq, 0, Sk.
        row: batch rows; None: n, with N = B.
    """

    begin_q: Tensor | None = None
    end_q: Tensor | None = None
    begin_k: Tensor | None = None
    end_k: Tensor | None = None
    row: Tensor | None = None

    def named(self) -> dict[str, Tensor | None]:
        """The five arrays by name, in the order of the kernel's parameters."""
        return self._asdict()

    @property
    def partial(self) -> bool:
        """Whether some query row may belong to no sample."""
        return not (self.begin_q is None and self.end_q is None and self.row is None)

    def on_host(self, samples: int, seq_q: int, seq_k: int) -> list[tuple[int, int, int, int, int]]:
        """(row, begin_q, end_q, begin_k, end_k) of every sample; waits for a GPU."""

        def given(values: Tensor | None, default: int) -> list[int]:
            return [default] * samples if values is None else values.tolist()

        rows = list(range(samples)) if self.row is None else self.row.tolist()
        spans = (given(self.begin_q, 0), given(self.end_q, seq_q), given(self.begin_k, 0), given(self.end_k, seq_k))
        return list(zip(rows, *spans, strict=True))


WHOLE_ROWS = Ranges()  # every batch row is one sample


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    """Element strides (row, token, head) of [B, S, heads, D]; a dimension of size 1 has no stride of its own and gets
    one that every alignment rule accepts.
    """
    dim = tensor.shape[3]
    row, token, head = (s if n > 1 else dim for n, s in zip(tensor.shape[:3], tensor.stride()[:3], strict=True))
    return row, token, head


def pack_pointers(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mode: Tensor, bits: Tensor | None, ranges: Ranges,
    counter: Tensor,
) -> bytes:  # fmt: skip
    """The addresses of `elastic::Params`, in its order."""
    operands = (q, k, v, out, lse, mode, bits, *ranges, counter)
    return _POINTERS.pack(*[0 if x is None else x.data_ptr() for x in operands])  # no call per operand: the hot path


def pack_sizes(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, mode: Tensor, bits: Tensor | None, pattern: Pattern,
    seq_k: int | None = None,
) -> bytes:  # fmt: skip
    """The rest of `elastic::Params`: strides, sizes and the pattern, the same for every call with these shapes. `seq_k`
    are the keys that a sample can have, where k does not show them.
    """
    scale = pattern.scale_for(q.shape[3])
    return _SIZES.pack(
        *strides_of(q),
        *strides_of(k),
        *strides_of(v),
        *strides_of(out),
        mode.shape[0],
        q.shape[2],
        k.shape[2],
        q.shape[1],
        k.shape[1] if seq_k is None else seq_k,
        pattern.sink,
        min(pattern.window, 1 << 30),
        int(pattern.granule == "block"),
        pattern.block,
        0 if bits is None else bits.shape[2],
        0 if bits is None else bits.shape[3],
        q.shape[0],
        scale * math.log2(math.e),
        scale,
    )


def pack_addresses(*addresses: int) -> bytes:
    """What `elastic::BackwardParams` adds to `Params`, first part: addresses of grad_out, rows, dq_sum, turns, dq, dk,
    dv.
    """
    return _ADDRESSES.pack(*addresses)


def pack_strides(strided: tuple[Tensor, ...], row_tiles: int) -> bytes:
    """The second part, the same for every call with these shapes: strides of out, dq, dk, dv."""
    return _STRIDES.pack(*(stride for tensor in strided for stride in strides_of(tensor)), row_tiles)


def pack_selection(
    threshold: float, mass: Tensor | None, tail_q: int, tail_k: int, columns: int, shared_units: int
) -> bytes:
    """What `elastic::SelectParams` adds to `Params`."""
    return _SELECTION.pack(threshold, _address(mass), tail_q, tail_k, columns, shared_units)


def pack_answers(largest: Tensor, recent: Tensor) -> bytes:
    """What `elastic::ReachParams` adds to `Params`."""
    return _ANSWERS.pack(largest.data_ptr(), recent.data_ptr())


def pack_pages(table: Tensor, size: int) -> bytes:
    """`elastic::Pages` of a block table [B, P] and pages of `size` tokens."""
    return _PAGES.pack(table.data_ptr(), table.stride(0), size.bit_length() - 1)


def is_half(dtype: torch.dtype) -> bool:
    """Whether the kernels take this element type."""
    return dtype in (torch.bfloat16, torch.float16)
