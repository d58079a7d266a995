"""`routed_attention`: every head in its routed mode, with the straight-through gradient of the route (docs/design.md
section 4).

This is the seam between routing and kernels: where the tensors suit them, the fused CUDA kernels run, in inference and
in training; everything else is `elastic.attention.torch_path`, their slow twin. With a hard route the output is the
routed branch, so only that branch needs a backward for q, k and v; the other branch is needed forward only, for the
route's
own gradient
    d route = <dO, O_SA - O_FA> summed over the group's heads, the sample's tokens and D.
The kernels may estimate it from a share of the queries (`HeadPlan.gradient_share`); PyTorch takes all of them.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from elastic.attention.block_selection import density, with_blocks
from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import Layout
from elastic.attention.torch_path import attend
from elastic.config import Mode, SparseConfig
from elastic.kernels import (
    attention_backward,
    attention_forward,
    kernel_path,
    period_of,
    route_gap,
    sinks_gradient,
    slot_table,
    unsupported_backward,
    unsupported_reason,
    unsupported_selection,
)


def backend_for(
    device: torch.device, dtype: torch.dtype, head_dim: int, training: bool = False, sparse: SparseConfig | None = None
) -> str:
    """What runs inference (or `training`) on such tensors, as reports and logs state it: a kernel, or PyTorch and on a
    GPU the reason. With the modes of `sparse`, also where PyTorch chooses key blocks for a kernel.
    """
    reason = (unsupported_backward if training else unsupported_reason)(device, dtype, head_dim)
    if reason is None:
        chooser = _chosen_in_torch(device, dtype, head_dim, None if sparse is None else sparse.chooser)
        return kernel_path(device) + (f"; key blocks are chosen in torch: {chooser}" if chooser else "")
    return f"torch ({device.type})" if device.type != "cuda" else f"torch (cuda; {reason})"


def _chosen_in_torch(device: torch.device, dtype: torch.dtype, head_dim: int, chooser: Mode | None) -> str | None:
    """Why PyTorch chooses the key blocks of a mode; None where it does not."""
    if chooser == "xattention":
        return unsupported_selection(device, dtype, head_dim)
    return None if chooser is None else f"{chooser} has no operator of its own"


class Routed(NamedTuple):
    """What `routed_attention` gives.

    Attributes:
        output: [B, Lq, H, D].
        plan: the plan that ran, with the key blocks that were chosen.
        density: float64 [N, K]; what those heads visited, see `elastic.attention.block_selection.density`.
    """

    output: Tensor
    plan: HeadPlan
    density: Tensor | None = None


def routed_attention(
    q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, route_NK: Tensor, plan: HeadPlan, scale: float
) -> Routed:
    """Attention under a plan built from `route_NK`.

    Args:
        q_BHSD: [B, H, Lq, D] after RoPE.
        k_BKSD, v_BKSD: [B, K, Lk, D], cached keys included.
        route_NK: the route; if it carries a gradient, it receives the straight-through gradient.
        plan: may hold key blocks already; they are chosen otherwise.
        scale: softmax scale.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check(q_BHSD, k_BKSD, v_BKSD, plan)
    kernels = _runs_fused(q_BHSD, k_BKSD, v_BKSD, route_NK, plan.sinks_H)
    routed = torch.is_grad_enabled() and route_NK.requires_grad
    share = None
    if plan.sparse.chooser is not None:
        plan = with_blocks(q_BHSD, k_BKSD, plan, scale, fused=kernels, both=routed)
        share = density(plan)
    if kernels:
        return Routed(fused(q_BHSD, k_BKSD, v_BKSD, route_NK, plan, scale), plan, share)
    out = attend(q_BHSD, k_BKSD, v_BKSD, plan, scale)
    if routed:
        with torch.no_grad():
            other = attend(q_BHSD, k_BKSD, v_BKSD, plan.flipped(), scale)
        out = _StraightThrough.apply(out, other, route_NK, plan.layout)
    return Routed(out, plan, share)


def _runs_fused(q: Tensor, k: Tensor, v: Tensor, route: Tensor, sinks: Tensor | None) -> bool:
    inputs = (q, k, v, route, sinks)
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    reason = unsupported_backward if differentiable else unsupported_reason
    return reason(q.device, q.dtype, q.shape[-1]) is None


def fused(q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, route_NK: Tensor, plan: HeadPlan, scale: float) -> Tensor:
    """The plan in one launch of the operator, differentiable; [B, Lq, H, D], zero at padding.

    On the CPU the operators are their oracles, which is how the plan's translation is tested without a GPU.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BHSD, k_BKSD, v_BKSD))
    output: Tensor = _Fused.apply(q, k, v, route_NK, plan.sinks_H, plan, scale)
    return output


class _Fused(torch.autograd.Function):
    """The fused operators under autograd; q, k, v are [B, S, heads, D]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, route_NK: Tensor, sinks_H: Tensor | None, plan: HeadPlan,
        scale: float,
    ) -> Tensor:  # fmt: skip
        visible = plan.pattern(scale), plan.layout.kernel_ranges, plan.bits
        out, lse = attention_forward(q, k, v, plan.mode_NK, *visible, sinks_H)
        ctx.save_for_backward(q, k, v, out, lse, route_NK, sinks_H)
        ctx.plan, ctx.visible = plan, visible
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        q, k, v, out, lse, route_NK, sinks_H = ctx.saved_tensors
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if any(ctx.needs_input_grad[:3]):
            deterministic = torch.are_deterministic_algorithms_enabled()
            grads = attention_backward(
                grad, q, k, v, out, lse, ctx.plan.mode_NK, *ctx.visible, deterministic=deterministic
            )
        droute = None
        if ctx.needs_input_grad[3]:
            other, share = ctx.plan.flipped().mode_NK, ctx.plan.gradient_share
            table = _slots(ctx.plan)
            gap = route_gap(grad, out, q, k, v, other, *ctx.visible, share=share, table=table, sinks=sinks_H)
            droute = (gap * (2.0 * route_NK - 1.0)).to(route_NK.dtype)
        dsinks = sinks_gradient(grad, out, lse, sinks_H) if ctx.needs_input_grad[4] else None
        return *grads, droute, dsinks, None, None


def _slots(plan: HeadPlan) -> Tensor:
    """The layout's query slots, for the route's gradient in all layers."""
    layout, period = plan.layout, period_of(plan.gradient_share)
    ranges, sizes = layout.kernel_ranges, (layout.rows, layout.queries, layout.keys)
    samples, device = plan.mode_NK.shape[0], plan.mode_NK.device
    return layout.memo(("slots", period), lambda: slot_table(ranges, *sizes, samples, period, device))


class _StraightThrough(torch.autograd.Function):
    """Identity on the routed output whose backward also gives the route <dO, O_route1 - O_route0> per sample and KV
    head.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, other: Tensor, route_NK: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(out, other, route_NK)
        ctx.layout = layout
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (grad_BSHD,) = grad_outputs
        out, other, route_NK = ctx.saved_tensors
        kv_heads = route_NK.shape[1]
        # <dO, out - other> per token and KV head, [B, Lq, K]
        gap = (grad_BSHD.float() * (out.float() - other.float())).unflatten(2, (kv_heads, -1)).sum((-1, -2))
        layout: Layout = ctx.layout
        per_sample = [gap[row, max(0, b - layout.past) : max(0, e - layout.past)].sum(0) for row, b, e in layout.spans]
        sign = torch.where(route_NK > 0.5, 1.0, -1.0)
        return grad_BSHD, None, (torch.stack(per_sample) * sign).to(route_NK.dtype), None


def _check(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan) -> None:
    layout = plan.layout
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} do not belong together; expected "
            "[B, H, Lq, D], [B, K, Lk, D], [B, K, Lk, D]"
        )
    if q.shape[1] % k.shape[1] or plan.mode_NK.shape[1] != k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads, {k.shape[1]} KV heads and a plan for {plan.mode_NK.shape[1]} KV heads do "
            "not fit; "
            "query heads must be a multiple of KV heads, and the plan must have one mode per KV head"
        )
    if (q.shape[0], q.shape[2], k.shape[2]) != (layout.rows, layout.queries, layout.keys):
        raise ValueError(
            f"rows, queries and keys are {(q.shape[0], q.shape[2], k.shape[2])}, but the layout was built for "
            f"{(layout.rows, layout.queries, layout.keys)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype for all three")
