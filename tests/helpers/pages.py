"""The documentation as data: fenced blocks with their markers, the commands of a block, links and headings.

A block is marked by an HTML comment on the line before it: `<!-- needs: gpu -->` (or minutes, network, install) says
why a test does not run it, `<!-- file: name -->` that the block is a file of this name.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = ("gpu", "minutes", "network", "install")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (needs|file): (\S+) -->\n\Z")


@dataclass(frozen=True)
class Block:
    """One fenced block: language, text, place, and what its comment says (empty: nothing)."""

    language: str
    text: str
    place: str
    needs: str = ""
    file: str = ""


def blocks(page: Path) -> list[Block]:
    """Fenced blocks in order."""
    whole, found = page.read_text(encoding="utf-8"), []
    for fence in _FENCE.finditer(whole):
        mark = _MARK.search(whole[: fence.start()])
        line = whole.count("\n", 0, fence.start()) + 1
        named = {mark[1]: mark[2]} if mark else {}
        found.append(Block(fence[1], fence[2], f"{page.name}:{line}", **named))
    return found


def prose(page: Path) -> str:
    """The page without fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(text: str) -> list[list[list[str]]]:
    """Commands of a bash block, each a pipe of words: `a && b | c` is [[a], [b, c]]."""
    found: list[list[list[str]]] = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="&|")
        words.whitespace_split, words.commenters = True, "#"
        pipe: list[list[str]] = [[]]
        for word in words:
            if word == "&&":
                found, pipe = [*found, pipe], [[]]
            elif word == "|":
                pipe.append([])
            else:
                pipe[-1].append(word)
        if pipe[0]:
            found.append(pipe)
    return found


def links(page: Path) -> list[str]:
    """Targets of links and pictures inside the repository."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


def anchors(page: Path) -> set[str]:
    """What `#...` can name on a page, as GitHub spells headings."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
