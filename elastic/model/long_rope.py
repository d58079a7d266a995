"""Models whose RoPE changes its factors at a length (longrope: Phi-3 and Phi-4): transformers begins a new cache there.

A prompt beyond that length is read into the cache that the call gave, which transformers would put aside. An answer
that crosses the length is refused: transformers would read prompt and answer again, for which the prompt's decision was
not made. Which factors a pass takes is told by its largest position, in whatever row that is, and a cache keeps those
of its prompt, also where rows are selected or tokens taken back.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from elastic.attention.layout import Layout
from elastic.attention.row_slice import RowSlice
from elastic.cache.keyword import cache_of, given
from elastic.protocols import CausalLM


def switch_lengths(config: Any) -> tuple[int, ...]:
    """The lengths up to which a backbone rotates by short factors, from the smallest; empty where the rotation is one
    for all lengths. Layers of different types may have one each.
    """
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    found = {
        int(part.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        for part in parts
        if part.get("rope_type") == "longrope"
    }
    return tuple(sorted(found))


def rotation(switches: tuple[int, ...], tokens: int) -> int:
    """Which factors rotate so many tokens: how many of the model's `switch_lengths` they cross."""
    return sum(tokens > switch for switch in switches)


def check_one_rotation(switches: tuple[int, ...], cached: int, tokens: int) -> None:
    """Raise ValueError where new tokens would be rotated by other factors than the cached ones.

    Args:
        switches: the model's `switch_lengths`.
        cached: `rotation` of the cached tokens.
        tokens: up to and with the new ones, in the longest row.
    """
    new = rotation(switches, tokens)
    if new > cached:
        switch = switches[cached]
        raise ValueError(
            f"new tokens, up to {tokens} in all, cross {switch}, where this model's RoPE takes its long factors, but "
            f"the cached ones were rotated by the short factors; ask for answers that end within {switch} tokens, or "
            "begin with a longer prompt"
        )
    if new < cached:
        raise ValueError(
            f"new tokens, up to {tokens} in all, end within {switches[new]}, where this model's RoPE takes its short "
            "factors, but the cached ones were rotated by the long factors (a longer row has left the batch, or tokens "
            "were taken back); start from an empty cache"
        )


def check_whole_rows(switches: tuple[int, ...], layout: Layout, row_slice: RowSlice) -> None:
    """Raise ValueError where processes that hold slices of a row would rotate by different factors."""
    longest = max((end - begin for begin, end in pairwise(layout.bounds)), default=layout.keys)
    if row_slice.size > 1 and rotation(switches, longest):
        raise ValueError(
            f"a sample of {longest} tokens crosses {switches[0]}, where this model's RoPE takes its long factors, but "
            "context parallelism leaves each process a slice of it, some of them before that length; train with DDP or "
            "FSDP"
        )


def tokens_by_position(positions: Tensor | None, layout: Layout) -> int | None:
    """Tokens up to and with the new ones, in the longest row, as RoPE counts them. None while a CUDA graph is captured,
    where nothing can be read back; who captures has checked.

    Args:
        positions: of the new tokens, as the decoder is given them; without, it counts columns.
    """
    if positions is None:
        return layout.keys
    if positions.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return int(positions.max()) + 1


class PrepareInputs:
    """A model's `prepare_inputs_for_generation` that keeps the cache it was given. Callable in place of the method;
    copies with its model.
    """

    def __init__(self, model: CausalLM, switches: tuple[int, ...]) -> None:
        part: Any = model
        self.switches, self.inner = switches, part.prepare_inputs_for_generation
        self.__wrapped__ = self.inner  # generate reads the signature

    def __call__(self, input_ids: Any, **options: Any) -> Any:
        """The inputs of one step of `generate`."""
        cache = cache_of(options)
        if cache is not None and (past := cache.get_seq_length()):
            columns = input_ids.shape[1]  # by which the model's own method would put the cache aside
            check_one_rotation(self.switches, rotation(self.switches, past), columns)
        return {**self.inner(input_ids, **options), **given(cache)}


def keep_cache(model: CausalLM, switches: tuple[int, ...]) -> None:
    """Put `PrepareInputs` before a model's own, where its RoPE changes."""
    if switches:
        part: Any = model
        part.prepare_inputs_for_generation = PrepareInputs(model, switches)


def keep_no_cache(model: CausalLM) -> None:
    """Undo `keep_cache`, whether or not it was called."""
    own = vars(model)
    if isinstance(own.get("prepare_inputs_for_generation"), PrepareInputs):
        before = own.pop("prepare_inputs_for_generation").inner
        if getattr(before, "__func__", None) is not getattr(type(model), "prepare_inputs_for_generation", None):
            own["prepare_inputs_for_generation"] = before  # somebody else's, from before
