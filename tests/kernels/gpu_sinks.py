"""Attention sinks in the GPU tests: sinks of a seed, and transformers' eager attention under a problem's masks, in fp64
and in the problem's own type, as the judges take it.
"""

import random
from dataclasses import replace

import torch
from torch import Tensor

from elastic.attention.torch_path import attend_with_sinks
from elastic.kernels.oracle import attention_oracle, head_mask
from tests.kernels.generators import Problem, keys_used, rows_written
from tests.kernels.gpu_decode import DecodeProblem, random_decode

Outcome = tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor]


def random_sinks(seed: int, heads: int, device: str = "cuda") -> Tensor:
    """Logits of so many heads: beside the scores, or far from some of them. The fp32 numbers are bf16 ones too."""
    spread = random.Random(seed).choice((1.0, 4.0, 30.0))
    normal = torch.randn(heads, generator=torch.Generator(device).manual_seed(seed), device=device)
    return (spread * normal).bfloat16().float()


def decode_with_sinks(seed: int) -> DecodeProblem:
    """The decode problem of a seed, with sinks."""
    problem = random_decode(seed)
    return replace(problem, sinks=random_sinks(seed, problem.q.shape[1]))


def eager(problem: Problem, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    """Output [B, Sq, H, D] of the operands under the modes and masks of a problem; differentiable."""
    out, group = torch.zeros_like(q), q.shape[2] // k.shape[2]
    scale = problem.pattern.scale_for(q.shape[3])
    spans = problem.ranges.on_host(problem.mode.shape[0], q.shape[1], k.shape[1])
    for n, (row, begin_q, end_q, begin_k, end_k) in enumerate(spans):
        for kv_head, mode in enumerate(problem.mode[n].tolist()):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            bits = None if problem.bits is None else problem.bits[n, heads]
            mask = head_mask(mode, end_q - begin_q, end_k - begin_k, problem.pattern, bits, q.device)
            assert mask is not None
            keys, values = (x[row, begin_k:end_k, kv_head].expand(1, group, -1, -1) for x in (k, v))
            queries = q[row, begin_q:end_q, heads].transpose(0, 1)[None]
            found = attend_with_sinks(queries, keys, values, mask, scale, sinks[heads, None])
            out[row, begin_q:end_q, heads] = found[0].transpose(0, 1)
    return out


def outcome(problem: Problem, sinks: Tensor, grad: Tensor, dtype: torch.dtype) -> Outcome:
    """Output, gradients of q, k, v and of the sinks by autograd, in an element type."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v, sinks)]
    out = eager(problem, *leaves)
    clean = grad.masked_fill(~rows_written(problem)[..., None, None], 0.0).to(dtype)
    dq, dk, dv, dsinks = torch.autograd.grad(out, leaves, clean)
    return out.detach(), (dq, dk, dv), dsinks


def expected_lse(problem: Problem, sinks: Tensor) -> Tensor:
    """LSE [B, H, Sq] with the sinks' share, in fp64; -inf where a query sees nothing."""
    q, k, v, *rest = problem.args()
    _, lse = attention_oracle(q.double(), k.double(), v.double(), *rest)
    return torch.logaddexp(lse, sinks.double()[:, None]).masked_fill(lse == float("-inf"), float("-inf"))


def largest_error(found: Tensor, exact: Tensor, problem: Problem) -> float:
    """Of the output's rows that belong to a sample."""
    used = rows_written(problem)
    return (found.double() - exact)[used].abs().amax().item() if used.any() else 0.0


def mean_errors(found: Outcome, exact: Outcome, problem: Problem) -> list[float]:
    """Root-mean-square errors of dq, dk and dv."""
    used = (rows_written(problem), keys_used(problem), keys_used(problem))
    differences = [(a.double() - b)[u] for a, b, u in zip(found[1], exact[1], used, strict=True)]
    return [x.square().mean().sqrt().item() if x.numel() else 0.0 for x in differences]
