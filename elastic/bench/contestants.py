"""Who runs a case: our kernel, and what one would run instead of it.

A contestant turns a case and its inputs into a call that computes the output [1, S, H, D] (in the backward benchmark
dq, dk, dv); building it (block lists, compilation, a forward pass) is not timed. Legend: S tokens, H query heads, K KV
heads, D head dim, M query and N key blocks of 128.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from elastic.bench.cases import BLOCK, PATTERN, Case, Inputs
from elastic.kernels import attention_forward

Call = Callable[[], tuple[Tensor, ...]]
FA4_PACKAGE = "flash-attn-4"


@dataclass(frozen=True)
class Contestant:
    """A competitor: `takes` says which cases it can compute at all, `package` which distribution it needs."""

    about: str
    takes: Callable[[Case], bool]
    build: Callable[[Case, Inputs], Call]
    flex: bool = False
    package: str | None = None

    @property
    def installed(self) -> bool:
        """Whether the distribution it needs is there."""
        if self.package is None:
            return True
        try:
            return bool(importlib.metadata.version(self.package))
        except importlib.metadata.PackageNotFoundError:
            return False


def forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Our operator on a case: output and LSE."""
    q, k, v, mode, bits = inputs
    return attention_forward(q, k, v, mode, PATTERN, bits=bits)


def block_lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts int32 [...] and ascending block numbers int32 [..., N] of a boolean [..., N] mask, unused entries last;
    contiguous, also of a transposed mask.
    """
    order = mask.contiguous().to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return mask.sum(-1, dtype=torch.int32), order.int()


def split_lists(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lists of the blocks that need the causal mask (the diagonal), then of those that are visible throughout."""
    diagonal = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return *block_lists(mask & diagonal), *block_lists(mask & ~diagonal)


def _heads_first(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return inputs.q.transpose(1, 2), inputs.k.transpose(1, 2), inputs.v.transpose(1, 2)


def _dense(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _sdpa(backend: SDPBackend) -> Callable[[Case, Inputs], Call]:
    def build(_case: Case, inputs: Inputs) -> Call:
        q, k, v = _heads_first(inputs)
        return lambda: (_dense(q, k, v, backend).transpose(1, 2),)

    return build


def causal(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """FlexAttention's element mask; it is read in the diagonal blocks alone, so it is the same for every case."""
    return key <= query


def flex_mask(blocks: Tensor) -> BlockMask:
    """FlexAttention's block mask of a boolean [1, H or 1, M, N], from the same lists that the others read."""
    return BlockMask.from_kv_blocks(*split_lists(blocks), BLOCK_SIZE=BLOCK, mask_mod=causal)


def compiled_flex() -> Callable[..., Tensor]:
    """FlexAttention compiled for one shape; earlier shapes are forgotten, or torch would reach its recompile limit."""
    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False)


def _flex(case: Case, inputs: Inputs) -> Call:
    q, k, v = _heads_first(inputs)
    mask, flex = flex_mask(case.block_mask().to(q.device)), compiled_flex()
    return lambda: (flex(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2),)


def _serial(case: Case, inputs: Inputs) -> Call:
    """Gather the streaming heads, FlexAttention; gather the full heads, cuDNN; scatter both into place."""
    q, k, v = _heads_first(inputs)
    local = replace(case, streaming=case.kv_heads).block_mask()
    mask, flex = flex_mask(local.to(q.device)), compiled_flex()
    heads, kv_heads = (torch.arange(n, device=q.device) for n in (case.heads, case.kv_heads))
    cut = case.streaming * case.heads // case.kv_heads
    few, rest, few_kv, rest_kv = heads[:cut], heads[cut:], kv_heads[: case.streaming], kv_heads[case.streaming :]

    def call() -> tuple[Tensor, ...]:
        out = torch.empty_like(q)
        out[:, few] = flex(q[:, few], k[:, few_kv], v[:, few_kv], block_mask=mask, enable_gqa=True)
        out[:, rest] = _dense(q[:, rest], k[:, rest_kv], v[:, rest_kv], SDPBackend.CUDNN_ATTENTION)
        return (out.transpose(1, 2),)

    return call


def flash_attn_4(case: Case, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """flash-attn-4 on [1, S, heads, D] operands: its causal kernel on dense cases, its block-sparse one on the others
    (causal, lists of 128 x 128 blocks; of query blocks for each key block in the backward pass).
    """
    from flash_attn.cute import flash_attn_func

    sparse = {}
    if case.msr != 0:
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

        mask = case.block_mask().to(device)
        for name, seen in (("block_sparse_tensors", mask), ("block_sparse_tensors_bwd", mask.transpose(-1, -2))):
            sparse[name] = BlockSparseTensorsTorch(*split_lists(seen), block_size=(BLOCK, BLOCK))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flash_attn_func(q, k, v, causal=True, **sparse)
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out

    return attend


def _fa4(case: Case, inputs: Inputs) -> Call:
    attend = flash_attn_4(case, inputs.q.device)
    return lambda: (attend(*inputs[:3]),)


def _is_dense(case: Case) -> bool:
    return case.msr == 0


def _is_mixed(case: Case) -> bool:
    return 0 < case.streaming < case.kv_heads


def _any(_case: Case) -> bool:
    return True


COMPETITORS = {
    "cudnn": Contestant("PyTorch SDPA, cuDNN (dense)", _is_dense, _sdpa(SDPBackend.CUDNN_ATTENTION)),
    "flash2": Contestant("PyTorch SDPA, FlashAttention-2 (dense)", _is_dense, _sdpa(SDPBackend.FLASH_ATTENTION)),
    "flex": Contestant("compiled FlexAttention under the same block mask", _any, _flex, flex=True),
    "serial": Contestant("gather, FlexAttention and cuDNN, scatter", _is_mixed, _serial, flex=True),
    "fa4": Contestant(f"{FA4_PACKAGE}, block sparse where the case is", _any, _fa4, package=FA4_PACKAGE),
}
