"""Losses on answer tokens, a chunk of logits at a time, so that no [S, V] tensor ever exists (docs/design.md section
5).

Only positions that predict a labelled token reach the output head, and the logits of a chunk are computed again in the
backward pass. Labels are aligned with the inputs and shifted here. Under context parallelism hidden states are those of
this process's slice, labels and what comes out are of the whole row, equal on all processes.
Legend: N samples, S tokens, P labelled positions (p of this slice), E hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from elastic.attention.row_slice import RowSlice
from elastic.data.packing import IGNORE

WHOLE = RowSlice()


def chunked_cross_entropy(
    hidden_1SE: Tensor,
    lm_head: nn.Module,
    labels_1S: Tensor,
    chunk: int,
    tokens: Tensor | None = None,
    row_slice: RowSlice = WHOLE,
) -> Tensor:
    """Mean next-token cross-entropy over labelled tokens, `chunk` positions of logits [chunk, V] at a time.

    Args:
        tokens: what the sum is divided by; default: the number of labelled tokens.
        row_slice: which part of the row the hidden states are of.

    Raises:
        ValueError: no labelled token, or a chunk below 1.
    """
    hidden_pE, target_p = labelled_positions(hidden_1SE, labels_1S, row_slice)
    labelled = target_p.shape[0] if row_slice.size == 1 else int((labels_1S[:, 1:] != IGNORE).sum())
    if not labelled:
        raise ValueError("the batch has no labelled token; every sample needs an answer")
    total = row_slice.sum(summed_cross_entropy(hidden_pE, target_p, lm_head, chunk))
    return total / (labelled if tokens is None else tokens)


def summed_cross_entropy(hidden_PE: Tensor, target_P: Tensor, lm_head: nn.Module, chunk: int) -> Tensor:
    """Sum of the cross-entropy over positions, fp32; 0, with a gradient of 0, where there are none."""
    total = hidden_PE.float().sum() * 0.0 if not target_P.numel() else hidden_PE.new_zeros((), dtype=torch.float32)
    for part in _chunks(target_P.shape[0], chunk):
        total = total + _recomputed(_summed_loss, hidden_PE[part], target_P[part], lm_head)
    return total


def answer_losses(
    hidden_1SE: Tensor,
    lm_head: nn.Module,
    labels_1S: Tensor,
    cu_seq_lens: Tensor,
    chunk: int,
    row_slice: RowSlice = WHOLE,
) -> Tensor:
    """Mean next-token cross-entropy of each sample's answer, fp32 [N], `chunk` positions of logits at a time.

    Raises:
        ValueError: a sample without a labelled token, or a chunk below 1.
    """
    hidden_pE, target_p = labelled_positions(hidden_1SE, labels_1S, row_slice)
    sample_P, count_N = labelled_samples(labels_1S, cu_seq_lens)
    parts = [
        _recomputed(_position_losses, hidden_pE[part], target_p[part], lm_head)
        for part in _chunks(target_p.shape[0], chunk)
    ]
    loss_p = torch.cat(parts) if parts else _nothing(hidden_pE)
    loss_P = every_position(loss_p, labels_1S, hidden_1SE.shape[1], row_slice)
    return torch.zeros_like(count_N).index_add(0, sample_P, loss_P) / count_N


def chunked_divergence(routed_PE: Tensor, dense_PE: Tensor, lm_head: nn.Module, chunk: int) -> Tensor:
    """KL(dense || routed) of the next-token distributions in nats, fp32 [P], `chunk` positions at a time.

    Args:
        routed_PE: final hidden states of the routed pass at the labelled positions.
        dense_PE: those of the dense pass, the teacher; it gets no gradient.

    Raises:
        ValueError: hidden states of different shapes, or a chunk below 1.
    """
    if routed_PE.shape != dense_PE.shape:
        raise ValueError(
            f"routed hidden states {list(routed_PE.shape)} and dense ones {list(dense_PE.shape)} differ in shape; "
            "both must hold the labelled positions of the same batch"
        )
    parts = [
        _recomputed(_divergence, routed_PE[part], dense_PE[part].detach(), lm_head)
        for part in _chunks(routed_PE.shape[0], chunk)
    ]
    return torch.cat(parts) if parts else _nothing(routed_PE)


def answer_divergence(
    routed_1SE: Tensor,
    dense_pE: Tensor,
    lm_head: nn.Module,
    labels_1S: Tensor,
    cu_seq_lens: Tensor,
    chunk: int,
    row_slice: RowSlice = WHOLE,
) -> Tensor:
    """Mean KL(dense || routed) over each sample's labelled positions in nats, fp32 [N].

    Args:
        routed_1SE: final hidden states of the routed pass.
        dense_pE: those of the dense pass at the labelled positions of the same slice.

    Raises:
        ValueError: a sample without a labelled token, or a chunk below 1.
    """
    sample_P, count_N = labelled_samples(labels_1S, cu_seq_lens)
    routed_pE, _ = labelled_positions(routed_1SE, labels_1S, row_slice)
    divergence_p = chunked_divergence(routed_pE, dense_pE, lm_head, chunk)
    divergence_P = every_position(divergence_p, labels_1S, routed_1SE.shape[1], row_slice)
    return torch.zeros_like(count_N).index_add(0, sample_P, divergence_P) / count_N


def labelled_positions(hidden_1SE: Tensor, labels_1S: Tensor, row_slice: RowSlice = WHOLE) -> tuple[Tensor, Tensor]:
    """Hidden states [p, E] of this slice that predict a labelled token, and those tokens [p]; the last token of a slice
    predicts the first label of the next one.
    """
    here = hidden_1SE.shape[1]
    target = F.pad(labels_1S[:, 1:], (0, row_slice.size * here - labels_1S.shape[1] + 1), value=IGNORE)
    target = target[:, row_slice.rank * here : (row_slice.rank + 1) * here]
    chosen = target != IGNORE
    return hidden_1SE[chosen], target[chosen]


def every_position(value_p: Tensor, labels_1S: Tensor, here: int, row_slice: RowSlice) -> Tensor:
    """A number for each labelled position of a slice of `here` tokens, put together with those of the other slices:
    [P], with gradient.
    """
    if row_slice.size == 1:
        return value_p
    predicting_P = (labels_1S[0, 1:] != IGNORE).nonzero()[:, 0]
    mine_p = (predicting_P // here == row_slice.rank).nonzero()[:, 0]
    return row_slice.sum(value_p.new_zeros(predicting_P.shape[0]).index_add(0, mine_p, value_p))


def labelled_samples(labels_1S: Tensor, cu_seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """Sample of every labelled position of a packed row, int64 [P], and their number per sample, fp32 [N].

    Raises:
        ValueError: a sample without a labelled token.
    """
    position_P = (labels_1S[0, 1:] != IGNORE).nonzero()[:, 0] + 1
    sample_P = torch.searchsorted(cu_seq_lens[1:].to(position_P.dtype), position_P, right=True)
    count_N = torch.bincount(sample_P, minlength=cu_seq_lens.shape[0] - 1).float()
    if not bool((count_N > 0).all()):
        raise ValueError("a sample has no labelled token; every sample needs an answer")
    return sample_P, count_N


def _nothing(hidden_0E: Tensor) -> Tensor:
    """Values of no position, fp32 [0], that depend on the hidden states all the same: in the backward pass every slice
    of a row takes part in the sums.
    """
    return hidden_0E.float().sum(-1)


def _chunks(positions: int, chunk: int) -> Iterator[slice]:
    if chunk < 1:
        raise ValueError(f"chunk={chunk} is below 1; it counts positions, 1024 is usual")
    return (slice(start, start + chunk) for start in range(0, positions, chunk))


def _recomputed(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """The function's value; what it computes on the way is not kept but computed again in the backward pass."""
    value: Tensor = checkpoint(function, *arguments, use_reentrant=False)
    return value


def _summed_loss(hidden_PE: Tensor, target_P: Tensor, lm_head: nn.Module) -> Tensor:
    return F.cross_entropy(lm_head(hidden_PE).float(), target_P, reduction="sum")


def _position_losses(hidden_PE: Tensor, target_P: Tensor, lm_head: nn.Module) -> Tensor:
    return F.cross_entropy(lm_head(hidden_PE).float(), target_P, reduction="none")


def _divergence(routed_PE: Tensor, dense_PE: Tensor, lm_head: nn.Module) -> Tensor:
    with torch.no_grad():
        dense = F.log_softmax(lm_head(dense_PE).float(), dim=-1)
    routed = F.log_softmax(lm_head(routed_PE).float(), dim=-1)
    return F.kl_div(routed, dense, reduction="none", log_target=True).sum(-1)
