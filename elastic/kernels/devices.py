"""Which kernel a device runs, and how it is launched there: chosen by compute capability alone."""

from dataclasses import dataclass
from functools import cache

import torch

from elastic.kernels import jit
from elastic.kernels.checks import HEAD_DIMS
from elastic.kernels.params import BACKWARD_TILE, QUERY_BLOCK, is_half

_SHARED_SM90 = 232448  # bytes that a CTA can have on compute capability 9.0


@dataclass(frozen=True)
class LaunchConfig:
    """How one launch runs: kernel file, compile target, threads and shared bytes of a CTA, CTAs."""

    name: str
    arch: str
    threads: int
    shared_bytes: int
    grid: int


def launch_config(
    capability: tuple[int, int], processors: int, head_dim: int, samples: int, tiles: int
) -> LaunchConfig:
    """Launch choices of a GPU; `tiles` is an upper bound of the query tiles.

    Raises:
        ValueError: a GPU older than compute capability 8.0.
    """
    schedule = 48 * samples
    if capability == (9, 0):
        stages = 4 if head_dim == 64 else 2
        shared = 1024 + 2 * head_dim * QUERY_BLOCK * (2 + 2 * stages) + 1024 + schedule
        return LaunchConfig("attention_forward_sm90", "sm_90a", 384, shared, max(1, min(processors, tiles)))
    if capability < (8, 0):
        raise ValueError(
            f"compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 (Ampere) or newer, use "
            "PyTorch's attention on this GPU"
        )
    shared = 4 * head_dim * QUERY_BLOCK + 16 + schedule
    arch = f"sm_{capability[0]}{capability[1]}"
    return LaunchConfig("attention_forward_sm80", arch, 256, shared, max(1, min(2 * processors, tiles)))


def backward_config(processors: int, head_dim: int, samples: int, tiles: int) -> LaunchConfig:
    """Launch choices of the backward pass on compute capability 9.0; `tiles` is an upper bound of the key tiles."""
    rows = BACKWARD_TILE // head_dim
    tables = -(-samples // 4) * 16 + 48 * samples
    operands = 2 * 128 * head_dim * 2 + 4 * BACKWARD_TILE * 2 + 2 * rows * 128 * 2 + BACKWARD_TILE * 4
    shared = 1024 + operands + 4 * rows * 4 + 1024 + tables
    return LaunchConfig("attention_backward_sm90", "sm_90a", 384, shared, max(1, min(processors, tiles)))


@dataclass(frozen=True)
class SelectionConfig:
    """How the launch that chooses key blocks runs; `shared_units`: blocks whose masses a warp has room for."""

    threads: int
    shared_bytes: int
    grid: int
    shared_units: int


def selection_config(processors: int, samples: int, tiles: int, key_blocks: int) -> SelectionConfig:
    """Launch choices of the block selection on compute capability 9.0; `tiles` is an upper bound of the row tiles."""
    fixed = 1024 + 4 * (128 + 256) * 128 + 1024 + 16 * samples
    per_unit = 8 * 4  # warps, bytes
    units = min(-(-key_blocks // 32), (_SHARED_SM90 - fixed) // (32 * per_unit)) * 32
    return SelectionConfig(384, fixed + per_unit * units, max(1, min(processors, tiles)), units)


@dataclass(frozen=True)
class DecodeConfig:
    """How decode attention runs: compile target, warps of a CTA, stages of a warp's ring, shared bytes, CTAs."""

    arch: str
    warps: int
    stages: int
    shared_bytes: int
    grid: int


def decode_config(
    capability: tuple[int, int], processors: int, shared_limit: int, head_dim: int, group: int, heads: int,
    warps: int = 8, most_stages: int = 6, per_processor: int = 1,
) -> DecodeConfig:  # fmt: skip
    """Launch choices of decode attention: as many bytes in flight as shared memory holds, because nothing else limits.

    Args:
        shared_limit: bytes of shared memory that a CTA can have.
        heads: samples times KV heads.
        warps, most_stages, per_processor: what timings compare; the defaults are the fastest found.

    Raises:
        ValueError: a GPU older than compute capability 8.0.
    """
    if capability < (8, 0):
        raise ValueError(
            f"compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 (Ampere) or newer, use "
            "PyTorch's attention on this GPU"
        )
    limit = shared_limit // per_processor - 1024 * (per_processor > 1)
    while True:
        rest = warps * (group * (head_dim + 8) * 4 + 132) + 160 + 4 * (heads + 1)
        stage = warps * 2 * 16 * 2 * head_dim
        stages = min(most_stages, (limit - rest) // stage)
        if stages >= 2:
            break
        warps //= 2
    # A merging CTA keeps three numbers for each part of a head where the warps' outputs lay, and in the rings a row.
    grid = min(processors * per_processor, warps * (head_dim + 8) // 3, stages * stage // (4 * head_dim))
    arch = f"sm_{capability[0]}{capability[1]}"
    return DecodeConfig(arch, warps, stages, stages * stage + rest, grid)


@cache
def device_facts(index: int) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors of a GPU."""
    facts = torch.cuda.get_device_properties(index)
    return (facts.major, facts.minor), facts.multi_processor_count


def kernel_path(device: torch.device) -> str:
    """Name of the kernel that runs on this device, for reports: chosen by compute capability alone."""
    if device.type != "cuda":
        return "oracle (PyTorch)"
    capability, processors = device_facts(device.index or 0)
    config = launch_config(capability, processors, 128, 1, processors)
    return f"{config.name} ({config.arch})"


@cache
def shared_limit(index: int) -> int:
    """Bytes of shared memory that a CTA of this GPU can have."""
    return torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined]


@cache
def unsupported_backward(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the backward kernels cannot run on such tensors here, in a few words; None if they can."""
    reason = unsupported_reason(device, dtype, head_dim)
    if reason is None and device_facts(device.index or 0)[0] != (9, 0):
        return "the backward kernels need compute capability 9.0"
    return reason


@cache
def unsupported_selection(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel that chooses key blocks cannot run on such tensors here, in a few words; None if it can. Other
    GPUs choose in PyTorch.
    """
    reason = unsupported_reason(device, dtype, head_dim)
    if reason is None and device_facts(device.index or 0)[0] != (9, 0):
        return "the selection kernel needs compute capability 9.0"
    return reason


@cache
def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot run on such tensors here, in a few words; None if they can."""
    if device.type != "cuda":
        return "no CUDA device"
    if not is_half(dtype) or head_dim not in HEAD_DIMS:
        return f"{str(dtype).removeprefix('torch.')}, head dim {head_dim}: the kernels take bf16 and fp16, 64 and 128"
    if device_facts(device.index or 0)[0] < (8, 0):
        return "the kernels need compute capability 8.0"
    return None if jit.is_installed() else "CuPy is not installed"
