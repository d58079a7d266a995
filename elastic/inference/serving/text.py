"""Tokens to text as they come: no broken characters, nothing of a stop text."""

from elastic.protocols import Tokenizer

_BROKEN = "\ufffd"  # what bytes outside UTF-8 decode to
_LONGEST_CHARACTER = 8  # tokens; a character has at most 4 bytes, and a token of bytes at least one


class TextCutter:
    """Text of one answer, piece by piece.

    Args:
        tokenizer: a fast tokenizer.
        stops: texts that end the answer; the first to appear is cut off with all that follows.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._pieces = _Pieces(tokenizer)
        self._stops, self._held = stops, ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that is certain now; what may be the beginning of a stop text is held back."""
        return self._sure(self._pieces.add(token))

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        sure = self._sure(self._pieces.rest())
        held, self._held = self._held, ""
        return sure + held

    def _sure(self, piece: str) -> str:
        self._held += piece
        cuts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            sure, self._held = self._held[: min(cuts)], ""
            return sure
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sure


class _Pieces:
    """The text that each token adds, by decoding it with and without the tokens just before.

    Not `tokenizers.decoders.DecodeStream`: it raises where a later token changes how earlier bytes decode, as a lone
    byte before a word does, and a model can write any tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._ids: list[int] = []  # tokens told last, for their context, then those that are not certain yet
        self._told = 0

    def add(self, token: int) -> str:
        """What is certain with one more token."""
        self._ids.append(token)
        return self._text(len(self._ids) - self._told > _LONGEST_CHARACTER)

    def rest(self) -> str:
        """What the last tokens are when no others follow."""
        return self._text(True)

    def _text(self, last: bool) -> str:
        text = self._decode(self._ids)
        if text.endswith(_BROKEN) and not last:  # perhaps the first bytes of a character
            return ""
        before = self._decode(self._ids[: self._told])
        # Text that was told stays told, also where the new tokens make the decoder change its mind about it.
        piece = text[len(before) :] if text.startswith(before) else self._decode(self._ids[self._told :])
        if piece:
            self._ids = self._ids[self._told :]
            self._told = len(self._ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
