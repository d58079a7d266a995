"""Launching and judging a kernel in the GPU tests: poisoned outputs inside guard bands, the oracle in fp64."""

import pytest
import torch
from torch import Tensor

from elastic.kernels.attention_forward import launch_into, prepare_launch
from elastic.kernels.devices import LaunchConfig, capability_of, launch_config, processors_of
from elastic.kernels.oracle import attention_oracle
from tests.kernels.generators import SENTINEL, Problem, rows_written

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU of compute capability 8.0 or newer")


def paths() -> tuple[str, ...]:
    """The kernels that this GPU can run."""
    return ("sm90", "sm80") if HAS_GPU and torch.cuda.get_device_capability() == (9, 0) else ("sm80",)


def config_for(path: str, problem: Problem) -> LaunchConfig:
    """Launch choices that force one of the two kernels on this GPU."""
    processors = processors_of(0)
    samples, heads = problem.mode.shape[0], problem.q.shape[2]
    tiles = samples * -(-problem.q.shape[1] // 128) * heads
    capability = capability_of(0)
    if path == "sm80" and capability == (9, 0):
        own = launch_config((8, 0), processors, problem.q.shape[3], samples, tiles)
        return LaunchConfig(own.name, "sm_90", own.threads, own.shared_bytes, own.grid)
    return launch_config(capability, processors, problem.q.shape[3], samples, tiles)


def run(problem: Problem, path: str, debug: tuple[str, ...] = ()) -> tuple[Tensor, Tensor]:
    """Outputs of one launch; rows of no sample must still hold the sentinel, and so must the guard bands."""
    shape, guard = problem.q.shape, 4096
    q = problem.q
    out_store = torch.full((q.numel() + 2 * guard,), SENTINEL, dtype=q.dtype, device=q.device)
    lse_store = torch.full((shape[0] * shape[1] * shape[2] + 2 * guard,), SENTINEL, device=q.device)
    out = out_store[guard:-guard].view(shape)
    lse = lse_store[guard:-guard].view(shape[0], shape[2], shape[1])
    used = rows_written(problem)
    out[used] = float("nan")
    lse.transpose(1, 2)[used] = float("nan")
    config, (q, k, v, mode, pattern, ranges, bits) = config_for(path, problem), problem.args()
    plan = prepare_launch(q, k, v, out, mode, pattern, bits, config, debug)
    launch_into(out, lse, q, k, v, mode, ranges, bits, plan)
    for store in (out_store, lse_store):
        assert (store[:guard] == SENTINEL).all() and (store[-guard:] == SENTINEL).all(), "a guard band was overwritten"
    assert (out[~used] == SENTINEL).all() and (lse.transpose(1, 2)[~used] == SENTINEL).all(), (
        "a padding row was written"
    )
    return out, lse


def reference(problem: Problem) -> tuple[Tensor, Tensor, float]:
    """fp64 output and LSE, and the largest error of plain PyTorch in the problem's own dtype."""
    q, k, v, *rest = problem.args()
    exact, lse = attention_oracle(q.double(), k.double(), v.double(), *rest)
    same, _ = attention_oracle(q, k, v, *rest, compute=q.dtype)
    used = rows_written(problem)
    return exact, lse, (same.double() - exact)[used].abs().amax().item() if used.any() else 0.0


def judge(out: Tensor, lse: Tensor, problem: Problem, expected: tuple[Tensor, Tensor, float]) -> float:
    """Raise unless output and LSE are right: error at most twice PyTorch's plus one rounding. Returns the error."""
    exact, exact_lse, torch_error = expected
    used = rows_written(problem)
    if not used.any():
        return 0.0
    got, want = out[used].double(), exact[used]
    assert not got.isnan().any(), "NaN in the output"
    error = (got - want).abs().amax().item()
    rounding = torch.finfo(problem.q.dtype).eps * max(1.0, want.abs().amax().item())
    assert error <= 2 * torch_error + rounding, f"output error {error:.3e}, PyTorch's own {torch_error:.3e}"
    got_lse, want_lse = lse.transpose(1, 2)[used].double(), exact_lse.transpose(1, 2)[used]
    empty = want_lse == float("-inf")
    assert (got_lse[empty] == float("-inf")).all() and not got_lse.isnan().any(), "LSE of an empty row"
    if (~empty).any():
        lse_error = (got_lse - want_lse)[~empty].abs().amax().item()
        assert lse_error <= 2e-4, f"LSE error {lse_error:.3e}"
    return error
