"""Discrete routes with a gradient: Gumbel-softmax, straight-through (docs/design.md section 4; paper 3.2 and appendix
F).
"""

import torch
from torch import Tensor


def decide(logits: Tensor, sparsity_bias: float = 0.0) -> Tensor:
    """Inference: argmax of the two logits, no noise. Ties go to full attention.

    Args:
        logits: [..., 2], route 0 first.
        sparsity_bias: added to the SA logit.

    Returns:
        Route [...] in {0, 1}, of the logits' dtype.
    """
    return (logits[..., 1] + sparsity_bias > logits[..., 0]).to(logits.dtype)


def gumbel_noise(shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
    """Gumbel(0, 1) noise, fp32 on the generator's device, or the CPU."""
    # Exponential samples are positive, hence -log of them is Gumbel(0, 1) without a clamp.
    device = "cpu" if generator is None else generator.device
    return -torch.empty(shape, device=device).exponential_(generator=generator).log()


def sample_route(logits: Tensor, temperature: float, gumbel: Tensor | None = None) -> Tensor:
    """Training: soft = softmax((logits + Gumbel noise) / temperature); forward uses its one-hot argmax, gradient
    flows through soft.

    Args:
        logits: [..., 2], route 0 first.
        temperature: tau > 0.
        gumbel: [..., 2], the noise; default: drawn here.

    Returns:
        Route [...] in {0, 1}, equal to the soft SA probability in its gradient.

    Raises:
        ValueError: a temperature of 0 or below, or noise of another shape than the logits.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} is not positive; the annealing must end above 0 (tau_min)")
    if gumbel is None:
        gumbel = -torch.empty_like(logits).exponential_().log()
    if gumbel.shape != logits.shape:
        raise ValueError(f"noise of shape {list(gumbel.shape)} came for logits of {list(logits.shape)}")
    soft = torch.softmax((logits + gumbel) / temperature, dim=-1)[..., 1]
    hard = (soft > 0.5).to(soft.dtype)
    return hard + (soft - soft.detach())
