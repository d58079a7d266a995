"""One answer token by token, with the numbers of `model.generate`, so that answers may begin and end while others run.

Legend: S tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from elastic.cache.elastic_cache import ElasticCache
from elastic.data.prompts import EncodedPrompt, padded_spans
from elastic.inference.generate import new_cache
from elastic.model.attach import biased, user_wrote
from elastic.model.generation import judge, setting
from elastic.protocols import CausalLM


@dataclass(eq=False)
class Drawing:
    """How the tokens of one answer are drawn.

    Attributes:
        ids_1S: int64; the prompt and the answer so far.
        processors: what transformers does to logits [1, V] under the settings of the call and of the model.
        do_sample: draw at random; else the largest.
        generator: random numbers of a seeded answer; None: those of torch.
    """

    ids_1S: Tensor
    processors: Callable[[Tensor, Tensor], Tensor]
    do_sample: bool
    generator: torch.Generator | None

    def draw(self, logits_1V: Tensor) -> Tensor:
        """The next token, int64 [1, 1]."""
        scores = self.processors(self.ids_1S, logits_1V.to(torch.float32, copy=True))
        if self.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        self.ids_1S = torch.cat([self.ids_1S, token], -1)
        return token


def begin(
    model: CausalLM,
    prompt: EncodedPrompt,
    *,
    max_new_tokens: int,
    seed: int | None = None,
    sparsity_bias: float | None = None,
    **options: Any,
) -> tuple[Drawing, ElasticCache]:
    """Read a prompt and draw the answer's first token.

    Args:
        max_new_tokens: of the answer; the cache has room for as many.
        seed: of the answer's own random numbers, which are those after `torch.manual_seed(seed)`.
        sparsity_bias: for this prompt instead of the configuration's.
        **options: of `model.generate`.

    Raises:
        ValueError: settings, also the model's own, under which tokens are not made one by one.
    """
    judge(model, options)
    if (setting(model, options, "num_beams") or 1) != 1:
        raise ValueError("the generation config asks for beams, which are not made token by token; set num_beams=1")
    ids, cache = torch.tensor([prompt.ids], device=model.device), new_cache(model, max_new_tokens)
    prepare = cast(Any, model.generate).inner  # `generate` refuses foreign decoding methods; this one keeps the routes
    with biased(model, sparsity_bias), user_wrote(model, padded_spans([prompt], torch.device("cpu"))):
        drawing, logits = prepare(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=max_new_tokens,
            custom_generate=_read, stop_strings=None, **options,
        )  # fmt: skip
    if seed is not None:
        drawing.generator = torch.Generator(model.device).manual_seed(seed)
    drawing.draw(logits)
    return drawing, cache


def _read(
    model: Any, input_ids: Tensor, logits_processor: Any, generation_config: Any, **inputs: Any
) -> tuple[Drawing, Tensor]:
    """A decoding method of transformers, called with all that its own are: reads the prompt and makes no token.

    Returns:
        How tokens are drawn, and the logits [1, V] of the first.
    """
    del inputs["stopping_criteria"]  # whoever asks for tokens decides when they are enough
    found = model._prefill(input_ids, generation_config, inputs)
    return Drawing(input_ids, logits_processor, generation_config.do_sample, None), found.logits[:, -1]
