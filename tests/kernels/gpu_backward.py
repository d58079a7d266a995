"""Launching and judging the backward kernels in the GPU tests: poisoned gradients inside guard bands, the oracle in
fp64.
"""

import torch
from torch import Tensor

from elastic.kernels.attention_backward import backward_into, prepare_backward
from elastic.kernels.oracle import attention_oracle, gradient_oracle
from tests.kernels.generators import SENTINEL, Problem, keys_used, rows_written

Gradients = tuple[Tensor, Tensor, Tensor]


def upstream(problem: Problem, seed: int) -> Tensor:
    """A gradient of the output; NaN in rows of no sample, which must not matter."""
    gen = torch.Generator(problem.q.device).manual_seed(seed)
    shape = problem.q.shape
    grad = torch.randn(shape, generator=gen, device=problem.q.device).to(problem.q.dtype)
    grad[~rows_written(problem)] = float("nan")
    return grad


def run_backward(
    problem: Problem, grad: Tensor, out: Tensor, lse: Tensor, *, deterministic: bool = False,
    debug: tuple[str, ...] = (),
) -> Gradients:  # fmt: skip
    """Gradients of one launch; tokens of no sample must still hold the sentinel, and so must the guard bands."""
    guard, stores, grads = 4096, [], []
    used = (rows_written(problem), keys_used(problem), keys_used(problem))
    for like, mine in zip((problem.q, problem.k, problem.v), used, strict=True):
        store = torch.full((like.numel() + 2 * guard,), SENTINEL, dtype=like.dtype, device=like.device)
        grads.append(store[guard:-guard].view(like.shape))
        grads[-1][mine] = float("nan")
        stores.append(store)
    q, k, v, mode, pattern, ranges, bits = problem.args()
    own, operands = (grads[0], grads[1], grads[2]), (grad, q, k, v, out)
    plan = prepare_backward(own, *operands, mode, pattern, ranges, bits, debug)
    backward_into(own, *operands, lse, mode, ranges, bits, deterministic, plan)
    for store, found, mine in zip(stores, grads, used, strict=True):
        assert (store[:guard] == SENTINEL).all() and (store[-guard:] == SENTINEL).all(), "a guard band was overwritten"
        assert (found[~mine] == SENTINEL).all(), "a token of no sample was written"
    return tuple(grads)


def reference_gradients(problem: Problem, grad: Tensor) -> tuple[Gradients, list[float]]:
    """fp64 gradients, and the root-mean-square error of plain PyTorch's autograd in the problem's own dtype."""
    q, k, v, *rest = problem.args()
    clean = grad.masked_fill(~rows_written(problem)[..., None, None], 0.0)
    exact = gradient_oracle(*(x.double() for x in (clean, q, k, v)), *rest)
    same = gradient_oracle(clean, q, k, v, *rest, compute=q.dtype)
    used = (rows_written(problem), keys_used(problem), keys_used(problem))
    return exact, [_rms((a.double() - b)[u]) for a, b, u in zip(same, exact, used, strict=True)]


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def judge_gradients(found: Gradients, problem: Problem, expected: tuple[Gradients, list[float]]) -> list[float]:
    """Raise unless every gradient's error is at most twice PyTorch's plus one rounding. Returns the errors."""
    used, errors = (rows_written(problem), keys_used(problem), keys_used(problem)), []
    head_dim = problem.q.shape[3]
    for name, got, want, mine, torch_error in zip("qkv", found, expected[0], used, expected[1], strict=True):
        got, want = got[mine].double(), want[mine]
        assert not got.isnan().any(), f"NaN in d{name}"
        error = _rms(got - want)
        # A single visible key has dS = 0 exactly in PyTorch, and the difference of two fp32 sums here.
        rounding = torch.finfo(problem.q.dtype).eps * _rms(want) + 1e-6 * problem.pattern.scale_for(head_dim) * head_dim
        assert error <= 2 * torch_error + rounding, f"d{name} error {error:.3e}, PyTorch's own {torch_error:.3e}"
        errors.append(error)
    return errors


def forward_exact(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output and LSE of the oracle, rounded as the kernel's are."""
    q, k, v, *rest = problem.args()
    out, lse = attention_oracle(q, k, v, *rest)
    return out.contiguous(), lse.float().contiguous()
