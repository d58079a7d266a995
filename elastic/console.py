"""Plain text for the terminal: one place that writes to it, shared by all commands."""

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

USER_ERROR = 2  # exit code of a command that was asked for something it cannot do


def say(text: str = "", *, end: str = "\n", stream: TextIO | None = None) -> None:
    """Write a line to `stream` (default: standard output); characters that it cannot encode are escaped."""
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write((text + end).encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def complain(command: str, error: BaseException | str) -> int:
    """One line on standard error about what the user can put right; returns the exit code.

    Raises:
        KeyboardInterrupt: the error only says that the command was stopped.
    """
    if isinstance(error, BaseException) and was_stopped(error):
        raise KeyboardInterrupt from error
    end_bars()
    say(f"elastic {command}: error: {' '.join(str(error).split())}", stream=sys.stderr)
    return USER_ERROR


def was_stopped(error: BaseException | None) -> bool:
    """Whether an exception comes from Ctrl-C or SIGTERM. In the middle of an import libraries make another of it, and
    Lightning has one of its own, which would be exit code 0.
    """
    while error is not None:
        if isinstance(error, KeyboardInterrupt) or type(error).__name__ == "SIGTERMException":
            return True
        error = error.__cause__ or error.__context__
    return False


def end_bars() -> None:
    """End the line of every progress bar that is open, of this package's or a library's, so that what is said next has
    one of its own. Otherwise bars are drawn again when they are collected, after it.
    """
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def hint(name: str, known: Sequence[str], kind: str) -> str:
    """For a name that is not known: those that are like it, or else all of them."""
    close = difflib.get_close_matches(name, known, n=2)
    return f"did you mean {' or '.join(close)}?" if close else f"{kind} are {', '.join(known)}"


def supports_unicode(stream: TextIO | None = None) -> bool:
    """Whether block glyphs can be written to `stream` (default: standard output)."""
    encoding = getattr(sys.stdout if stream is None else stream, "encoding", None) or "ascii"
    return encoding.lower().replace("-", "").startswith("utf")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first to the left, the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    shown = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([shown[0], "-" * len(shown[0]), *shown[1:]])


def side_by_side(left: str, right: str, gap: int = 4) -> str:
    """Two blocks of lines beside each other."""
    one, two = left.splitlines(), right.splitlines()
    width = max(map(len, one), default=0)
    height = max(len(one), len(two))
    one, two = one + [""] * (height - len(one)), two + [""] * (height - len(two))
    return "\n".join(f"{a.ljust(width)}{' ' * gap}{b}".rstrip() for a, b in zip(one, two, strict=True))


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Report and exit; KeyboardInterrupt where the command was stopped."""
        if was_stopped(sys.exc_info()[1]):
            raise KeyboardInterrupt
        end_bars()
        say(f"{self.prog}: error: {message}; see `{self.prog} --help`", stream=sys.stderr)
        raise SystemExit(USER_ERROR)
