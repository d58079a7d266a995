"""The keyword by which transformers hands on the KV cache: `past_key_values` before 5.24, `cache` since then."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache as once
from typing import Any

from transformers import __version__
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from elastic.protocols import KVCache

OLD, NEW = "past_key_values", "cache"


@once
def keyword() -> str:
    """The one that the installed transformers uses, for inputs and outputs.

    Raises:
        ValueError: it uses neither.
    """
    used = {field.name for field in fields(CausalLMOutputWithPast)}
    for name in (NEW, OLD):
        if name in used:
            return name
    raise ValueError(
        f"transformers {__version__} names the KV cache neither {NEW} nor {OLD}; install a version that the "
        "requirements of elastic-attention allow"
    )


def given(cache: KVCache | None) -> dict[str, Any]:
    """The keyword argument that hands a KV cache to a model, to its `generate` or to its output."""
    return {keyword(): cache}


def cache_of(kwargs: Mapping[str, Any], args: Sequence[Any] = ()) -> KVCache | None:
    """The KV cache among the arguments of a model, a layer or `generate`; None where there is none.

    The old name is read beside the new one, to which transformers renames it.

    Raises:
        ValueError: a cache in another place, where transformers or this project would not see it, or two of them.
    """
    name = keyword()
    known = (NEW, OLD) if name == NEW else (OLD,)
    other = [key for key, value in kwargs.items() if key not in known and isinstance(value, Cache)]
    other += [f"positional argument {place}" for place, value in enumerate(args) if isinstance(value, Cache)]
    if other:
        raise ValueError(
            f"a KV cache came as {', '.join(other)}, but transformers {__version__} takes it by the keyword {name}; "
            f"pass {name}=..."
        )
    if OLD in kwargs and name == NEW:
        if NEW in kwargs:
            raise ValueError(f"{NEW} and {OLD} are two names of one KV cache; pass {NEW}=... alone")
        name = OLD
    found: KVCache | None = kwargs.get(name)
    return found


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a layer with None for the KV cache, whatever its name; that of linear attention was another before
    transformers 5.24.
    """
    return {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
