"""What one would run instead of the fused kernel: FlexAttention with the same block mask, and the serial dispatch
(gather the full heads, cuDNN; gather the streaming heads, FlexAttention; scatter both into place).
"""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from tests.kernels.generators import Problem

BLOCK, SINK_BLOCKS, WINDOW_BLOCKS = 128, 1, 16


def sparse(problem: Problem, streaming: int, bits: torch.Tensor | None) -> dict[str, Callable[[], torch.Tensor]]:
    """Contestants of a hybrid case, with outputs [1, H, S, D]; a random block mask gets none."""
    if bits is not None:
        return {}
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    flex = torch.compile(flex_attention, dynamic=False)

    def local(i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (j <= i) & ((j // BLOCK < SINK_BLOCKS) | (j // BLOCK > i // BLOCK - WINDOW_BLOCKS))

    def hybrid(b, h, i, j):
        return torch.where(h < streaming * group, local(i, j), j <= i)

    def streaming_only(b, h, i, j):
        return local(i, j)

    mask = create_block_mask(hybrid, 1, q.shape[1], length, length, device="cuda", _compile=True)
    found = {"flex": lambda: flex(q, k, v, block_mask=mask, enable_gqa=True)}
    if 0 < streaming < k.shape[1]:
        shared = create_block_mask(streaming_only, 1, 1, length, length, device="cuda", _compile=True)
        heads = torch.arange(q.shape[1], device="cuda")
        kv_heads = torch.arange(k.shape[1], device="cuda")
        parts = [(heads[: streaming * group], kv_heads[:streaming]), (heads[streaming * group :], kv_heads[streaming:])]

        def serial() -> torch.Tensor:
            out = torch.empty_like(q)
            (few, few_kv), (all_, all_kv) = parts
            out[:, few] = flex(q[:, few], k[:, few_kv], v[:, few_kv], block_mask=shared, enable_gqa=True)
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                full = scaled_dot_product_attention(
                    q[:, all_], k[:, all_kv], v[:, all_kv], is_causal=True, enable_gqa=True
                )
            out[:, all_] = full
            return out

        found["serial"] = serial
    return found
