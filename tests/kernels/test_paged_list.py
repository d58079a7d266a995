"""Where the paged kernels look for tokens (`cuda_src`, compiled for the host), against tables drawn at random."""

import ctypes
import random

import numpy as np
import pytest

from elastic.kernels.paged_forward import box_tokens
from elastic.visibility import visible
from tests.kernels.host import build

HALF, NONE, STALE = 64, 0xFFFF, 2**31 - 1


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return build("paged_host.cpp", tmp_path_factory.mktemp("host"))


def pointer(x: np.ndarray):
    return x.ctypes.data_as(ctypes.c_void_p)


def random_table(rng: random.Random, lengths: list[int], size: int) -> np.ndarray:
    """Rows of shuffled page numbers; entries that no token needs name pages that do not exist."""
    needed = [-(-length // size) for length in lengths]
    pages = rng.sample(range(sum(needed) + 5), sum(needed))
    table = np.full((len(lengths), max(needed) + 3), STALE, np.int32)
    for row, count in zip(table, needed, strict=True):
        row[:count] = [pages.pop() for _ in range(count)]
    return table


def test_decoding_reads_the_visible_tokens_of_each_head_and_no_others(host) -> None:
    rng = random.Random(0)
    for _ in range(300):
        size, kv_heads, by_block = rng.choice((16, 32, 64, 128)), rng.choice((1, 2, 8)), rng.random() < 0.5
        block = rng.choice((16, 64, 128))
        sink = block * rng.randrange(3) if by_block else rng.choice((0, 1, 4, 100, 128))
        window = block * rng.randrange(1, 5) if by_block else rng.choice((1, 63, 65, 200, 2048, 1 << 30))
        lengths = [rng.choice((0, 1, size - 1, size, size + 1, rng.randrange(3000))) for _ in range(3)]
        table = random_table(rng, lengths, size)
        modes = np.array([[rng.choice((0, 1, 1, 7)) for _ in range(kv_heads)] for _ in lengths], np.int32)
        strides = [kv_heads * size * 32, kv_heads * 16, 16]  # pools [N, T, K, 128] in steps of 8 elements
        for head in range(modes.size):
            b, k = divmod(head, kv_heads)
            out = np.zeros(4096, np.uint32)
            count = host.decode_offsets(
                pointer(table), table.shape[1], size.bit_length() - 1, pointer(np.array(lengths, np.int32)),
                pointer(modes), kv_heads, head, *strides, table.shape[1] * size, sink, window, int(by_block), block,
                pointer(out),
            )  # fmt: skip
            token = np.arange(lengths[b])
            granule = "block" if by_block else "token"
            seen = visible(lengths[b] - 1, token, sink=sink, window=window, granule=granule, block=block)
            wanted = token[{0: token >= 0, 1: seen, 7: token < 0}[int(modes[b, k])]]
            places = table[b][wanted // size] * strides[0] + wanted % size * strides[1] + k * strides[2]
            assert sorted(out[:count].tolist()) == sorted(places.tolist())


def test_a_length_beyond_the_table_reads_no_further(host) -> None:
    table, out = np.arange(4, dtype=np.int32)[None].copy(), np.zeros(4096, np.uint32)
    lengths, modes = np.array([500], np.int32), np.zeros((1, 1), np.int32)
    count = host.decode_offsets(
        *(pointer(table), 4, 4, pointer(lengths), pointer(modes), 1, 0, 16, 1, 0, 64, 0, 1, 0, 128, pointer(out))
    )
    assert out[:count].tolist() == list(range(64))


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
def test_boxes_hold_the_tokens_of_their_half_blocks(host, size: int) -> None:
    """Each box lies in one page; row r of a block is token r of its halves; what no token fills is outside."""
    rng, box = random.Random(size), box_tokens(size)
    assert box == min(size, HALF)
    for _ in range(200):
        lengths = [rng.randrange(1, 2000) for _ in range(3)]
        table = random_table(rng, lengths, size)
        n = rng.randrange(3)
        halves = -(-lengths[n] // HALF)
        id0, id1 = rng.randrange(halves), rng.choice((NONE, rng.randrange(halves)))
        page, place = np.full(16, -7, np.int32), np.full(16, -7, np.int32)
        count = host.boxes(
            *(pointer(table), table.shape[1], size.bit_length() - 1, n, id0 | id1 << 16, HALF // box, lengths[n]),
            *(pointer(page), pointer(place)),
        )
        assert count * box == 2 * HALF and (place[:count] + box <= size).all()
        tokens = [np.arange(HALF) + i * HALF for i in (id0, id1)]
        for row, token in enumerate(np.concatenate(tokens)):
            at = row // box
            if token < lengths[n]:
                assert page[at] == table[n, token // size] and place[at] + row % box == token % size
            elif row % box == 0:
                assert page[at] == -1
        assert STALE not in page[:count]
