"""Messages to tokens, beside the event loop: one thread reads prompts; what cannot fit is refused before."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from elastic.data.context_length import context_length
from elastic.data.prompts import EncodedPrompt, Message, encode_messages
from elastic.inference.serving.errors import RefusedError
from elastic.model.long_rope import switch_lengths
from elastic.protocols import CausalLM, Tokenizer

_MOST_WAITING = 64  # prompts that wait to be read


class PromptReader:
    """Reads the prompts of all requests, one after another: tokenizers are not made for several threads.

    Args:
        model: whose configuration says how long a prompt may be.
        tokenizer: with a chat template.
        sanitize: control tokens that messages spell out stay text.
    """

    def __init__(self, model: CausalLM, tokenizer: Tokenizer, sanitize: bool = False) -> None:
        self.sanitize = sanitize
        self.tokenizer, self.room = tokenizer, context_length(model.config)
        self._switches = switch_lengths(model.config)
        self.characters = self.room * max(map(len, tokenizer.backend_tokenizer.get_vocab()))
        self._thread = ThreadPoolExecutor(1, "elastic-reader")
        self._waiting = 0

    async def read(self, messages: Sequence[Message], kwargs: Mapping[str, Any] | None = None) -> EncodedPrompt:
        """The conversation in tokens, with room for one more.

        Args:
            kwargs: variables of the chat template, beside the tokenizer's own.

        Raises:
            RefusedError: an empty or too long conversation, one that UTF-8 cannot write or the chat template refuses,
                or too many prompts that wait to be read.
        """
        size = sum(len(message["content"]) for message in messages)
        if size > self.characters:
            raise RefusedError(
                400,
                f"the messages have {size} characters, but the {self.room} tokens that this model reads are at most "
                f"{self.characters}; shorten them",
                "messages",
            )
        if self._waiting >= _MOST_WAITING:
            raise RefusedError(429, f"{self._waiting} prompts wait to be read; try again later")
        self._waiting += 1
        try:
            prompt = await asyncio.get_running_loop().run_in_executor(self._thread, self._encode, messages, kwargs)
        finally:
            self._waiting -= 1
        if len(prompt) >= self.room:
            raise RefusedError(
                400,
                f"the messages have {len(prompt)} tokens, but this model reads at most {self.room} with the answer; "
                f"shorten them by {len(prompt) - self.room + 1} tokens or more",
                "messages",
            )
        return prompt

    def room_after(self, prompt: int) -> int:
        """New tokens that a prompt of so many leaves room for. Where RoPE changes its factors at a length, an answer
        ends before new tokens would cross it, which fails all answers that decode together; its last token is not read.
        """
        switch = next((switch for switch in self._switches if prompt <= switch), self.room)
        return min(self.room - prompt, switch - prompt + 1)

    def close(self) -> None:
        """Let the thread end."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _encode(self, messages: Sequence[Message], kwargs: Mapping[str, Any] | None) -> EncodedPrompt:
        try:
            return encode_messages(messages, self.tokenizer, self.sanitize, kwargs)
        except ValueError as error:
            raise RefusedError(400, str(error), "messages") from error
        except Exception as error:
            if not kwargs:
                raise
            raise RefusedError(
                400,
                f"the chat template fails with these variables: {type(error).__name__}: {error}; see what it knows",
                "chat_template_kwargs",
            ) from error
