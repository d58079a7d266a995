"""Attention sinks (gpt-oss): a learnt logit s_h of each query head that joins the denominator of its softmax and has no
value. With O and LSE of attention without it,
    LSE' = log(exp(LSE) + exp(s_h)),    O' = exp(LSE - LSE') O.
A backward pass that is given O' and LSE' computes P = exp(scores - LSE') and delta = <dO', O'>, which makes its dq, dk
and dv those with the sink; the sink's own share exp(s_h - LSE') of a row has no value, so
    ds_h = -sum over rows of exp(s_h - LSE') delta.
The kernels thus need not know sinks, except decode attention, which returns no LSE and counts them where it puts a head
together. Legend: B batch rows, S tokens, H query heads, D head dim.
"""

import torch
from torch import Tensor

NOTHING = float("-inf")  # LSE of a row that sees no key


def check_sinks(sinks: Tensor, heads: int, device: torch.device) -> None:
    """Whether `sinks` are one logit for each of so many query heads, on that device.

    Raises:
        ValueError: they are not.
    """
    if tuple(sinks.shape) != (heads,) or not sinks.is_floating_point():
        raise ValueError(
            f"sinks is {sinks.dtype} {list(sinks.shape)}; expected floating-point [{heads}], a logit for each query "
            "head"
        )
    if sinks.device != device:
        raise ValueError(f"sinks lies on {sinks.device} and q on {device}; expected one device")


def share_with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """O' and LSE' of O and LSE.

    Args:
        out: [B, S, H, D], scaled in place: in the type of `lse`, and rounded to its own a second time.
        lse: fp32 or wider [B, H, S].
        sinks: [H].

    Returns:
        `out`; LSE', contiguous. A row that sees nothing keeps 0 and -inf.
    """
    sinks_H1 = sinks.detach().to(lse.dtype)[:, None]
    empty = lse == NOTHING
    kept_BHS = torch.sigmoid(lse - sinks_H1).masked_fill(empty, 0.0)  # exp(LSE - LSE')
    out.mul_(kept_BHS.transpose(1, 2)[..., None])
    return out, torch.logaddexp(lse, sinks_H1).masked_fill(empty, NOTHING)


def sinks_gradient(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Gradient [H] of the sinks, in their type.

    Args:
        grad_out: [B, S, H, D]; may hold anything in rows of no sample.
        out, lse: O' and LSE', as `share_with_sinks` returned them.
    """
    delta_BHS = (grad_out.to(lse.dtype) * out).sum(-1).transpose(1, 2)
    share_BHS = torch.exp(sinks.to(lse.dtype)[:, None] - lse)
    return -(share_BHS * delta_BHS).masked_fill(lse == NOTHING, 0.0).sum((0, 2)).to(sinks.dtype)
