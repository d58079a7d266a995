"""CUDA attention kernels and their Python edge: tensors in, tensors out, no routers. CuPy is loaded by `jit` alone, on
first use.
"""

from elastic.kernels.attention_backward import attention_backward
from elastic.kernels.attention_decode import attention_decode
from elastic.kernels.attention_forward import attention_forward
from elastic.kernels.attention_sinks import sinks_gradient
from elastic.kernels.block_bits import bits_from_indices, bits_from_mask
from elastic.kernels.devices import (
    kernel_path,
    unsupported_backward,
    unsupported_reach,
    unsupported_reason,
    unsupported_selection,
)
from elastic.kernels.paged_decode import paged_decode
from elastic.kernels.paged_forward import paged_forward
from elastic.kernels.params import Pattern, Ranges
from elastic.kernels.reach import Reach, reach
from elastic.kernels.route_gap import period_of, route_gap, slot_table
from elastic.kernels.xattention_select import select_blocks

__all__ = [
    "Pattern",
    "Ranges",
    "Reach",
    "attention_backward",
    "attention_decode",
    "attention_forward",
    "bits_from_indices",
    "bits_from_mask",
    "kernel_path",
    "paged_decode",
    "paged_forward",
    "period_of",
    "reach",
    "route_gap",
    "select_blocks",
    "sinks_gradient",
    "slot_table",
    "unsupported_backward",
    "unsupported_reach",
    "unsupported_reason",
    "unsupported_selection",
]
