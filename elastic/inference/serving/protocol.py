"""Requests and answers of the OpenAI chat completions protocol, as far as a routed model serves it.

What a client may send but this server cannot do is refused by name, never ignored.
"""

import time
import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_INT64 = 2**63 - 1  # seeds of torch; no answer has as many tokens either
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # values under which a setting that is not served changes nothing
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
}


class Part(BaseModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of the conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class StreamOptions(BaseModel):
    """What a stream carries beside the text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of `POST /v1/chat/completions`. Defaults are the protocol's: temperature 1 samples, 0 is greedy.

    Attributes:
        sparsity_bias: not in the protocol: for this request instead of the configuration's, above 0 more heads run
            sparse.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1, le=_INT64)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_INT64)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    seed: int | None = Field(default=None, ge=-_INT64 - 1, le=_INT64)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    sparsity_bias: float | None = Field(default=None, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, body: Any) -> Any:
        """Drop settings that are at their neutral value, refuse them otherwise."""
        if not isinstance(body, dict):
            return body
        for name, neutral in _NEUTRAL.items():
            if name in body and body[name] is not None and body[name] not in neutral:
                raise ValueError(f"{name}={body[name]!r} is not supported by this server; leave it out")
        return {name: value for name, value in body.items() if name not in _NEUTRAL}

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts, empty ones left out."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)

    @property
    def limit(self) -> int | None:
        """New tokens asked for; None: as many as the server allows."""
        return self.max_completion_tokens or self.max_tokens


class Envelope:
    """What all parts of one answer share.

    Args:
        model: served name.
    """

    def __init__(self, model: str) -> None:
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model

    def whole(self, text: str, reason: str, usage: dict[str, int], elastic: dict[str, Any]) -> dict[str, Any]:
        """The answer in one piece; `elastic` holds what the routers decided."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage, "elastic": elastic}

    def piece(self, delta: dict[str, str], reason: str | None = None, **more: Any) -> dict[str, Any]:
        """One chunk of a stream."""
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **more}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk without choices that ends a stream with `include_usage`."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """The protocol's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}
