"""Control tokens that users spell out, such as `<|im_start|>`, as the text that they are (docs/inference.md).

As vLLM, llama.cpp and transformers do by default, a rendered chat is tokenised as one text, so whatever in it reads
like a control token becomes one, whoever wrote it. The safe way marks such places in the messages before the chat is
rendered, and tokenises what is marked as plain text; everything else becomes the same tokens as without.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from elastic.protocols import Tokenizer

# Noncharacters of Unicode, which no text is made of.
_START, _END = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_START}([^{_START}{_END}]*){_END}|[{_START}{_END}]")


def control_tokens(tokenizer: Tokenizer) -> list[str]:
    """Texts that would become control tokens, the longest first: the tokenizer's special tokens, and the other added
    ones that its chat template writes.
    """
    template = str(tokenizer.chat_template or "")
    added = tokenizer.added_tokens_decoder.values()
    found = {t.content for t in added if t.special or (t.content in template and not t.content.isspace())}
    return sorted(found, key=lambda text: (-len(text), text))


def mark(messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer) -> list[dict[str, str]]:
    """The messages with their control tokens marked."""
    known = re.compile("|".join(map(re.escape, control_tokens(tokenizer))) or "(?!)")

    def marked(text: str) -> str:
        return known.sub(f"{_START}\\g<0>{_END}", unmarked(text))

    return [{name: text if name == "role" else marked(text) for name, text in one.items()} for one in messages]


def unmarked(text: str) -> str:
    """The text without marks."""
    return text.replace(_START, "").replace(_END, "")


def encode_marked(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a chat that was rendered from marked messages, and the characters of each in the text without marks.

    Raises:
        ValueError: a control token that the tokenizer makes of plain text too.
    """
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    place = 0
    for number, piece in enumerate(_MARKED.split(text)):
        for part, found in _pieces(piece or "", tokenizer, plain=number % 2 == 1, first=place == 0):
            ids += [token for token, _ in found]
            offsets += [(place + begin, place + end) for _, (begin, end) in found]
            place += len(part)
    return ids, offsets


_Tokens = list[tuple[int, tuple[int, int]]]


def _pieces(piece: str, tokenizer: Tokenizer, plain: bool, first: bool) -> Iterator[tuple[str, _Tokens]]:
    """A piece of text with its tokens. What must stay plain but is one added token however it is encoded comes in two
    halves, neither of which is.
    """
    if not piece:
        return
    found = _tokens(piece, tokenizer, plain, first)
    added = tokenizer.added_tokens_decoder
    if not plain or not any(token in added for token, _ in found):
        yield piece, found
        return
    half = len(piece) // 2
    for part, begins in ((piece[:half], first), (piece[half:], False)):
        found = _tokens(part, tokenizer, plain, begins) if part else []
        if not part or any(token in added for token, _ in found):
            raise ValueError(f"{piece!r} cannot be told from the control token by this tokenizer; leave it out")
        yield part, found


def _tokens(piece: str, tokenizer: Tokenizer, plain: bool, first: bool) -> _Tokens:
    """Tokens of a piece and their characters in it. Inside a text it follows a line break, since some tokenizers put a
    space before the beginning of a text.
    """
    before = "" if first else "\n"
    for lead in dict.fromkeys((before, "")):
        encoded = tokenizer(
            lead + piece, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=plain
        )
        pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
        kept = [(token, (begin - len(lead), end - len(lead))) for token, (begin, end) in pairs if end > len(lead)]
        if all(begin >= 0 for _, (begin, _) in kept) and sum(end <= len(lead) for _, (_, end) in pairs) >= len(lead):
            return kept  # the line break is a token of its own
    return pairs
