"""Which kernel a device runs, and how it is launched there: chosen by compute capability alone."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from elastic.kernels import jit
from elastic.kernels.checks import HEAD_DIMS
from elastic.kernels.params import (
    BACKWARD_TILE,
    HALF_BLOCK,
    KEY_BLOCK,
    KEY_CELLS,
    QUERY_BLOCK,
    REACH_QUERIES,
    REACH_TILE,
    ROW_TILE,
    is_half,
)

# The kernels' own numbers, compared with those of cuda_src by tests/kernels/test_constants.py.
SM90_THREADS, SM80_THREADS, ROWS_THREADS = 384, 256, 256  # of a CTA
CONSUMER_WARPS = 8  # of the kernels of compute capability 9.0
FORWARD_STAGES, BACKWARD_STAGES, SELECTION_STAGES = {64: 4, 128: 2}, 2, 4  # of K and V by head dim, of Q and dO, of all
MAX_GROUP = 16  # query heads per KV head that fit the decode kernel's tile
DECODE_TOKENS, DECODE_PADDING = 16, 8  # of a warp's tile; floats between two output rows
MAX_REACH_GROUP, REACH_BLOCK = 8, 64  # query heads per KV head that a reach kernel takes; rows of a block, on 9.0
REACH_STAGES = {(8, 0): 4, (9, 0): 8}  # at most, of a ring of key tiles
REACH_PART, REACH_SHARED, MAX_HEADS = 16, 512, 4096  # bytes: a row's sums, what a CTA notes; KV heads of all samples
_SHARED_SM90 = 232448  # bytes that a CTA can have on compute capability 9.0
_ALIGNMENT, _CONTROL, _SEGMENT = 1024, 1024, 16  # bytes: tiles begin at multiples; barriers and headers; schedule entry
_CLASSES = 3  # of heads: a schedule has so many segments per sample
_SWIZZLE = 128  # bytes: the width of a tile's rows in shared memory


@dataclass(frozen=True)
class LaunchConfig:
    """How one launch runs: kernel file, compile target, threads and shared bytes of a CTA, CTAs, macros."""

    name: str
    arch: str
    threads: int
    shared_bytes: int
    grid: int
    macros: tuple[str, ...] = ()


def launch_config(
    capability: tuple[int, int], processors: int, head_dim: int, samples: int, tiles: int
) -> LaunchConfig:
    """Launch choices of a GPU; `tiles` is an upper bound of the query tiles.

    Raises:
        ValueError: a GPU older than compute capability 8.0.
    """
    schedule = _CLASSES * _SEGMENT * samples
    if capability == (9, 0):
        tiles_kv = 2 * FORWARD_STAGES[head_dim] * KEY_BLOCK
        shared = _ALIGNMENT + 2 * head_dim * (2 * QUERY_BLOCK + tiles_kv) + _CONTROL + schedule
        return LaunchConfig("attention_forward_sm90", "sm_90a", SM90_THREADS, shared, max(1, min(processors, tiles)))
    arch = _arch_of(capability)
    shared = 2 * head_dim * (QUERY_BLOCK + 2 * HALF_BLOCK) + 16 + schedule
    return LaunchConfig("attention_forward_sm80", arch, SM80_THREADS, shared, max(1, min(2 * processors, tiles)))


def _arch_of(capability: tuple[int, int]) -> str:
    if capability < (8, 0):
        raise ValueError(
            f"compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 (Ampere) or newer, use "
            "PyTorch's attention on this GPU"
        )
    return f"sm_{capability[0]}{capability[1]}"


def backward_config(processors: int, head_dim: int, samples: int, tiles: int) -> LaunchConfig:
    """Launch choices of the backward pass on compute capability 9.0; `tiles` is an upper bound of the key tiles."""
    rows = BACKWARD_TILE // head_dim
    tables = -(-samples // 4) * 16 + _CLASSES * _SEGMENT * samples  # first row tiles, then the schedule
    inputs = 2 * (2 * KEY_BLOCK * head_dim + 2 * BACKWARD_STAGES * BACKWARD_TILE)  # K, V; Q, dO of every stage
    gradients = 2 * 2 * rows * KEY_BLOCK + 4 * BACKWARD_TILE  # two buffers of dS, fp32 dQ
    row_values = 2 * BACKWARD_STAGES * 4 * rows  # lse2 and delta of every stage
    shared = _ALIGNMENT + inputs + gradients + row_values + _CONTROL + tables
    return LaunchConfig("attention_backward_sm90", "sm_90a", SM90_THREADS, shared, max(1, min(processors, tiles)))


@dataclass(frozen=True)
class SelectionConfig:
    """How the launch that chooses key blocks runs; `shared_units`: blocks whose masses a warp has room for."""

    threads: int
    shared_bytes: int
    grid: int
    shared_units: int


def selection_config(processors: int, samples: int, tiles: int, key_blocks: int) -> SelectionConfig:
    """Launch choices of the block selection on compute capability 9.0; `tiles` is an upper bound of the row tiles."""
    stages = SELECTION_STAGES * (ROW_TILE + KEY_CELLS) * _SWIZZLE
    fixed = _ALIGNMENT + stages + _CONTROL + _SEGMENT * samples
    per_unit = CONSUMER_WARPS * 4  # bytes
    units = min(-(-key_blocks // 32), (_SHARED_SM90 - fixed) // (32 * per_unit)) * 32
    return SelectionConfig(SM90_THREADS, fixed + per_unit * units, max(1, min(processors, tiles)), units)


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
    arch = _arch_of(capability)
    limit = shared_limit // per_processor - 1024 * (per_processor > 1)
    while True:
        rest = warps * (group * (head_dim + DECODE_PADDING) * 4 + 132) + 160 + 4 * (heads + 1)
        stage = warps * 2 * DECODE_TOKENS * 2 * head_dim
        stages = min(most_stages, (limit - rest) // stage)
        if stages >= 2:
            break
        warps //= 2
    # A merging CTA keeps three numbers for each part of a head where the warps' outputs lay, and in the rings a row.
    grid = min(processors * per_processor, warps * (head_dim + DECODE_PADDING) // 3, stages * stage // (4 * head_dim))
    return DecodeConfig(arch, warps, stages, stages * stage + rest, grid)


def reach_config(
    capability: tuple[int, int], processors: int, shared_limit: int, head_dim: int, group: int, heads: int, tiles: int
) -> LaunchConfig:
    """Launch choices of reach.

    Args:
        shared_limit: bytes of shared memory that a CTA can have.
        group: query heads per KV head.
        heads: samples times KV heads.
        tiles: an upper bound of the key tiles of all heads.

    Raises:
        ValueError: a GPU older than compute capability 8.0, or a group that the kernels do not take.
    """
    arch, tile, grid = _arch_of(capability), 2 * REACH_TILE * head_dim, max(1, min(processors, tiles))
    if not 1 <= group <= MAX_REACH_GROUP:
        raise ValueError(
            f"{group} query heads per KV head; the reach kernels take at most {MAX_REACH_GROUP}, use "
            "elastic.kernels.reach_oracle on this model"
        )
    entries, room = 4 * (heads + 1), 4 * (MAX_HEADS + 1)  # of the list of heads; as if it were the longest
    if capability == (9, 0):
        blocks = -(-group * REACH_QUERIES // REACH_BLOCK)
        rest = _ALIGNMENT + _CONTROL + blocks * REACH_BLOCK * (2 * head_dim + 2 * REACH_PART)
        stages = min(REACH_STAGES[9, 0], (_SHARED_SM90 - rest - room) // tile) // 2 * 2  # half for each warpgroup
        macros = (f"ELASTIC_BLOCKS={blocks}", f"ELASTIC_STAGES={stages}")
        return LaunchConfig("reach_sm90", "sm_90a", SM90_THREADS, stages * tile + rest + entries, grid, macros)
    warps = group * max(1, min(REACH_TILE // 32, 8 // group))  # several of a query head take turns
    rest = 32 * warps * REACH_PART + REACH_SHARED
    stages = min(REACH_STAGES[8, 0], (shared_limit - rest - room) // tile)
    macros = (f"ELASTIC_WARPS={warps}", f"ELASTIC_STAGES={stages}")
    return LaunchConfig("reach_sm80", arch, 32 * warps, stages * tile + rest + entries, grid, macros)


@cache
def capability_of(index: int) -> tuple[int, int]:
    """Compute capability of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return properties.major, properties.minor


@cache
def processors_of(index: int) -> int:
    """Number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def shared_limit(index: int) -> int:
    """Bytes of shared memory that a CTA of this GPU can have."""
    limit: int = torch.cuda.get_device_properties(index).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return limit


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """For a Triton launch, which goes to the current GPU: that of `x`. Triton's interpreter takes any tensor."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def kernel_path(device: torch.device) -> str:
    """Name of the kernel that runs on this device, for reports: chosen by compute capability alone."""
    if device.type != "cuda":
        return "oracle (PyTorch)"
    config = launch_config(capability_of(device.index or 0), 1, 128, 1, 1)
    return f"{config.name} ({config.arch})"


@cache
def unsupported_reason(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernels cannot run on such tensors here, in a few words; None if they can."""
    if device.type != "cuda":
        return "no CUDA device"
    if not is_half(dtype) or head_dim not in HEAD_DIMS:
        return f"{str(dtype).removeprefix('torch.')}, head dim {head_dim}: the kernels take bf16 and fp16, 64 and 128"
    if capability_of(device.index or 0) < (8, 0):
        return "the kernels need compute capability 8.0"
    return None if jit.is_installed() else "CuPy is not installed"


def unsupported_reach(device: torch.device, dtype: torch.dtype, head_dim: int, group: int) -> str | None:
    """Why the reach kernels cannot run on such tensors here, with `group` query heads per KV head, in a few words; None
    if they can. `elastic.kernels.reach_oracle` runs anywhere.
    """
    reason = unsupported_reason(device, dtype, head_dim)
    if reason is None and not 1 <= group <= MAX_REACH_GROUP:
        return f"{group} query heads per KV head: the reach kernels take at most {MAX_REACH_GROUP}"
    return reason


@cache
def _unsupported_on_sm90(what: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    reason = unsupported_reason(device, dtype, head_dim)
    if reason is None and capability_of(device.index or 0) != (9, 0):
        return f"{what} compute capability 9.0"
    return reason


def unsupported_backward(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the backward kernels cannot run on such tensors here, in a few words; None if they can."""
    return _unsupported_on_sm90("the backward kernels need", device, dtype, head_dim)


def unsupported_selection(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel that chooses key blocks cannot run on such tensors here, in a few words; None if it can. Other
    GPUs choose in PyTorch.
    """
    return _unsupported_on_sm90("the selection kernel needs", device, dtype, head_dim)
