"""Prompts that `generate` reads in pieces (`prefill_chunk_size`; docs/design.md section 7).

The loop is this project's own: transformers 5.17 reads the cached tokens of a later turn once more, and assisted
decoding reads prompts whole in every release.
"""

from typing import Any

from torch import Tensor

from elastic.cache.keyword import cache_of
from elastic.model.long_rope import rotation
from elastic.model.pass_state import AttachedState, reading


class Prefill:
    """A model's `_prefill` that says which passes are pieces of one prompt. Callable in place of the method; copies
    with its model.
    """

    def __init__(self, model: Any, state: AttachedState) -> None:
        self.model, self.state, self.inner = model, state, model._prefill

    def __call__(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **options: Any) -> Any:
        """The model's output after the last piece.

        Raises:
            ValueError: no cache, or a prompt whose pieces RoPE would rotate by different factors.
        """
        size, cache = generation_config.prefill_chunk_size, cache_of(model_kwargs)
        if size is None:
            return self.inner(input_ids, generation_config, model_kwargs, **options)
        if cache is None:
            raise ValueError(f"prefill_chunk_size={size} needs a KV cache, which keeps what the pieces decide by")
        past, mask = int(cache.get_seq_length()), model_kwargs.get("attention_mask")
        told = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        new = input_ids[:, past:] if told in (None, input_ids.shape[1]) else input_ids
        end = past + new.shape[1]
        self._check_rotation(min(past + size, end), end, size)
        with reading(self.state, end):
            for piece in new.split(size, dim=1):
                past += piece.shape[1]
                output = self.model(**self._inputs(piece, end - past, model_kwargs, options), return_dict=True)
        return output

    def _inputs(self, piece: Tensor, left: int, model_kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
        """The model's inputs of a piece after which so many tokens of the prompt are left."""
        cut = {
            name: given[..., : given.shape[-1] - left]
            for name in ("attention_mask", "position_ids", "token_type_ids")
            if (given := model_kwargs.get(name)) is not None
        }
        return self.model.prepare_inputs_for_generation(
            piece, **{"is_first_iteration": True, **options, **model_kwargs, **cut}
        )

    def _check_rotation(self, first: int, end: int, size: int) -> None:
        switches = self.state.rope_switches
        if switches and rotation(switches, first) != rotation(switches, end):
            raise ValueError(
                f"prefill_chunk_size={size}: a prompt of {end} tokens in pieces crosses {switches[0]}, where this "
                "model's RoPE takes its long factors, by which its first pieces would not be rotated; read it in one "
                "pass"
            )
