"""What the user wrote among a prompt's token ids, found by the marks of the chat template: an engine's attention sees
token ids alone, not the messages that they were made of.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from elastic.data.prompts import render, token_span
from elastic.protocols import Tokenizer

_TEXTS = (
    "\u2060sys\u2060",
    "\u2060one\u2060",
    "\u2060answer\u2060",
    "\u2060two\u2060",
)  # no template trims word joiners


@dataclass(frozen=True)
class ChatMarks:
    """Text that a chat template writes around a user's message.

    Attributes:
        before: right before it, such as `<|im_start|>user` and a line break.
        after: right after it, whatever follows.
        tail: from the end of the last message to the end of a prompt that waits for the answer.
    """

    before: str
    after: str
    tail: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ChatMarks | None":
        """Those of a tokenizer; None without a template, or where it writes nothing of its own before users' words."""
        if not getattr(tokenizer, "chat_template", None) or not tokenizer.is_fast:
            return None
        system, one, answer, two = _TEXTS
        chat = [{"role": "user", "content": one}, {"role": "assistant", "content": answer}]
        chat += [{"role": "user", "content": two}]
        text = _rendered(tokenizer, chat)
        if text is None or not all(part in text for part in (one, answer, two)):
            return None
        places = [text.split(one)[0], text.split(answer)[1].split(two)[0]]
        with_system = _rendered(tokenizer, [{"role": "system", "content": system}, *chat[:1]])
        if with_system is not None and system in with_system:
            places.append(with_system.split(system)[1].split(one)[0])
        before = _common_start(place[::-1] for place in places)[::-1]
        tail = text.split(two)[1]
        ends = [tail, text.split(one)[1].split(answer)[0]]
        closed, twice = _rendered(tokenizer, chat, waits=False), _rendered(tokenizer, [chat[0], chat[2]])
        if closed is not None:
            ends.append(closed.split(two)[1])
        if twice is not None and two in twice:
            ends.append(twice.split(one)[1].split(two)[0])
        after = _common_start(end for end in ends if end.strip())
        return cls(before, after, tail) if before.strip() and after.strip() else None

    def find(self, text: str) -> tuple[int, int] | None:
        """Characters [first, last) from the beginning of the user's first message to the end of the last one; None
        where there is none.
        """
        first, last = text.find(self.before), text.rfind(self.before)
        if first < 0:
            return None
        begin, last = first + len(self.before), last + len(self.before)
        end = len(text) - len(self.tail) if text.endswith(self.tail) else text.find(self.after, last)
        return (begin, end) if begin <= last <= end else None


def _common_start(texts: Iterable[str]) -> str:
    same = ""
    for letters in zip(*texts, strict=False):
        if len(set(letters)) > 1:
            break
        same += letters[0]
    return same


def _rendered(tokenizer: Tokenizer, chat: list[dict[str, str]], waits: bool = True) -> str | None:
    """The chat as text, waiting for an answer or not; None where the template refuses it."""
    try:
        return render(chat, tokenizer, waits=waits)
    except ValueError:  # templates refuse roles that they do not know
        return None


def user_span(ids: list[int], tokenizer: Tokenizer, marks: ChatMarks | None) -> tuple[int, int]:
    """Tokens [first, last) that the user wrote; all of them where the marks are not there, as in raw completions.

    The text of the ids is tokenised again to know which characters each token holds. Where that gives other ids, all
    tokens count, with a warning.
    """
    whole = (0, len(ids))
    if marks is None:
        return whole
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    found = marks.find(text)
    if found is None:
        return whole
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if again["input_ids"] != ids:
        warnings.warn(
            f"{tokenizer.name_or_path!r} does not read a prompt's text as the tokens that it was, so routers see its "
            "chat template too",
            stacklevel=2,
        )
        return whole
    return token_span(again["offset_mapping"], found)
