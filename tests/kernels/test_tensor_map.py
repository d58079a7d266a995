"""What tensor maps describe, read from the arguments that the driver would get."""

import pytest
import torch

from elastic.kernels import jit, tensor_map
from elastic.kernels.params import strides_of


@pytest.fixture
def encoded(monkeypatch):
    """Calls of the driver: (address, sizes, byte strides, box); it refuses a box of 7 rows."""
    calls = []

    def encode(_map, _dtype, rank, address, sizes, strides, box, *_rest):
        calls.append((address, tuple(sizes), tuple(strides), tuple(box)))
        assert len(sizes) == rank == len(strides) + 1 == len(box)
        return int(7 in box)

    monkeypatch.setattr(tensor_map, "_encoder", lambda: encode)
    monkeypatch.setattr(jit, "bind_thread", lambda index: None)
    return calls


def test_tokens_of_a_head(encoded):
    x = torch.zeros(2, 9, 5, 64, dtype=torch.bfloat16)[:, :, 1:4]
    assert len(tensor_map.tensor_map(x, strides_of(x), 64)) == 128
    assert encoded == [(x.data_ptr(), (64, 9, 3, 2), (640, 128, 5760), (64, 64, 1, 1))]


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("tokens", [2, 5, 8, 15, 16, 17, 35, 64])
def test_phases_cover_every_token_once_and_stay_inside(encoded, stride, tokens):
    x = torch.zeros(2, tokens, 3, 64, dtype=torch.float16)
    tensor_map.phase_maps(x, strides_of(x), stride, 128)
    tail, found = tokens % stride, []
    for is_rest, (address, sizes, strides, box) in enumerate(encoded):
        assert sizes[0] == 64 and sizes[3:] == (3, 2) and box == (64, 1, 128, 1, 1)
        assert strides == (384, 384 * stride, 128, 384 * tokens)
        first = (address - x.data_ptr()) // 384
        reached = [first + phase + stride * cell for phase in range(sizes[1]) for cell in range(sizes[2])]
        assert max(reached) < tokens
        if not is_rest and tokens < stride:
            continue  # no whole cell: its phases lie past the end, the kernel clears what it loads for them
        assert first == (0 if is_rest else tail)
        found += reached
    assert sorted(found) == list(range(tokens)) and len(encoded) == (2 if tail else 1)


def test_a_refused_layout_is_named(encoded):
    x = torch.zeros(1, 9, 1, 64, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"refused shape \[1, 9, 1, 64\].*make the tensor contiguous"):
        tensor_map.tensor_map(x, strides_of(x), 7)
