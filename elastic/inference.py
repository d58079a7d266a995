"""Load routers onto their backbone and generate text (spec section 7), through the ordinary `model.generate`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elastic.attention import backend_for
from elastic.backbone import elastic_config, is_attached, route_of, set_config
from elastic.backbones import architecture, load_backbone
from elastic.checkpoint import load_into, read_elastic
from elastic.packed import encode_prompt
from elastic.report import RouteReport, route_reports

Message = Mapping[str, str]
Prompts = str | Sequence[str] | Sequence[Message]
_OWN = ("input_ids", "inputs_embeds", "attention_mask", "past_key_values", "return_dict_in_generate", "max_length")
_REFUSED = {
    "prefill_chunk_size": "the route is decided from the whole prompt, so it must be read in one pass",
    "assistant_model": "assisted decoding re-reads several tokens at once, which would route again",
    "prompt_lookup_num_tokens": "prompt lookup re-reads several tokens at once, which would route again",
}


@dataclass(frozen=True)
class Generation:
    """Answer to one prompt.

    Attributes:
        text: new text without special tokens.
        token_ids: new tokens, up to and without the padding after the end of the answer.
        report: what the routers decided at prefill.
    """

    text: str
    token_ids: list[int]
    report: RouteReport


def load(
    path: str | Path,
    backbone: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    gguf_file: str | None = None,
) -> tuple[Any, Any]:
    """A backbone with the routers of a checkpoint, frozen and in eval mode, and its tokenizer.

    Args:
        path: checkpoint folder.
        backbone: name to load the backbone by; default the one it was trained on.
        device: a torch device.
        dtype: of the backbone's weights; routers stay fp32.
        gguf_file: file name where the backbone's weights are in GGUF format.

    Raises:
        FileNotFoundError: no checkpoint, or no such backbone.
        ValueError: a damaged checkpoint, or one for another backbone.
    """
    name = backbone or read_elastic(path)["backbone"]
    model, tokenizer = load_backbone(name, dtype=dtype, device=device, gguf_file=gguf_file)
    load_into(model, path)
    return model.requires_grad_(False).eval(), tokenizer


def generate(
    model: Any,
    tokenizer: Any,
    prompt: Prompts,
    max_new_tokens: int = 64,
    *,
    sparsity_bias: float | None = None,
    streamer: Any = None,
    chat_template: bool = True,
    **options: Any,
) -> list[Generation]:
    """Answer prompts; greedy unless `do_sample=True` is among the options of `model.generate`.

    Args:
        prompt: a text, a list of texts, or one conversation as a list of {"role", "content"} messages.
        max_new_tokens: length limit of an answer.
        sparsity_bias: for this call only, instead of the configuration's: above 0 more heads run SA.
        streamer: a transformers streamer, for one prompt.
        chat_template: put texts into the tokenizer's chat template as the user's message, as in training; False takes
            them as they are.
        **options: passed to `model.generate`.

    Returns:
        One `Generation` per prompt, in order.

    Raises:
        ValueError: an empty prompt, one too long for the model, options that do not go together, or a model without
            routers or in training mode.
    """
    _check_model(model)
    _check_options(options, max_new_tokens)
    encoded = [_encode(item, tokenizer, chat_template) for item in _prompts(prompt)]
    if streamer is not None and len(encoded) != 1:
        raise ValueError(f"a streamer shows one answer but {len(encoded)} prompts were given; pass one prompt")
    check_length(encoded, model, max_new_tokens)
    options |= {"max_new_tokens": max_new_tokens, "streamer": streamer}
    return answer_tokens(model, tokenizer, encoded, sparsity_bias=sparsity_bias, **options)


def encode_messages(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, ready for the answer.

    Raises:
        ValueError: a message without text, or a tokenizer without a template.
    """
    return _encode(list(messages), tokenizer, chat_template=True)


def answer_tokens(
    model: Any,
    tokenizer: Any,
    encoded: list[list[int]],
    *,
    max_new_tokens: int,
    sparsity_bias: float | None = None,
    **options: Any,
) -> list[Generation]:
    """Answer prompts that are token ids already, as one left-padded batch; `generate` says the rest.

    Their length is not checked: rows that a stopping criterion ends may share a batch with longer answers.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids, mask = _left_pad(encoded, pad, model.device)
    with _bias(model, sparsity_bias):
        output, record = _run(model, ids, mask, pad, max_new_tokens=max_new_tokens, **options)
    stride = record.route.shape[1] // len(encoded)  # beams of a prompt share its route
    reports = route_reports(
        record.route[:, ::stride],
        record.prompt_lengths[::stride],
        elastic_config(model).sparse,
        head_dim=architecture(model)["head_dim"],
        element_size=model.dtype.itemsize,
        backend=backend_for(model.device, model.dtype, architecture(model)["head_dim"]),
    )
    answers = [_answer(row[ids.shape[1] :].tolist(), ends_of(model), pad) for row in output]
    texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    return [Generation(*parts) for parts in zip(texts, answers, reports, strict=True)]


@torch.no_grad()
def _run(model: Any, ids: Tensor, mask: Tensor, pad: int, **options: Any) -> tuple[Tensor, Any]:
    """Token ids of `model.generate`, and the route record of the cache that this call alone uses."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    options.setdefault("do_sample", False)
    output = model.generate(ids, attention_mask=mask, past_key_values=cache, pad_token_id=pad, **options)
    return output, route_of(cache)


@contextmanager
def _bias(model: Any, sparsity_bias: float | None) -> Iterator[None]:
    if sparsity_bias is None:
        yield
        return
    config = elastic_config(model)
    set_config(model, replace(config, sparsity_bias=sparsity_bias))
    try:
        yield
    finally:
        set_config(model, config)


def _prompts(prompt: Any) -> list[str | list[Message]]:
    """The single prompts: texts, or one conversation."""
    if isinstance(prompt, str):
        return [prompt]
    items = list(prompt)
    if not items:
        raise ValueError("the list of prompts is empty; pass at least one prompt")
    if all(isinstance(item, str) for item in items):
        return items
    if all(isinstance(item, Mapping) for item in items):
        return [items]
    kinds = ", ".join(sorted({type(item).__name__ for item in items}))
    raise ValueError(f"prompt is a list of {kinds}; expected texts, or one conversation of role/content messages")


def _encode(item: str | list[Message], tokenizer: Any, chat_template: bool) -> list[int]:
    if isinstance(item, str):
        if not item.strip():
            raise ValueError("the prompt is empty; write at least one word")
        if not chat_template:
            return tokenizer(item)["input_ids"]
        item = [{"role": "user", "content": item}]
    for message in item:
        if not {"role", "content"} <= message.keys() or not str(message["content"]).strip():
            raise ValueError(f"message {dict(message)} has no role or no content; expected both, not empty")
    if not chat_template or tokenizer.chat_template is None:
        raise ValueError(
            "messages need a chat template, "
            + ("but chat_template=False was given" if not chat_template else "which this tokenizer does not have")
            + "; pass a text with chat_template=False"
        )
    return encode_prompt([dict(message) for message in item], tokenizer)


def _left_pad(encoded: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, S], with the padding on the left."""
    longest = max(map(len, encoded))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=device)
    return ids, mask


def ends_of(model: Any) -> list[int]:
    """Tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _answer(tokens: list[int], ends: list[int], pad: int) -> list[int]:
    """Tokens up to the end of the answer; rows that finished early are padded to the longest."""
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), None)
    if stop is not None:
        return tokens[:stop]
    while tokens and tokens[-1] == pad and pad in ends:
        tokens = tokens[:-1]
    return tokens


def _check_model(model: Any) -> None:
    if not is_attached(model):
        raise ValueError("this model has no routers; load it with elastic.load(path) or call elastic.attach(model)")
    if model.training:
        raise ValueError("the model is in training mode, where routers draw at random; call model.eval() first")


def _check_options(options: dict[str, Any], max_new_tokens: int) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} is not a whole number of 1 or more")
    own = [name for name in _OWN if name in options]
    if own:
        raise ValueError(f"generate sets {', '.join(own)} itself; for full control call model.generate")
    for name, reason in _REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"{name}={options[name]!r} is not supported: {reason}; leave it out")
    if options.get("use_cache", True) is not True:
        raise ValueError("use_cache=False is not supported: routes live on the cache; leave it out")
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError(
            f"num_return_sequences={options['num_return_sequences']}; expected 1: repeat the prompt instead"
        )


def check_length(encoded: list[list[int]], model: Any, max_new_tokens: int) -> None:
    """Refuse prompts that are empty or leave no room for the new tokens."""
    limit = model.config.max_position_embeddings
    for number, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompt {number} has no tokens; write at least one word")
        if len(ids) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {number} has {len(ids)} tokens and {max_new_tokens} new ones were asked for, but the model "
                f"reads at most {limit}; shorten the prompt or max_new_tokens to {max(0, limit - len(ids))}"
            )
