"""Products of a few tokens with weights: the kernels against PyTorch, in the interpreter and on a GPU."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from elastic.kernels.token_products import (
    launch_gated,
    launch_products,
    token_gated,
    token_products,
    unsupported_tokens,
)
from tests.kernels.gpu import needs_gpu

SIZES = ((1, 64), (1, 96), (1, 3000), (1, 4096), (2, 128), (5, 640), (16, 256), (9, 384), (16, 8448))  # tokens, width


def cases(device: str, dtype: torch.dtype) -> Iterator[tuple[Tensor, list[Tensor], list[Tensor | None]]]:
    """Tokens, weights of several heights, and what is added: nothing, a bias, a residual."""
    generator = torch.Generator().manual_seed(0)
    for tokens, width in SIZES:
        shapes = ((tokens, width), (70, width), (3, width), (7, width), (3,), (tokens, 7))
        x, *weights, bias, residual = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
        yield x, weights, [None, bias, residual]


def expected(x: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
    """fp32."""
    product = x.float() @ weight.float().T
    return product if added is None else product + added.float()


def check(device: str, dtype: torch.dtype) -> None:
    """The kernels against fp32, as near as rounding once allows."""
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 2**-8, "atol": 1e-3}
    for x, weights, added in cases(device, dtype):
        for count in (1, 2, 3):
            found = launch_products(x, weights[:count], added[:count])
            for got, weight, more in zip(found, weights, added, strict=False):
                assert got.shape == (x.shape[0], weight.shape[0]) and got.dtype == dtype
                torch.testing.assert_close(got.float(), expected(x, weight, more), **tolerance)
        gate, up = weights[0] * x.shape[1] ** -0.5, weights[0].flip(0).contiguous()
        for name, act in (("silu", functional.silu), ("gelu", lambda t: functional.gelu(t, approximate="tanh"))):
            want = act(expected(x, gate, None)) * expected(x, up, None)
            torch.testing.assert_close(launch_gated(x, gate, up, name).float(), want, **tolerance)


def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    code = "import torch; from tests.kernels.test_token_products import check; check('cpu', torch.float32)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


def test_elsewhere_in_pytorch() -> None:
    for x, weights, added in cases("cpu", torch.float32):
        assert "NVIDIA" in str(unsupported_tokens(x, *weights))
        for got, weight, more in zip(token_products(x, weights, added), weights, added, strict=True):
            torch.testing.assert_close(got, expected(x, weight, more))
        gate, up = weights[0], weights[0].flip(0)
        want = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
        assert torch.equal(token_gated(x, gate, up, "silu"), want)


def test_what_does_not_fit_is_refused() -> None:
    x, weight = torch.ones(1, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match=r"x \[8\]"):
        token_products(torch.ones(8), [weight], [None])
    with pytest.raises(ValueError, match="do not belong together"):
        token_gated(x, weight, torch.ones(4, 7), "silu")
    with pytest.raises(ValueError, match="expected 1 to 3 of both"):
        token_products(x, [weight] * 4, [None] * 4)
    with pytest.raises(ValueError, match="'relu'"):
        token_gated(x, weight, weight, "relu")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    check("cuda", dtype)
    x, weight = torch.ones(1, 64, dtype=dtype, device="cuda"), torch.ones(8, 64, dtype=dtype, device="cuda")
    assert unsupported_tokens(x, weight) is None
    assert "65 numbers" in str(unsupported_tokens(torch.ones(1, 65, dtype=dtype, device="cuda"), weight))
    assert "17 tokens" in str(unsupported_tokens(x.expand(17, 64), weight))
    assert "multiple of 128" in str(unsupported_tokens(x.expand(2, 64), weight))
    assert "in rows" in str(unsupported_tokens(x, weight.T.contiguous().T))
