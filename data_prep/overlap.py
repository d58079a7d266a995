"""The overlap rule of robust tasks: an answer must not appear in the context before the window.

Robust tasks are those whose answers need only the latest tokens. Where an answer appears further back too, heads that
see everything can copy it, and what streaming heads lose by that would be taken for their loss on text. Records of the
tiny language are not checked: their robust answers continue a pattern that every window shows.
"""

from elastic.data.records import Record
from elastic.data.tasks import ROBUST

from .draw import Measure, cut_words, longest_end, word_count

GRAM = 8  # words: as long a run rarely recurs by chance
SHARE = 0.02  # of an answer's runs of `GRAM` words, which may appear before the window
WINDOW = 512  # tokens, as in configs/smollm2-gpu.yaml


def overlap(context: str, answer: str, window: int, measure: Measure) -> float | None:
    """Share of the answer's runs of eight words that appear in the context before its last `window` units of `measure`.

    White space does not count, all else does. None for an answer of fewer than eight words, which has no such run.
    """
    wanted = _runs(answer.split())
    if not wanted:
        return None
    words = context.split()
    near = longest_end(cut_words(context, -window), window, measure) if window else ""  # no unit is more than a word
    before = set(_runs(words[: len(words) - word_count(near)]))
    return sum(run in before for run in wanted) / len(wanted)


def overlap_fault(record: Record, window: int, measure: Measure) -> str | None:
    """Why a record of a robust task is refused; None if it is not. Sensitive tasks may repeat, and answers of fewer
    than eight words, such as labels, always pass.

    Args:
        window: end of the context that the answer may share text with, in units of `measure`.
    """
    share = overlap(record.context, record.answer, window, measure) if record.task in ROBUST else None
    if share is None or share <= SHARE:
        return None
    return (
        f"{share:.0%} of the answer's runs of {GRAM} words appear in the context before the window of {window}; "
        f"answers of {record.task} may share {SHARE:.0%} with it"
    )


def _runs(words: list[str]) -> list[tuple[str, ...]]:
    return list(zip(*(words[start:] for start in range(GRAM)), strict=False))
