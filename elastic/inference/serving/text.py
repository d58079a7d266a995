"""Tokens to text as they come: no broken characters, nothing of a stop text."""

from tokenizers.decoders import DecodeStream

from elastic.protocols import Tokenizer


class TextCutter:
    """Text of one answer, piece by piece.

    Args:
        tokenizer: a fast tokenizer.
        stops: texts that end the answer; the first to appear is cut off with all that follows.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self._decoder, self._tokenizer = DecodeStream(skip_special_tokens=True), tokenizer.backend_tokenizer
        self._stops, self._held = stops, ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that is certain now; what may be the beginning of a stop text is held back."""
        self._held += self._decoder.step(self._tokenizer, token) or ""
        cuts = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if cuts:
            self.stopped = True
            sure, self._held = self._held[: min(cuts)], ""
            return sure
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sure

    def rest(self) -> str:
        """What was held back, when no more tokens come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
