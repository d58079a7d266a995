"""Names of sources: a generator or data set, then, where a mixture has several of one, the length of its samples in
tokens and the system prompt before them: `foreign_code-2048-long`.
"""

import re

_ENDING = re.compile(r"-(\d+)(-(none|short|long))?$")


def generator_of(source: str) -> str:
    """`needle_single` of `needle_single-4096`."""
    return source.partition("-")[0]


def kind_of(source: str) -> str:
    """`foreign_code` of `foreign_code-2048-long`: the name without length and system prompt."""
    return _ENDING.sub("", source)


def length_of(source: str) -> int | None:
    """2048 of `foreign_code-2048-long`; None of a source whose name has no length."""
    found = _ENDING.search(source)
    return int(found[1]) if found else None
