"""Requests and answers of the OpenAI chat completions protocol, as far as a routed model serves it.

What a client may send but this server cannot do is refused by name, never ignored.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from elastic.inference.serving.jobs import Sampling

_INT64 = 2**63 - 1  # seeds of torch; no answer has as many tokens either
_MOST_STOPS, _LONGEST_STOP = 16, 256  # texts, characters: every token is compared with all of them
_MOST_MESSAGES = 2048
_MOST_CHOICES = 16  # each is an answer of its own in the engine
_MOST_KEYS = 64  # of a JSON object; every unknown one would be an error of its own
_LONGEST_ERROR = 400  # characters; errors quote what was given
_COLDEST = 1e-5  # as vLLM's: logits divided by less leave the range of floats, and nothing but the first is drawn
_LARGEST_BIAS = 1e6  # far beyond every logit of a router
# Values under which a setting that is not served changes nothing. A null is a setting left out, everywhere.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "modalities": (["text"],),
}
# What clients dump of an answer beside its text, when they send it back as a turn.
_NEUTRAL_IN_TURNS: dict[str, tuple[Any, ...]] = {
    "refusal": (),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
}


def _texts(value: Any) -> Any:
    """One text is a list of one."""
    return [value] if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    """A text is one part."""
    if not isinstance(value, str | list):
        raise ValueError(f"a {type(value).__name__} was given; expected a text, or a list of parts of type text")
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Stop = Annotated[str, Field(max_length=_LONGEST_STOP)]


class _Object(BaseModel):
    """A JSON object of a request; names that it does not know are refused, nulls are left out."""

    model_config = ConfigDict(extra="forbid")
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, given: Any) -> Any:
        """Drop settings that are at their neutral value, refuse those that are not served otherwise."""
        if not isinstance(given, dict):
            return given
        if len(given) > _MOST_KEYS:
            raise ValueError(f"{len(given)} settings were given; at most {_MOST_KEYS} are read")
        kept = {name: value for name, value in given.items() if value is not None}
        for name, neutral in cls.neutral.items():
            if name in kept and kept.pop(name) not in neutral:
                raise ValueError(f"{name}={given[name]!r} is not supported by this server; leave it out")
        return kept


class Part(_Object):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Object):
    """One turn of the conversation."""

    neutral = _NEUTRAL_IN_TURNS

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], BeforeValidator(_parts), Field(max_length=_MOST_MESSAGES)]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Role and text, as chat templates take them; they know the developer by the protocol's former word."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class StreamOptions(_Object):
    """What a stream carries beside the text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(_Object):
    """Body of `POST /v1/chat/completions`. Defaults are the protocol's: temperature 1 samples, 0 is greedy.

    Attributes:
        sparsity_bias: not in the protocol: for this request instead of the configuration's, above 0 more heads run
            sparse.
    """

    neutral = _NEUTRAL

    model: str
    messages: list[Message] = Field(min_length=1, max_length=_MOST_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1, le=_INT64)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_INT64)
    temperature: float = Field(default=1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, allow_inf_nan=False)
    n: int = Field(default=1, ge=1, le=_MOST_CHOICES)
    seed: int | None = Field(default=None, ge=-_INT64 - 1, le=_INT64)
    stop: Annotated[list[Stop] | None, BeforeValidator(_texts), Field(max_length=_MOST_STOPS)] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=_MOST_KEYS)
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, max_length=_MOST_KEYS)
    sparsity_bias: float | None = Field(default=None, ge=-_LARGEST_BIAS, le=_LARGEST_BIAS, allow_inf_nan=False)

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn; at temperature 0, or too near to it, nothing is drawn, and requests share batches."""
        if self.temperature < _COLDEST:
            return Sampling(sparsity_bias=self.sparsity_bias)
        return Sampling(self.temperature, self.top_p, self.seed, self.sparsity_bias)

    @property
    def samplings(self) -> list[Sampling]:
        """`sampling` of each of the `n` choices; of a seeded request, under seeds that count up."""
        of_first, seed = self.sampling, self.sampling.seed
        if seed is None:
            return [of_first] * self.n
        wrapped = ((seed + choice + _INT64 + 1) % (2 * _INT64 + 2) - _INT64 - 1 for choice in range(self.n))
        return [of_first._replace(seed=one) for one in wrapped]

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop texts, empty ones left out."""
        return tuple(text for text in self.stop or [] if text)

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

    def whole(
        self, choices: Sequence[tuple[str, str]], usage: dict[str, int], elastic: dict[str, Any]
    ) -> dict[str, Any]:
        """The answer in one piece: text and finish reason of each choice; `elastic` holds what the routers decided."""
        told = [
            {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            for index, (text, reason) in enumerate(choices)
        ]
        return {**self._head("chat.completion"), "choices": told, "usage": usage, "elastic": elastic}

    def piece(self, delta: dict[str, str], index: int, reason: str | None = None, **more: Any) -> dict[str, Any]:
        """One chunk of a stream, of the choice with this index."""
        choice = {"index": index, "delta": delta, "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **more}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk without choices that ends a stream with `include_usage`."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def error_body(message: str, kind: str, param: str | None = None) -> dict[str, Any]:
    """The protocol's error object; a message that quotes a long input is cut."""
    return {"error": {"message": _cut(message), "type": kind, "param": param and _cut(param), "code": None}}


def _cut(text: str) -> str:
    """One line of at most so many characters, the beginning and the end; halves of surrogate pairs escaped."""
    half, text = _LONGEST_ERROR // 2, "\\n".join(text.splitlines())
    short = text if len(text) <= _LONGEST_ERROR else f"{text[:half]} ... {text[-half:]}"
    return short.encode("utf-8", "backslashreplace").decode()
