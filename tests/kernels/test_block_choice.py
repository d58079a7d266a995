"""What FlexPrefill and FlashPrefill choose by: the kernels against their PyTorch twins in fp64, in the interpreter and
on a GPU. Every sample is a slice of packed rows whose other tokens are not numbers, and outputs begin as such.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from elastic.attention.selection import flashprefill, flexprefill, pooling
from elastic.attention.selection.sample import AttentionSample
from elastic.config import SparseConfig
from elastic.kernels.block_choice import (
    launch_block_scores,
    launch_covering,
    launch_lines,
    unsupported_choice,
    unsupported_covering,
)
from tests.kernels.gpu import needs_gpu

# Queries, earlier keys, KV heads, query heads of each, block, head dim.
SIZES = (
    (1, 0, 1, 1, 128, 64), (7, 3, 1, 2, 64, 64), (127, 0, 2, 1, 128, 128), (129, 65, 1, 2, 64, 64),
    (300, 0, 2, 2, 128, 64), (385, 70, 1, 4, 64, 128), (512, 129, 1, 1, 128, 64), (1031, 0, 1, 2, 128, 128),
)  # fmt: skip
LONG = ((4099, 0, 2, 4, 128, 128), (5000, 3333, 2, 2, 64, 64), (130, 70000, 1, 3, 128, 128))


def packed(length: int, heads: int, dim: int, device: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Random rows [heads, length, dim] of a tensor [tokens, heads, dim] that is NaN before and after them."""
    rows = 2 * torch.randn(length, heads, dim, generator=torch.Generator().manual_seed(seed))
    whole = torch.full((length + 200, heads, dim), float("nan"), device=device, dtype=dtype)
    whole[100:-100] = rows.to(device, dtype)
    return whole[100:-100].transpose(0, 1)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that a launch allocates and leaves empty is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_scores(device: str, dtype: torch.dtype, sizes: tuple[tuple[int, ...], ...]) -> None:
    """Block scores and lines of samples of these sizes."""
    for seed, (length, past, kv_heads, group, block, dim) in enumerate(sizes):
        q = packed(length, kv_heads * group, dim, device, dtype, seed)
        k = packed(length + past, kv_heads, dim, device, dtype, seed + 100)
        sparse, scale = SparseConfig(route1="flashprefill", block=block, sink=block, window=block), dim**-0.5
        wide = AttentionSample(q.double(), k.double(), sparse, scale)
        means = pooling.run_means(k, block).to(dtype)
        scored = max(0, wide.firsts.shape[0] - flashprefill.LAST_FULL)
        with poisoned():
            scores = launch_block_scores(q, means, past, block, scored, scale)
            lines = launch_lines(q[:, -block:], k, scale)
        expected = torch.full(scores.shape, float("-inf"), dtype=torch.float64, device=device)
        if scored:
            width = (past + scored * wide.rows) // block
            of_blocks = flashprefill._block_scores(wide, 0, scored, means[:, :width].double())
            expected[:, :scored, :width] = of_blocks
        torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=2e-5)
        expected = flexprefill._lines(wide, wide.q_HLD[:, -block:])
        torch.testing.assert_close(lines.double(), expected, rtol=1e-4, atol=1e-7)
        assert lines.is_contiguous()


def check_covering(device: str, lengths: tuple[int, ...]) -> None:
    """Rows whose sums are exact in any order, and what only the sums' rounding may change otherwise."""
    generator = torch.Generator().manual_seed(0)
    for length in lengths:
        mass = torch.rand(8, length, generator=generator) ** 8
        exact = (mass * 2**8).round() / 2**8
        exact[0], exact[1, length // 2 :], exact[2] = 0.25, 0.0, 0.0
        need = exact.double().sum(-1) * torch.tensor([0.5, 0.9, 0.5, 0.0, 1.0, 0.05, 0.95, 2.0], dtype=torch.double)
        found = [x.cpu() for x in launch_covering(exact.to(device), need.float().to(device))]
        wanted = pooling._halve(exact.double(), need.float().double())
        assert all(torch.equal(got.double(), want.double()) for got, want in zip(found, wanted, strict=True))
        need = (0.9 * mass.double().sum(-1)).float()
        cut, held, equal = (x.cpu().double() for x in launch_covering(mass.to(device), need.to(device)))
        above = torch.where(mass > cut, mass, 0.0).double().sum(-1, keepdim=True)
        torch.testing.assert_close(held, above, rtol=1e-6, atol=0)
        assert torch.equal(equal, (mass == cut).double().sum(-1, keepdim=True))
        assert (held < need[:, None]).all() and (above + equal * cut >= need[:, None] * (1 - 1e-6)).all()


@pytest.mark.parametrize(
    "check",
    [
        "check_scores('cpu', torch.float32, SIZES)",
        "check_scores('cpu', torch.float16, SIZES)",  # the interpreter multiplies no bf16
        "check_covering('cpu', (1, 77, 9001))",
    ],
)
def test_in_the_interpreter(check: str) -> None:
    pytest.importorskip("triton")
    try:
        int(np.ones(1))
    except TypeError:
        pytest.skip("Triton's interpreter reads the bounds of loops in a way that this NumPy refuses")
    code = f"import torch; from tests.kernels.test_block_choice import *; {check}"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


def test_elsewhere_in_pytorch() -> None:
    x = torch.ones(1, 4, 64)
    assert "NVIDIA" in str(unsupported_choice(x, x, 64)) and "NVIDIA" in str(unsupported_covering(x[0]))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_on_a_gpu(dtype: torch.dtype) -> None:
    check_scores("cuda", dtype, SIZES + LONG)


@pytest.mark.gpu
@needs_gpu
def test_covering_on_a_gpu() -> None:
    check_covering("cuda", (1, 77, 8192, 9001, 300000))


@pytest.mark.gpu
@needs_gpu
def test_what_the_kernels_take() -> None:
    x = torch.ones(1, 4, 64, dtype=torch.bfloat16, device="cuda")
    assert unsupported_choice(x, x, 64) is None and unsupported_covering(x[0].float()) is None
    for q, k, block in ((x.float(), x.float(), 64), (x, x.half(), 64), (x, x, 32), (x[..., :32], x[..., :32], 64)):
        assert "kernels take" in str(unsupported_choice(q, k, block))
    assert "fp32" in str(unsupported_covering(x[0].double()))
