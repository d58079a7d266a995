"""What a launch over pages tells the kernels, followed on the CPU from the packed bytes and tensor maps to the memory
that they would read (`cuda_src`'s own arithmetic, compiled for the host).
"""

import ctypes
import random

import numpy as np
import pytest
import torch

from elastic.kernels import jit, paged_decode, paged_forward, tensor_map
from elastic.kernels.devices import decode_config
from elastic.kernels.params import PAGED_BYTES
from elastic.visibility import visible
from tests.kernels.gpu_paged import PagedProblem, random_paged
from tests.kernels.host import build

HALF, NONE, H200 = 64, 0xFFFF, ((9, 0), 132, 232_448)
DECODE, FORWARD = (paged_decode.__globals__, paged_forward.__globals__)  # the modules, which the operators hide


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    library = build("paged_host.cpp", tmp_path_factory.mktemp("host"))
    library.key_address.restype = ctypes.c_uint64
    return library


@pytest.fixture
def launched(monkeypatch):
    """Packed parameters of the launches, and the tensor maps encoded: (address, sizes, byte strides, box)."""
    packed, maps = [], []

    def encode(_map, _dtype, _rank, address, sizes, strides, box, *_rest):
        maps.append((address, tuple(sizes), tuple(strides), tuple(box)))
        return 0

    kept = torch.zeros(4096, dtype=torch.int32)

    def zeros(*_):
        return kept

    monkeypatch.setattr(jit, "launch", lambda kernel, grid, threads, params, *_: packed.append(params))
    monkeypatch.setattr(jit, "load_kernel", lambda *_: None)
    monkeypatch.setattr(jit, "bind_thread", lambda _: None)
    monkeypatch.setattr(jit, "current_stream", lambda _: 0)
    monkeypatch.setattr(jit, "capture_id", lambda _: 0)
    monkeypatch.setattr(tensor_map, "_encoder", lambda: encode)
    monkeypatch.setitem(DECODE, "arrivals", zeros)
    monkeypatch.setitem(FORWARD, "tile_counter", zeros)
    monkeypatch.setitem(FORWARD, "_first_rows", zeros)
    return packed, maps


def bytes_at(address: int, count: int) -> bytes:
    return ctypes.string_at(address, count)


def row_bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.int16).numpy().tobytes()


def pointer(x: np.ndarray):
    return x.ctypes.data_as(ctypes.c_void_p)


def visible_tokens(p: PagedProblem, n: int, head: int) -> torch.Tensor:
    length = int(p.lengths[n])
    token = torch.arange(length)
    if p.mode[n, head] == 0 or length == 0:
        return token
    sizes = {"sink": p.pattern.sink, "window": p.pattern.window, "granule": p.pattern.granule, "block": p.pattern.block}
    return token[visible(torch.tensor(length - 1), token, **sizes)]


@pytest.mark.parametrize("seed", range(25))
def test_decoding_reads_the_rows_of_the_visible_tokens(host, launched, seed: int) -> None:
    p = random_paged(seed, decode=True, device="cpu", longest=600)
    out, (requests, kv_heads), dim = torch.empty(p.q.shape, dtype=p.q.dtype), p.mode.shape, p.q.shape[2]
    group = p.q.shape[1] // kv_heads
    config = decode_config(*H200, dim, group, p.mode.numel())
    DECODE["launch_paged_decode"](out, p.q, *p.clean, p.table, p.lengths, p.mode, p.pattern, config)
    (params,), size = launched[0], p.clean[0].shape[1]
    for n in range(requests):
        for k in range(kv_heads):
            keys, values, rows = np.zeros(4096, np.uint64), np.zeros(4096, np.uint64), np.zeros(4, np.uint64)
            rows[3] = dim
            count = host.decode_addresses(params, n * kv_heads + k, pointer(keys), pointer(values), pointer(rows))
            token = visible_tokens(p, n, k)
            assert count == len(token)
            page, place = p.table[n].long()[token // size], token % size
            for pool, addresses in zip(p.clean, (keys, values), strict=True):
                want = {row_bytes(row) for row in pool[page, place, k]}
                assert {bytes_at(int(a), 2 * dim) for a in addresses[:count]} == want
            assert rows[0] == p.q[n, k * group].data_ptr() and rows[1] == 2 * p.q.stride(1)
            assert rows[2] == out[n, k * group].data_ptr()


def box_of(found: tuple, d: int, token: int, head: int, row: int) -> list[bytes]:
    """Rows of the box that TMA would load at these coordinates: zeros outside of the map."""
    address, (_, tokens, heads, rows), (by_token, by_head, by_row), (columns, count, _, _) = found
    inside = 0 <= head < heads and 0 <= row < rows
    start = address + head * by_head + row * by_row + 2 * d
    return [
        bytes_at(start + t * by_token, 2 * columns) if inside and 0 <= t < tokens else bytes(2 * columns)
        for t in range(token, token + count)
    ]


@pytest.mark.parametrize("seed", range(25))
def test_the_forward_pass_loads_the_keys_and_values_of_its_half_blocks(host, launched, seed: int) -> None:
    p, rng = random_paged(seed, decode=False, device="cpu", longest=400), random.Random(seed)
    out, lse = torch.empty(p.q.shape, dtype=p.q.dtype), torch.empty(p.q.shape[1], p.q.shape[0])
    (requests, kv_heads), dim, size = p.mode.shape, p.q.shape[2], p.clean[0].shape[1]
    config = FORWARD["paged_config"]((9, 0), 132, dim, requests, 9, size)
    plan = FORWARD["prepare_paged"](p.q, *p.clean, out, p.table, p.mode, p.pattern, config)
    FORWARD["launch_paged"](out, lse, p.q, *p.clean, p.table, p.starts, p.lengths, p.mode, plan)
    ((params,), (map_q, *maps_kv, map_o)), box = launched, min(size, HALF)
    assert len(params) == PAGED_BYTES and config.macros == (f"ELASTIC_PAGED={box}",)
    assert map_q[0] == p.q.data_ptr() and map_o[0] == out.data_ptr() and map_q[3][1] == 128
    for n in range(requests):
        found = np.zeros(6, np.int32)
        head, length = rng.randrange(kv_heads), int(p.lengths[n])
        host.sample_of(params, n, head, pointer(found))
        begin, end = p.starts[n : n + 2].tolist()
        assert found.tolist() == [0, begin, 0, end - begin, length, int(p.mode[n, head])]
        first, second = rng.randrange(-(-length // HALF)), rng.choice((NONE, rng.randrange(-(-length // HALF))))
        page, place = np.zeros(8, np.int32), np.zeros(8, np.int32)
        count = host.boxes_of(params, n, first | second << 16, HALF // box, pointer(page), pointer(place))
        tokens = [i * HALF + r for i in (first, second) for r in range(HALF)]
        for pool, of_map in zip(p.clean, maps_kv, strict=True):
            for d in range(0, dim, 64):
                rows = [row for i in range(count) for row in box_of(of_map, d, int(place[i]), head, int(page[i]))]
                for token, row in zip(tokens, rows, strict=True):
                    if token < length:
                        want = pool[int(p.table[n, token // size]), token % size, head, d : d + 64]
                        assert row == row_bytes(want)
                    elif token // size * size >= length:
                        assert row == bytes(128)
        token = rng.randrange(length)
        want = p.clean[0][int(p.table[n, token // size]), token % size, head]
        assert host.key_address(params, n, head, token) == want.data_ptr()
