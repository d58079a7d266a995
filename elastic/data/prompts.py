"""Prompts as people write them, to token ids: chat template, left padding, and what is refused."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from elastic.protocols import CausalLM, Tokenizer

Message = Mapping[str, str]
Prompts = str | Sequence[str] | Sequence[Message]


def single_prompts(prompt: Any) -> list[str | list[Message]]:
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


def encode(item: str | list[Message], tokenizer: Tokenizer, chat_template: bool) -> list[int]:
    """Token ids of one prompt.

    Raises:
        ValueError: an empty prompt, or messages without a chat template.
    """
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


def encode_messages(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, ready for the answer.

    Raises:
        ValueError: a message without text, or a tokenizer without a template.
    """
    return encode(list(messages), tokenizer, chat_template=True)


def encode_prompt(messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a chat up to and including the generation prompt."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def left_pad(encoded: list[list[int]], pad: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, S], with the padding on the left; rows of one length need no `pad`."""
    longest = max(map(len, encoded))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded], device=device)
    return ids, mask


def check_length(encoded: list[list[int]], model: CausalLM, max_new_tokens: int) -> None:
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
