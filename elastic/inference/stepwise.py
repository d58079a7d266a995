"""Answers token by token, with the numbers of `model.generate`, so that they may begin and end while others run.

Prompts that are read in one pass are its left-padded rows, each with its own routes.
Legend: B rows, S tokens, V vocabulary.
"""

import marshal
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import logits_process as known

from elastic.attention.layout import sent
from elastic.cache.elastic_cache import ElasticCache
from elastic.cache.keyword import given
from elastic.cache.kv_pool import upload
from elastic.data.prompts import EncodedPrompt, left_pad, padded_spans
from elastic.inference.generate import new_cache
from elastic.model.attach import biased, handle_of, user_wrote
from elastic.model.generation import judge, setting
from elastic.model.pass_state import masked
from elastic.protocols import CausalLM

# Releases of transformers before 5.24 warn of ids on the host, which `_read` sends to the model itself.
warnings.filterwarnings("ignore", r"You are calling \.generate\(\) with the `input_ids`.* is on cpu, ", UserWarning)


@dataclass(frozen=True)
class Asked:
    """An answer that is asked for.

    Attributes:
        prompt: in tokens.
        max_new_tokens: of the answer; the cache has room for as many, whatever is asked for beside it.
        seed: of the answer's own random numbers, which are those after `torch.manual_seed(seed)`.
        options: of `model.generate`.
    """

    prompt: EncodedPrompt
    max_new_tokens: int
    seed: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Drawing:
    """How the tokens of one answer are drawn.

    Attributes:
        ids_1S: int64; the prompt and the answer so far, which the processors read; None where none of them does.
        processors: a list, what transformers does to logits [1, V] under the settings of the call and of the model.
        do_sample: draw at random; else the largest.
        generator: random numbers of a seeded answer; None: those of torch.
    """

    ids_1S: Tensor | None
    processors: Any
    do_sample: bool
    generator: torch.Generator | None

    @property
    def plain(self) -> bool:
        """Whether the next token is that of the largest logit, whatever came before."""
        return not self.do_sample and not self.processors

    def draw(self, logits_RV: Tensor) -> Tensor:
        """The next token, int64 [R, 1]: of this answer, or, where nothing before counts, of R that are drawn alike."""
        scores = self.processors(self.ids_1S, logits_RV.to(torch.float32, copy=True))
        if self.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1, generator=self.generator)
        else:
            token = scores.argmax(-1, keepdim=True)
        if self.ids_1S is not None:
            self.ids_1S = torch.cat([self.ids_1S, token], -1)
        return token


def draw_each(drawings: Sequence[Drawing], logits_BV: Tensor) -> Tensor:
    """The next token of every row, int64 [B, 1]; those of plain rows at once, and so those of rows whose processors are
    the same and look at their logits alone.
    """
    token_B1, alike = logits_BV.argmax(-1, keepdim=True), dict[int, list[int]]()
    for at, drawing in enumerate(drawings):
        if drawing.ids_1S is None and drawing.generator is None and not drawing.plain:
            alike.setdefault(id(drawing.processors), []).append(at)
        elif not drawing.plain:
            token_B1[at] = drawing.draw(logits_BV[at : at + 1])[0]
    for rows in alike.values():
        index = upload(rows, logits_BV.device)
        token_B1.index_copy_(0, index, drawings[rows[0]].draw(logits_BV.index_select(0, index)))
    return token_B1


def begin(
    model: CausalLM,
    asked: Sequence[Asked],
    sparsity_bias: float | None = None,
    prefill_chunk_size: int | None = None,
) -> tuple[list[Drawing], Tensor, ElasticCache]:
    """Read prompts together and draw the first token of each answer.

    Args:
        sparsity_bias: for these prompts instead of the configuration's.
        prefill_chunk_size: tokens that are read at a time; None: as the model's generation config says.

    Returns:
        How the tokens of each answer are drawn, the first ones, int64 [B, 1], and the cache of all rows.

    Raises:
        ValueError: settings, also the model's own, under which tokens are not made one by one; several prompts of which
            one is longer than a piece.
    """
    drawings = [_drawing(model, one) for one in asked]
    prompts, room = [one.prompt for one in asked], max(one.max_new_tokens for one in asked)
    host = torch.device("cpu")  # where transformers prepares the pass without waiting for a GPU time and again
    ids, mask = left_pad([prompt.ids for prompt in prompts], _ANY, host)
    cache = new_cache(model, [one.max_new_tokens for one in asked])
    pieces = {} if prefill_chunk_size is None else {"prefill_chunk_size": prefill_chunk_size}
    judge(model, pieces)
    piece, longest = setting(model, pieces, "prefill_chunk_size"), max(len(prompt.ids) for prompt in prompts)
    if piece is not None and len(asked) > 1 and longest > piece:
        raise ValueError(
            f"prompts of up to {longest} tokens are not read together in pieces of {piece}: which tokens of one are in "
            "the last piece would depend on the others; read each alone"
        )
    with biased(model, sparsity_bias), user_wrote(model, padded_spans(prompts, host)):
        logits = _called(model, ids, mask, _read, max_new_tokens=room, **given(cache), **pieces)
    return drawings, draw_each(drawings, logits), cache


_ANY = 0  # a token in the place of padding, which nothing reads


# What transformers does to logits whatever came before them, each by its exact class.
_BLIND = (
    known.InfNanRemoveLogitsProcessor, known.LogitNormalization, known.MinPLogitsWarper, known.TemperatureLogitsWarper,
    known.TopKLogitsWarper, known.TopPLogitsWarper,
)  # fmt: skip
_MOST_LEARNT = 256  # settings by model
_learnt = WeakKeyDictionary[Any, dict[bytes, Drawing]]()  # by model and settings, where no prompt has a part in it
# Which code of transformers decides how tokens are drawn, as it was before anybody may have patched it.
_OWN = {
    name: getattr(GenerationMixin, name)
    for name in ("generate", "_prepare_generation_config", "_get_logits_processor", "_merge_criteria_processor_list")
}


def _drawing(model: CausalLM, asked: Asked) -> Drawing:
    options = dict(asked.options)
    judge(model, options)
    if (setting(model, options, "num_beams") or 1) != 1:
        raise ValueError("the generation config asks for beams, which are not made token by token; set num_beams=1")
    settings, learnt = _settings(model, options), _learnt.setdefault(model, {})
    before = None if settings is None else learnt.get(settings)  # at once: another thread may clear them
    if asked.max_new_tokens < 1 or settings is None:
        drawing = _asked_of_generate(model, asked, options)
    elif before is not None:
        drawing = replace(before)
    else:
        drawing = _asked_of_generate(model, asked, options)
        if drawing.ids_1S is None and settings == _settings(model, options):  # which another thread may have changed
            if len(learnt) >= _MOST_LEARNT:
                learnt.clear()
            learnt[settings] = replace(drawing)
    if asked.seed is not None:
        drawing.generator = torch.Generator(model.device).manual_seed(asked.seed)
    return drawing


def _settings(model: CausalLM, options: dict[str, Any]) -> bytes | None:
    """All that decides how tokens are drawn, but for the prompt: the call's options and the model's generation config,
    as they are now. None where that cannot be told: with objects among them, or code that is not transformers' own.
    """
    part: Any = model
    methods = {name: part.generate.inner if name == "generate" else getattr(part, name) for name in _OWN}
    if any(getattr(found, "__func__", found) is not _OWN[name] for name, found in methods.items()):
        return None
    told = (options, vars(model.generation_config))
    try:
        settings = marshal.dumps(told, 2)
        return settings if marshal.loads(settings) == told else None  # of NumPy's numbers it keeps the bytes alone
    except ValueError:
        return None


def _asked_of_generate(model: CausalLM, asked: Asked, options: dict[str, Any]) -> Drawing:
    ids = torch.tensor([asked.prompt.ids], device=model.device)
    drawing: Drawing = _called(
        model, ids, torch.ones_like(ids), _prepared, max_new_tokens=asked.max_new_tokens, **options
    )
    if drawing.ids_1S is ids and all(type(one) in _BLIND for one in drawing.processors):
        drawing.ids_1S = None
    return drawing


def _called(model: CausalLM, ids: Tensor, mask: Tensor, method: Callable[..., Any], **options: Any) -> Any:
    """What a decoding method of this file returns when transformers' `generate` calls it; an attached model's own
    refuses foreign methods, but these keep the routes.
    """
    inner = cast(Any, model.generate).inner
    return inner(ids, attention_mask=mask, custom_generate=method, stop_strings=None, **options)


def _prepared(*call: Any, logits_processor: Any, generation_config: Any, **inputs: Any) -> Drawing:
    """A decoding method that makes nothing: how transformers would draw the tokens."""
    _, ids = call  # after the model
    return Drawing(ids, logits_processor, generation_config.do_sample, None)


def _read(model: Any, input_ids: Tensor, generation_config: Any, **inputs: Any) -> Tensor:
    """A decoding method that reads the prompts and makes no token: the logits [B, V] that follow them."""
    for name in ("logits_processor", "stopping_criteria"):
        del inputs[name]  # whoever asks for tokens draws them, and decides when they are enough
    mask = inputs.get("attention_mask")
    ids, *there = (sent(x, model.device) if isinstance(x, Tensor) else x for x in (input_ids, *inputs.values()))
    with nullcontext() if mask is None else masked(handle_of(model).state, mask):
        output = model._prefill(ids, generation_config, dict(zip(inputs, there, strict=True)))
    logits: Tensor = output.logits[:, -1]
    return logits
