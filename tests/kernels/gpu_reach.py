"""Launching and judging the reach kernels: poisoned outputs and workspace inside guard bands, the oracle in fp64."""

import dataclasses

import torch
from torch import Tensor

from elastic.kernels import jit
from elastic.kernels.attention_decode import arrivals
from elastic.kernels.devices import LaunchConfig, capability_of, processors_of, reach_config, shared_limit
from elastic.kernels.params import REACH_TILE, Pattern, Ranges
from elastic.kernels.reach import launch_reach, parts_size, prepare_reach, samples_of
from elastic.kernels.reach_oracle import reach_oracle
from tests.kernels.generators import SENTINEL

ROUNDING, MOST = 2**-18, 1e-4  # what fp32 scores of some tens leave; and however bad PyTorch's own type is


def config_for(path: str, q: Tensor, k: Tensor, ranges: Ranges, processors: int | None = None) -> LaunchConfig:
    """Launch choices that force one of the two kernels on this GPU, and a number of CTAs."""
    index, group, heads = q.device.index, q.shape[2] // k.shape[2], samples_of(q, ranges) * k.shape[2]
    shape = (q.shape[3], group, heads, heads * -(-k.shape[1] // REACH_TILE))
    processors = processors or processors_of(index)
    if path == "sm80" and capability_of(index) == (9, 0):
        own = reach_config((8, 0), processors, shared_limit(index), *shape)
        return dataclasses.replace(own, arch="sm_90")
    return reach_config(capability_of(index), processors, shared_limit(index), *shape)


def guarded(*shape: int) -> tuple[Tensor, Tensor]:
    """A tensor of NaN, and the store around it whose ends must keep the sentinel."""
    guard, size = 1024, torch.Size(shape).numel()
    store = torch.full((size + 2 * guard,), SENTINEL, device="cuda")
    inside = store[guard : guard + size].view(shape)
    inside.fill_(float("nan"))
    return inside, store


def run_reach(
    q: Tensor, k: Tensor, pattern: Pattern, ranges: Ranges, path: str, processors: int | None = None,
    debug: tuple[str, ...] = (),
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Outputs of one launch; nothing beside them and the workspace may be written, and arrivals are zero again."""
    config = config_for(path, q, k, ranges, processors)
    shape = (samples_of(q, ranges), k.shape[2])
    size = parts_size(config.grid, q.shape[2] // k.shape[2])
    (largest, first), (recent, second), (parts, third) = guarded(*shape), guarded(*shape), guarded(size)
    launch_reach(largest, recent, parts, q, k, ranges, prepare_reach(q, k, largest, pattern, config, debug))
    for store in (first, second, third):
        assert (store[:1024] == SENTINEL).all() and (store[-1024:] == SENTINEL).all(), "a guard band was overwritten"
    assert not arrivals(q.device, jit.current_stream(q.device.index), 0).any(), "arrivals were left"
    return largest, recent


def judge_reach(found: tuple[Tensor, Tensor], q: Tensor, k: Tensor, pattern: Pattern, ranges: Ranges) -> float:
    """Raise unless both errors are at most twice those of PyTorch in the problem's type. Returns the larger one."""
    exact = reach_oracle(q.double(), k.double(), pattern, ranges)
    same = reach_oracle(q, k, pattern, ranges, compute=q.dtype)
    errors = []
    for one, want, own in zip(found, exact, same, strict=True):
        assert not one.isnan().any(), "NaN in the output"
        assert (one >= 0).all() and (one <= 1).all(), "a share outside [0, 1]"
        assert (one[want == 0] == 0).all(), "a sample that hides nothing has a reach"
        error, torch_error = ((x.double() - want).abs().amax().item() if x.numel() else 0.0 for x in (one, own))
        assert error <= min(2 * torch_error + ROUNDING, MOST), f"error {error:.3e}, PyTorch's own {torch_error:.3e}"
        errors.append(error)
    return max(errors)
