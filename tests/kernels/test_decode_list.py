"""How decode attention shares its work (`cuda_src`, compiled for the host): every visible token once, in equal shares,
and the parts of a head where the merging CTA looks for them.
"""

import ctypes
import random

import numpy as np
import pytest
import torch

from elastic.kernels.attention_decode import visible_tokens
from tests.kernels.host import build

UNIT = 64


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return build("decode_list_host.cpp", tmp_path_factory.mktemp("host"))


def pointer(x: np.ndarray):
    return x.ctypes.data_as(ctypes.c_void_p)


def shares(host, spans: np.ndarray, ctas: int):
    """Visible tokens per head, and per CTA its items [n, 7] and their slots."""
    heads = spans.shape[1]
    counts, offset = np.zeros(heads, np.int32), np.zeros(heads + 1, np.int32)
    found = []
    for cta in range(ctas):
        out, slots = np.zeros((heads, 7), np.int32), np.zeros(heads, np.int32)
        n = host.items(*(pointer(row) for row in spans), heads, ctas, cta, *map(pointer, (counts, offset, out, slots)))
        found.append((out[:n].tolist(), slots[:n].tolist()))
    return counts, offset, found


def test_every_token_is_taken_once_in_equal_shares(host) -> None:
    rng = random.Random(0)
    for _ in range(300):
        heads, ctas = rng.choice((1, 2, 8, 31)), rng.choice((1, 2, 7, 132))
        end = [rng.choice((-3, 0, 1, 63, 64, 65, rng.randrange(300), rng.randrange(9000))) for _ in range(heads)]
        sink = [rng.choice((-1, 0, 4, 128)) for _ in range(heads)]
        begin = [rng.choice((-5, 0, 3, e - 64, e - 1, e, e + 9)) for e in end]
        counts, offset, found = shares(host, np.array([sink, begin, end], np.int32), ctas)
        seen = [len(visible_tokens(*span, torch.device("cpu"))) for span in zip(sink, begin, end, strict=True)]
        assert counts.tolist() == seen
        parts: dict[int, list] = {head: [] for head in range(heads)}
        for cta, (items, slots) in enumerate(found):
            for (head, first, last, whole, slot, of, number), expected in zip(items, slots, strict=True):
                assert whole == (number == 1) and of <= cta < of + number
                assert whole or slot == expected
                parts[head].append((cta, first, last, slot, of, number))
        for head, pieces in parts.items():
            assert [cta for cta, *_ in pieces] == list(range(pieces[0][4], pieces[0][4] + pieces[0][5]))
            edges = [0, *(last for _, _, last, *_ in pieces)]
            assert [first for _, first, *_ in pieces] == edges[:-1] and edges[-1] == seen[head]
        used = [item[4] for items, _ in found for item in items if not item[3]]
        assert len(used) == len(set(used)) and all(slot < 2 * ctas for slot in used)
        work = [sum(-(-(i[2] - i[1]) // UNIT) or 1 for i in items) for items, _ in found if items]
        assert sum(work) == offset[-1] and max(work) - min(work) <= 1
        assert len(work) == min(ctas, max(1, offset[-1] // 2))


def test_visible_tokens_are_found_in_their_places(host) -> None:
    for sink, begin, end in ((4, 10, 20), (4, 2, 20), (0, 5, 9), (8, -3, 6), (128, 200, 2048), (-2, -2, 3)):
        want = visible_tokens(sink, begin, end, torch.device("cpu")).tolist()
        assert [host.token(sink, begin, end, i) for i in range(len(want))] == want
