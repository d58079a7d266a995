"""Models whose RoPE changes its factors at a length (longrope: Phi-3 and Phi-4): transformers begins a new cache there.

A prompt beyond that length is read into the cache that the call gave, which transformers would put aside. An answer
that crosses the length is refused: transformers would read prompt and answer again, for which the prompt's decision was
not made.
"""

from typing import Any

from elastic.protocols import CausalLM


def switch_length(config: Any) -> int | None:
    """The most tokens that a backbone rotates by its short factors; None where the rotation is one for all lengths."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)


def check_one_rotation(switch: int, past: int, keys: int) -> None:
    """Raise ValueError where new tokens would be rotated by other factors than the cached ones.

    Args:
        switch: the model's `switch_length`.
        past, keys: tokens before and after this pass.
    """
    if 0 < past <= switch < keys:
        raise ValueError(
            f"new tokens, up to {keys} in all, cross {switch}, where this model's RoPE takes its long factors, but the "
            f"{past} cached ones were rotated by the short factors; ask for answers that end within {switch} tokens, "
            "or begin with a longer prompt"
        )


class PrepareInputs:
    """A model's `prepare_inputs_for_generation` that keeps the cache it was given. Callable in place of the method;
    copies with its model.
    """

    def __init__(self, model: CausalLM, switch: int) -> None:
        part: Any = model
        self.switch, self.inner = switch, part.prepare_inputs_for_generation
        self.__wrapped__ = self.inner  # generate reads the signature

    def __call__(self, input_ids: Any, past_key_values: Any = None, **options: Any) -> Any:
        """The inputs of one step of `generate`."""
        if past_key_values is not None:
            check_one_rotation(self.switch, past_key_values.get_seq_length(), input_ids.shape[1])
        found = self.inner(input_ids, past_key_values=past_key_values, **options)
        return {**found, "past_key_values": past_key_values}


def keep_cache(model: CausalLM, switch: int | None) -> None:
    """Put `PrepareInputs` before a model's own, where its RoPE changes."""
    if switch is not None:
        part: Any = model
        part.prepare_inputs_for_generation = PrepareInputs(model, switch)


def keep_no_cache(model: CausalLM) -> None:
    """Undo `keep_cache`, whether or not it was called."""
    own = vars(model)
    if isinstance(own.get("prepare_inputs_for_generation"), PrepareInputs):
        before = own.pop("prepare_inputs_for_generation").inner
        if getattr(before, "__func__", None) is not getattr(type(model), "prepare_inputs_for_generation", None):
            own["prepare_inputs_for_generation"] = before  # somebody else's, from before
