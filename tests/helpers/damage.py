"""Strategies of Hypothesis that damage a good document: its values, or its bytes; and what a refusal must be like."""

import copy
import json
import os
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

# A fixed sample in the suite; ELASTIC_EXAMPLES=2000 draws so many, and other ones every time.
EXAMPLES = os.environ.get("ELASTIC_EXAMPLES")


def examples(usual: int) -> settings:
    """Settings of a property that looks at so many examples in the suite."""
    return settings(max_examples=int(EXAMPLES or usual), derandomize=EXAMPLES is None, deadline=None)


NUMBERS = st.sampled_from([0, 1, -1, 2, 4, 7, 10**6, 2**63, 10**400, 0.0, 0.5, -0.5, 1e308, float("nan"), float("inf")])
TEXTS = st.sampled_from(["", "0", "full", "tiny", "../x", "a\nb", "é", "\x00", "x" * 300])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a document of dicts and lists."""
    found = []
    keys = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(keys):
        found.append((document, key))
        if isinstance(value, dict | list):
            found += places(value)
    return found


@st.composite
def damaged(draw: Callable[..., Any], document: Any, most: int = 2) -> Any:
    """The document with one or a few values replaced, left out, moved or added."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        found = places(changed)
        if not found:
            return draw(VALUES)
        container, key = draw(st.sampled_from(found))
        act = draw(st.sampled_from(["replace", "replace", "drop", "swap", "add"]))
        if act == "replace":
            container[key] = draw(VALUES)
        elif act == "drop":
            del container[key]
        elif act == "swap":
            other, place = draw(st.sampled_from(found))
            container[key] = copy.deepcopy(other[place])
        elif isinstance(container, dict):
            container[draw(TEXTS)] = draw(VALUES)
        else:
            container.insert(key, draw(VALUES))
    return changed


@st.composite
def cut_bytes(draw: Callable[..., Any], data: bytes) -> bytes:
    """The bytes cut, with one other, or with some more."""
    place = draw(st.integers(0, len(data) - 1))
    more = draw(st.sampled_from([b"\xff", b"\x00", b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\n", b"\xef\xbb\xbf"]))
    before, after = data[:place], data[place:]
    return draw(st.sampled_from([before, before + more[:1] + after[1:], before + more + after]))


def files_of(document: Any) -> st.SearchStrategy[bytes]:
    """Bytes of JSON files that a good document was before it was damaged."""
    good = json.dumps(document, indent=1).encode()
    as_text = damaged(document).map(lambda changed: json.dumps(changed, indent=1).encode("utf-8", "surrogatepass"))
    return as_text | cut_bytes(good)


def refusal(error, *named):
    """The message of an error, one line that names what is wrong."""
    message = str(error)
    assert message and "\n" not in message, message
    assert all(str(name) in message for name in named), message
    return message
