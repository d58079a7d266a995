"""Prompts as people write them, to token ids: chat template, which of the tokens the user wrote, left padding, and what
is refused.

Routers look at what the user wrote and never at the template or the system prompt (docs/design.md section 3).
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from elastic.data.context_length import context_length
from elastic.data.control_tokens import encode_marked, mark, unmarked
from elastic.protocols import CausalLM, Tokenizer

Message = Mapping[str, str]
Prompts = str | Sequence[str] | Sequence[Message]
TEMPLATE = "chat_template_kwargs"  # their name in elastic.json and in manifests
# What chat templates are told unless a tokenizer says otherwise: answers begin at once. Most templates do not ask.
TEMPLATE_KWARGS = {"enable_thinking": False}
_OWN_KWARGS = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "documents", "messages",
    "padding", "return_dict", "return_tensors", "tokenize", "tools", "truncation",
)  # fmt: skip
_MARK = "\u2060{}\u2060"  # in place of what a user wrote; word joiners, so that no template trims or escapes it


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt in tokens.

    Attributes:
        ids: token ids.
        user: [first, last) of the tokens from the beginning of the user's first message to the end of the last one.
    """

    ids: list[int]
    user: tuple[int, int]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def whole(cls, ids: list[int]) -> "EncodedPrompt":
        """A prompt of which nothing else is known: all of it counts as the user's."""
        return cls(ids, (0, len(ids)))


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


def encode(
    item: str | list[Message], tokenizer: Tokenizer, chat_template: bool, tools: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None, sanitize: bool = False,
) -> EncodedPrompt:  # fmt: skip
    """One prompt in tokens; for `tools` and `kwargs` see `render`, for `sanitize` `encode_prompt`. A text that is taken
    as it is may begin with the token that begins a text, as one that was rendered before does; it gets no second one.

    Raises:
        ValueError: an empty prompt, one that UTF-8 cannot write, or messages without a chat template or that it
            refuses.
    """
    if isinstance(item, str):
        if not item.strip():
            raise ValueError("the prompt is empty; write at least one word")
        _check_unicode("the prompt", item)
        if not chat_template:
            given = {"tools": tools, "chat_template_kwargs": kwargs, "sanitize_control_tokens": sanitize}
            if any(given.values()):
                named = " and ".join(name for name, value in given.items() if value)
                raise ValueError(f"{named} came for a text without chat template; leave out chat_template=False")
            begun = bool(tokenizer.bos_token) and item.startswith(str(tokenizer.bos_token))
            return EncodedPrompt.whole(tokenizer(item, add_special_tokens=not begun)["input_ids"])
        item = [{"role": "user", "content": item}]
    for message in item:
        empty = not str(message.get("content", "")).strip() and message.get("role") != "system"  # no system prompt
        if not {"role", "content"} <= message.keys() or empty:
            raise ValueError(f"message {dict(message)} has no role or no content; expected both, not empty")
        _check_unicode(f"the message of the {message['role']}", str(message["content"]))
    if not chat_template or tokenizer.chat_template is None:
        raise ValueError(
            "messages need a chat template, "
            + ("but chat_template=False was given" if not chat_template else "which this tokenizer does not have")
            + "; pass a text with chat_template=False"
        )
    return encode_prompt([dict(message) for message in item], tokenizer, sanitize, tools=tools, kwargs=kwargs)


def encode_messages(
    messages: Sequence[Message], tokenizer: Tokenizer, sanitize: bool = False, kwargs: Mapping[str, Any] | None = None
) -> EncodedPrompt:
    """A conversation in the tokenizer's chat template, ready for the answer; `sanitize` as in `encode_prompt`, `kwargs`
    as in `render`.

    Raises:
        ValueError: a message without text, or a tokenizer without a template.
    """
    return encode(list(messages), tokenizer, chat_template=True, kwargs=kwargs, sanitize=sanitize)


def encode_prompt(
    messages: list[dict[str, str]], tokenizer: Tokenizer, sanitize: bool = False, **rendering: Any
) -> EncodedPrompt:
    """A chat in tokens, up to and including the generation prompt.

    Args:
        sanitize: control tokens that messages spell out stay text, see `elastic.data.control_tokens`.
        rendering: keywords of `render`.

    Raises:
        ValueError: `sanitize` with a tokenizer that does not tell where its tokens come from.
    """
    if sanitize:
        if not tokenizer.is_fast:
            raise ValueError(f"sanitize_control_tokens needs a fast tokenizer, not {type(tokenizer).__name__}")
        messages = mark(messages, tokenizer)
        text, characters = render(messages, tokenizer, **rendering), user_text(messages, tokenizer, **rendering)
        ids, offsets = encode_marked(text, tokenizer)
        first, last = (len(unmarked(text[:place])) for place in characters)
        return EncodedPrompt(ids, token_span(offsets, (first, last)))
    text = render(messages, tokenizer, **rendering)
    if not tokenizer.is_fast:
        warnings.warn(
            f"{type(tokenizer).__name__} does not tell where its tokens come from, so routers see the chat template "
            "too; use a fast tokenizer",
            stacklevel=2,
        )
        return EncodedPrompt.whole(tokenizer(text, add_special_tokens=False)["input_ids"])
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    span = token_span(encoded["offset_mapping"], user_text(messages, tokenizer, **rendering))
    return EncodedPrompt(encoded["input_ids"], span)


def user_text(messages: list[dict[str, str]], tokenizer: Tokenizer, **rendering: Any) -> tuple[int, int]:
    """Characters [first, last) of the rendered chat from the beginning of the user's first message to the end of the
    last one. Found by rendering the chat with marks in their places; the whole text, with a warning, where the template
    does more with what users write than trimming it.
    """
    text, places = render(messages, tokenizer, **rendering), [i for i, m in enumerate(messages) if m["role"] == "user"]
    if not places:
        return 0, len(text)
    marked = [dict(message) for message in messages]
    for name, place in (("first", places[0]), ("last", places[-1])):
        marked[place]["content"] = _MARK.format(name)
    other = render(marked, tokenizer, **rendering)
    first, last = (_MARK.format("last" if places[0] == places[-1] else "first"), _MARK.format("last"))
    begin, end = other.find(first), len(text) - (len(other) - other.rfind(last) - len(last))
    wrote, ends = (messages[place]["content"].strip() for place in (places[0], places[-1]))
    if not (text[begin:].lstrip().startswith(wrote) and text[:end].rstrip().endswith(ends)):
        warnings.warn(
            f"the chat template of {tokenizer.name_or_path!r} changes what users write, so routers see it too",
            stacklevel=2,
        )
        return 0, len(text)
    return begin, end


def token_span(offsets: Sequence[tuple[int, int]], characters: tuple[int, int]) -> tuple[int, int]:
    """Tokens [first, last) that hold these characters; `offsets` are the characters of every token."""
    first, last = characters
    held = [i for i, (begin, end) in enumerate(offsets) if begin < last and end > first and end > begin]
    return (held[0], held[-1] + 1) if held else (0, len(offsets))


def _check_unicode(what: str, text: str) -> None:
    """Tokenizers read UTF-8. Bytes of a shell or a file that are something else arrive as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has half a surrogate pair, or a byte that is not UTF-8, at character {error.start}; write valid "
            "Unicode"
        ) from error


def render(
    messages: Sequence[Message], tokenizer: Tokenizer, *, begun: bool = False, tools: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None, waits: bool = True,
) -> str:  # fmt: skip
    """A conversation as the model reads it: the one place where a chat template is applied, for data, generation,
    serving and evaluation.

    Args:
        begun: the last message is the beginning of the assistant's answer, which is to be continued.
        tools: functions or JSON schemas that the model is told it may call.
        kwargs: variables of the template, beside the tokenizer's own (`template_kwargs`).
        waits: for an answer; else the conversation is over.

    Raises:
        ValueError: messages that the template refuses.
    """
    options: dict[str, Any] = {**template_kwargs(tokenizer), **check_kwargs(kwargs or {})}
    if tools:
        options["tools"] = list(tools)
    ends = {"add_generation_prompt": waits and not begun, "continue_final_message": begun}
    try:
        text: str = tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **ends, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template of this model refuses the messages: {error}") from error
    return text


def template_kwargs(tokenizer: Tokenizer) -> dict[str, Any]:
    """What the chat template is told beside the conversation: what `set_template_kwargs` gave, or `TEMPLATE_KWARGS`."""
    return dict(getattr(tokenizer, "chat_template_kwargs", TEMPLATE_KWARGS))


def set_template_kwargs(tokenizer: Tokenizer, kwargs: Mapping[str, Any]) -> None:
    """Let every rendering with this tokenizer tell the chat template so.

    Raises:
        ValueError: names that say something else than the template's variables.
    """
    tokenizer.chat_template_kwargs = check_kwargs(kwargs)  # type: ignore[attr-defined]  # of our own


def check_kwargs(kwargs: Any) -> dict[str, Any]:
    """Variables of a chat template as they were given.

    Raises:
        ValueError: not a mapping, or names that say something else.
    """
    if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
        raise ValueError(f"chat_template_kwargs={kwargs!r} is not a mapping of names to values")
    own = [name for name in kwargs if name in _OWN_KWARGS]
    if own:
        raise ValueError(f"chat_template_kwargs name {', '.join(own)}, which are not variables of a template")
    return dict(kwargs)


def padded_spans(prompts: Sequence[EncodedPrompt], device: torch.device) -> Tensor:
    """Where the users' words are in the left-padded rows, int64 [B, 2]."""
    longest = max(map(len, prompts))
    spans = [[place + longest - len(prompt) for place in prompt.user] for prompt in prompts]
    return torch.tensor(spans, device=device)


def left_pad(encoded: Sequence[list[int]], pad: int | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both [B, S], with the padding on the left; rows of one length need no `pad`."""
    lengths = torch.tensor([len(row) for row in encoded])
    rows, longest = [torch.tensor(row, dtype=torch.int64) for row in encoded], int(lengths.max())
    if pad is None and int(lengths.min()) < longest:
        raise TypeError(f"pad=None, but the rows have {lengths.tolist()} tokens; give a token for their padding")
    ids = pad_sequence(rows, batch_first=True, padding_value=pad or 0, padding_side="left")
    mask = (torch.arange(longest) >= longest - lengths[:, None]).long()
    return ids.to(device), mask.to(device)


def check_length(encoded: Sequence[EncodedPrompt], model: CausalLM, max_new_tokens: int) -> None:
    """Refuse prompts that are empty or leave no room for the new tokens."""
    limit = context_length(model.config)
    for number, prompt in enumerate(encoded):
        if not prompt.ids:
            raise ValueError(f"prompt {number} has no tokens; write at least one word")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens and {max_new_tokens} new ones were asked for, but the model "
                f"reads at most {limit}; shorten the prompt or max_new_tokens to {max(0, limit - len(prompt))}"
            )
