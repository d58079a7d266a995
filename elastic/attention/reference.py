"""The oracle: routed attention under an explicit dense mask, on plain tensors, in fp32 or wider. Slow and obvious on
purpose.

Legend: B batch, S tokens, H query heads, K KV heads, D head dim. Everything faster in this project is judged by this
file.
"""

import torch
from torch import Tensor

from elastic.config import CHOOSING, SparseConfig
from elastic.visibility import visible


def dense_mask(length: int, mode: str, sparse: SparseConfig, queries: int | None = None) -> Tensor:
    """Boolean [queries, length] mask of one sample: True where the query sees the key.

    Args:
        length: tokens of the sample (Lk).
        mode: `full` or `streaming`.
        sparse: sizes of the pattern.
        queries: number of query rows (Lq <= Lk), the sample's last ones; default all.
    """
    position = torch.arange(length)[length - (length if queries is None else queries) :, None]
    key = torch.arange(length)[None, :]
    if mode == "full":
        return key <= position
    if mode == "streaming":
        seen: Tensor = visible(
            position, key, sink=sparse.sink, window=sparse.window, granule=sparse.granule, block=sparse.block
        )
        return seen
    raise ValueError(f"the oracle has no mask for mode {mode!r}; expected full or streaming")


def attention(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention with the scores written out; returns [B, H, Lq, D] in fp32 (fp64 for fp64 input).

    Args:
        mask: boolean, broadcastable to [B, H, Lq, Lk]; a row that sees nothing gives 0.
    """
    dtype = torch.promote_types(q_BHSD.dtype, torch.float32)
    group = q_BHSD.shape[1] // k_BKSD.shape[1]
    k_BHSD = k_BKSD.to(dtype).repeat_interleave(group, dim=1)
    v_BHSD = v_BKSD.to(dtype).repeat_interleave(group, dim=1)
    scores = q_BHSD.to(dtype) @ k_BHSD.transpose(-1, -2) * scale
    weights = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return torch.where(mask.any(-1, keepdim=True), weights, 0.0).nan_to_num(nan=0.0) @ v_BHSD


def routed_attention(
    q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, route_BK: Tensor, sparse: SparseConfig, scale: float,
    chosen_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Every head in its routed mode, mixed by the route's value: O = (1 - r) O_route0 + r O_route1 (paper section 3.2).

    Differentiable in `route_BK`, so autograd through this function is the twin of the straight-through backward.

    Args:
        chosen_mask: boolean [B, H, Lq, Lk], what heads see that choose key blocks: a constant that an oracle chooses
            (`elastic.kernels.xattention_oracle`, `elastic.attention.selection`); needed if a mode chooses.
    """
    queries, length = q_BHSD.shape[2], k_BKSD.shape[2]
    group = q_BHSD.shape[1] // k_BKSD.shape[1]
    outputs = []
    for mode in (sparse.route0, sparse.route1):
        chosen = chosen_mask if mode in CHOOSING else None
        mask = dense_mask(length, mode, sparse, queries).to(q_BHSD.device) if chosen is None else chosen
        outputs.append(attention(q_BHSD, k_BKSD, v_BKSD, mask, scale))
    route_BH11 = route_BK.to(outputs[0].dtype).repeat_interleave(group, dim=1)[:, :, None, None]
    return (1 - route_BH11) * outputs[0] + route_BH11 * outputs[1]
