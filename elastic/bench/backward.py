"""`elastic bench backward`: dq, dk, dv of the fused kernels beside autograd of PyTorch's attention, in one run.

TFLOP/s count 2.5 times the forward's operations: five matrix products where the forward has two.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from elastic.bench import records
from elastic.bench.cases import PATTERN, Case, Inputs
from elastic.bench.contestants import FA4_PACKAGE, Call, Contestant, compiled_flex, flash_attn_4, flex_mask, forward
from elastic.bench.options import add_options, cases_of, chosen, kernel_device
from elastic.bench.race import product_ceiling, race
from elastic.kernels import attention_backward, unsupported_backward

SUMMARY = "the backward kernels beside autograd of SDPA, FlexAttention and flash-attn-4"
FORWARDS = 2.5


def upstream(inputs: Inputs) -> Tensor:
    """Gradient of the output, N(0, 1), [1, S, H, D]."""
    generator = torch.Generator(inputs.q.device).manual_seed(1)
    return torch.randn(inputs.q.shape, generator=generator, device=inputs.q.device).to(inputs.q.dtype)


def ours(inputs: Inputs, deterministic: bool) -> Call:
    """Our operator."""
    q, k, v, mode, bits = inputs
    out, lse = forward(inputs)
    grad = upstream(inputs)
    return lambda: attention_backward(grad, q, k, v, out, lse, mode, PATTERN, bits=bits, deterministic=deterministic)


def _autograd(inputs: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """Autograd of a function of [1, heads, S, D] operands; the forward pass runs once, here."""

    def token_first(*operands: Tensor) -> Tensor:
        return attend(*(x.transpose(1, 2) for x in operands)).transpose(1, 2)

    return _autograd_token_first(inputs, token_first)


def _autograd_token_first(inputs: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """The same of [1, S, heads, D] operands, which some kernels take as they are."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out, grad = attend(*leaves), upstream(inputs)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def _sdpa(backend: SDPBackend, _case: Case, inputs: Inputs) -> Call:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return _autograd(inputs, attend)


def _flex(case: Case, inputs: Inputs) -> Call:
    mask, flex = flex_mask(case.block_mask().to(inputs.q.device)), compiled_flex()
    return _autograd(inputs, lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=True))


def _fa4(case: Case, inputs: Inputs) -> Call:
    return _autograd_token_first(inputs, flash_attn_4(case, inputs.q.device))


def _is_dense(case: Case) -> bool:
    return case.msr == 0


COMPETITORS = {
    "cudnn": Contestant("PyTorch SDPA, cuDNN (dense)", _is_dense, partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    "flash2": Contestant(
        "PyTorch SDPA, FlashAttention-2 (dense)", _is_dense, partial(_sdpa, SDPBackend.FLASH_ATTENTION)
    ),
    "flex": Contestant("compiled FlexAttention under the same block mask", lambda case: True, _flex, flex=True),
    "fa4": Contestant(f"{FA4_PACKAGE}, block sparse where the case is", lambda case: True, _fa4, package=FA4_PACKAGE),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    add_options(parser, COMPETITORS, "backward")


def run(args: argparse.Namespace, command: str) -> int:
    """As `elastic.bench.attention.run`, for gradients: 1 where a contestant's differ from ours."""
    cases, contestants = cases_of(args), chosen(args, COMPETITORS)
    device = kernel_device(args, unsupported_backward)
    stamp = {**records.stamp(command, args.commit, device), "kernel": "attention_backward_sm90 (sm_90a)"}
    kernels = {"ours": partial(ours, deterministic=False), "ours-deterministic": partial(ours, deterministic=True)}
    return race(args, cases, kernels, contestants, [product_ceiling()], stamp, device, FORWARDS)
