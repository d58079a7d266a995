"""The block arithmetic of `cuda_src` (compiled for the host) against brute force over the visibility rule."""

import ctypes
import random

import numpy as np
import pytest

from elastic.visibility import visible
from tests.kernels.host import build

HALF = 64


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return build("block_range_host.cpp", tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def visited(host):
    return host.visited


def walk(visited, mode, pattern, m0, m1, delta, words=None):
    ids, flags = np.full(4096, -7, np.int32), np.full(4096, -7, np.int32)
    bits = None if words is None else words.ctypes.data_as(ctypes.c_void_p)
    count = visited(mode, *pattern, m0, m1, delta, bits, ids.ctypes.data_as(ctypes.c_void_p),
                    flags.ctypes.data_as(ctypes.c_void_p))  # fmt: skip
    return ids[:count], flags[:count].astype(bool)


def check(ids, flags, mask, exact):
    """Descending ids without repeats, every needed block, a flag wherever a row must not see a key."""
    assert (np.diff(ids) < 0).all()
    half = [mask[:, i * HALF : (i + 1) * HALF] for i in range(-(-mask.shape[1] // HALF))]
    needed = [i for i, block in enumerate(half) if block.any()]
    assert set(needed) <= set(ids.tolist())
    if exact:
        assert set(needed) == set(ids.tolist())
    for i, flagged in zip(ids, flags, strict=True):
        partial = half[i].shape[1] < HALF or not half[i].all()
        assert flagged >= partial


def test_streaming_and_full(visited) -> None:
    rng = random.Random(0)
    for _ in range(1500):
        len_q = rng.choice((1, 2, 64, 65, 128, 129, 200, 500))
        delta = rng.choice((0, 0, 1, 17, 64, 333))
        by_block = rng.random() < 0.5
        block = rng.choice((16, 64, 128))
        sink = block * rng.randrange(3) if by_block else rng.choice((0, 1, 64, 100, 128))
        window = block * rng.randrange(1, 5) if by_block else rng.choice((1, 63, 64, 65, 200, 2048))
        mode, m0 = rng.randrange(2), 128 * rng.randrange(-(-len_q // 128))
        m1 = min(m0 + 128, len_q)
        a, j = np.arange(m0, m1)[:, None] + delta, np.arange(len_q + delta)[None]
        granule = "block" if by_block else "token"
        mask = visible(a, j, sink=sink, window=window, granule=granule, block=block) if mode else j <= a
        ids, flags = walk(visited, mode, (sink, window, int(by_block), block), m0, m1, delta)
        check(ids, flags, mask, exact=True)


def test_bitmask(visited) -> None:
    rng = np.random.default_rng(0)
    for _ in range(800):
        len_q, delta, block = int(rng.integers(1, 700)), int(rng.choice((0, 5, 64, 3000))), int(rng.choice((64, 128)))
        m0 = 128 * int(rng.integers(0, -(-len_q // 128)))
        m1 = min(m0 + 128, len_q)
        words = rng.integers(0, 1 << 32, -(-(len_q + delta) // (32 * block)), dtype=np.uint32)
        words[rng.random(words.shape) < 0.4] = 0
        chosen = (words[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(bool).ravel()
        a, j = np.arange(m0, m1)[:, None] + delta, np.arange(len_q + delta)[None]
        ids, flags = walk(visited, 2, (0, 1, 0, block), m0, m1, delta, words)
        check(ids, flags, (j <= a) & chosen[j // block], exact=True)
        assert all(chosen[i * HALF // block] for i in ids)


def test_backward_walks_the_transpose(host) -> None:
    """Every (query tile, key block) with a visible pair is met, from the keys' side, and no other; the mask runs where
    a pair is hidden; and the number of earlier key blocks of the same query tile is right.
    """
    rng = random.Random(1)
    pointer = ctypes.c_void_p
    for _ in range(1000):
        len_q, delta = rng.choice((1, 2, 64, 65, 128, 129, 200, 500)), rng.choice((0, 1, 17, 64, 333))
        tile = rng.choice((64, 128))
        by_block, block = rng.random() < 0.5, rng.choice((16, 64, 128))
        sink = block * rng.randrange(3) if by_block else rng.choice((0, 1, 64, 100, 128))
        window = block * rng.randrange(1, 5) if by_block else rng.choice((1, 63, 64, 65, 200, 2048))
        mode, keys = rng.randrange(2), len_q + delta
        a, j = np.arange(delta, keys)[:, None], np.arange(keys)[None]
        granule = "block" if by_block else "token"
        mask = visible(a, j, sink=sink, window=window, granule=granule, block=block) if mode else j <= a
        tiles, earlier = -(-len_q // tile), np.zeros(-(-len_q // tile), int)
        for n in range(-(-keys // 128)):
            k0, k1 = 128 * n, min(128 * n + 128, keys)
            found, flags, before = (np.full(size, -7, np.int32) for size in (2, tiles, tiles))
            host.met(mode, sink, window, int(by_block), block, k0, k1, len_q, delta, tile,
                     *(x.ctypes.data_as(pointer) for x in (found, flags, before)))  # fmt: skip
            for m in range(tiles):
                part = mask[m * tile : (m + 1) * tile, k0:k1]
                assert part.any() == (found[0] <= m < found[1])
                if part.any():
                    assert before[m] == earlier[m]
                    assert flags[m] >= (not part.all())
                    earlier[m] += 1
