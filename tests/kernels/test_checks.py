"""Every argument that the operator refuses, and what it says: operands, pattern, metadata, what the kernels need."""

import pytest
import torch

from elastic.kernels import attention_forward, bits_from_mask
from elastic.kernels.checks import check_alignment, check_cuda, check_metadata, check_tensors
from elastic.kernels.params import Pattern, Ranges

SIZE = {"sink": 4, "window": 8, "granule": "token", "block": 64}


def operands(**change):
    """q [2, 40, 4, 64], k and v [2, 40, 2, 64], mode [2, 2]; some replaced."""
    shapes = {"q": (2, 40, 4, 64), "k": (2, 40, 2, 64), "v": (2, 40, 2, 64)}
    found = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return {**found, "mode": torch.zeros(2, 2, dtype=torch.int32), **change}


def ints(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"granule": "page"}, "granule='page'"),
        ({"window": 0}, "window=0"),
        ({"sink": -1}, "sink=-1"),
        ({"block": 0}, "block=0"),
        ({"granule": "block", "sink": 3}, "not multiples of block=64.*use sink=0 and window=64"),
        ({"granule": "block", "block": 48, "sink": 48, "window": 96}, "block=48 is not a power of two"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"scale": float("inf")}, "scale=inf"),
        ({"block": 32, "bits": ints(2, 4, 1, 1)}, "block=32 with block-sparse bits"),
        ({"begin_q": ints(3)}, r"begin_q is torch.int32 \[3\]"),
        ({"end_k": ints(2).long()}, r"end_k is torch.int64 \[2\]"),
        ({"row": ints(4)[::2]}, r"row is torch.int32 \[2\], expected contiguous"),
        ({"bits": ints(1)}, r"bits is torch.int32 \[1\].*\[2, 4, 1, 1\]"),
        ({"bits": ints(2, 4, 1, 1).long()}, "bits is torch.int64"),
        ({"bits": ints(2, 4, 0, 1), "begin_q": ints(2), "end_q": ints(2)}, r"bits is torch.int32 \[2, 4, 0, 1\]"),
        ({"bits": ints(2, 4, 2, 1), "begin_q": ints(2), "end_q": ints(2)}, r"bits is torch.int32 \[2, 4, 2, 1\]"),
        ({"q": torch.zeros(2, 40, 256)}, "do not belong together"),
        ({"v": torch.zeros(2, 39, 2, 64)}, "do not belong together"),
        ({"q": torch.zeros(3, 40, 4, 64)}, "do not belong together"),
        ({"q": torch.zeros(2, 40, 4, 32)}, "do not belong together"),
        ({"q": torch.zeros(2, 40, 5, 64)}, "5 query heads are not a multiple of 2 KV heads"),
        ({"q": torch.zeros(2, 40, 4, 64).half()}, "dtypes torch.float16, torch.float32, torch.float32"),
        ({"q": torch.zeros(2, 41, 4, 64)}, "41 queries and 40 keys"),
        ({"mode": ints(2, 2).long()}, "mode is torch.int64.*expected contiguous torch.int32"),
        ({"mode": ints(2, 4)[:, ::2]}, "expected contiguous"),
        ({"mode": ints(2, 3)}, r"expected contiguous torch.int32 \[N, 2\]"),
        ({"mode": ints(2)}, "mode is torch.int32"),
        ({"mode": ints(1, 2)}, "mode describes 1 samples but the batch has 2 rows; give row"),
        ({"mode": ints(513, 2), "row": ints(513)}, "513 samples of 2 KV heads; one launch takes at most 512"),
    ],
)
def test_the_operator_names_what_is_wrong(change: dict, message: str) -> None:
    arguments = {**operands(), **change}
    pattern = Pattern(**{**SIZE, **taken(arguments, Pattern)})
    ranges = Ranges(**taken(arguments, Ranges))
    with pytest.raises(ValueError, match=message):
        attention_forward(**arguments, pattern=pattern, ranges=ranges)


def taken(arguments: dict, kind: type) -> dict:
    """The fields of a `Pattern` or `Ranges`, out of the arguments."""
    return {name: arguments.pop(name) for name in kind._fields if name in arguments}


def test_devices_must_agree() -> None:
    q, k, v, mode = operands().values()
    with pytest.raises(ValueError, match="q, k, v lie on cpu, meta, cpu"):
        check_tensors(q, k.to("meta"), v)
    for name, values in (("mode", {"mode": mode.to("meta")}), ("bits", {"bits": ints(2, 4, 1, 1).to("meta")})):
        given = {"mode": mode, "bits": None, **values}
        with pytest.raises(ValueError, match=f"{name} lies on meta and q on cpu"):
            check_metadata(q, k, given["mode"], Ranges(), given["bits"], 64)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"q": torch.zeros(1, 8, 4, 64)}, "q is torch.float32 with head dim 64"),
        ({"q": torch.zeros(1, 8, 4, 96).half()}, "head dim 96"),
        ({"k": torch.empty(1, (1 << 22) + 1, 1, 64, dtype=torch.half, device="meta")}, "4194305 keys"),
        ({"q": torch.zeros(1, 8, 64, 4).half().transpose(2, 3)}, "q has strides .*use q.contiguous()"),
        ({"v": torch.zeros(1, 8, 2, 68).half()[..., :64]}, "v has strides .*multiples of 8 elements"),
    ],
)
def test_what_the_kernels_need_beyond_that(tensors: dict, message: str) -> None:
    given = {name: torch.zeros(1, 8, heads, 64).half() for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    with pytest.raises(ValueError, match=message):
        check_cuda(**{**given, **tensors})


def test_alignment() -> None:
    store = torch.zeros(4096, dtype=torch.half)
    start = (-store.data_ptr() % 16) // 2
    q = store[start : start + 512].view(1, 2, 4, 64)
    check_alignment(q, q, q)
    with pytest.raises(ValueError, match=r"q, k, v start \[0, 2, 0\] bytes past a 16-byte boundary"):
        check_alignment(q, store[start + 1 : start + 513].view(1, 2, 4, 64), q)


def test_good_arguments_pass_every_check() -> None:
    bits = bits_from_mask(torch.ones(2, 4, 1, 1))
    out, lse = attention_forward(
        **operands(), pattern=Pattern(**SIZE), ranges=Ranges(row=torch.arange(2, dtype=torch.int32)), bits=bits
    )
    assert out.shape == (2, 40, 4, 64) and lse.shape == (2, 4, 40)
    half = [x.half() for x in list(operands().values())[:3]]
    check_cuda(*half)
    check_alignment(*half)
