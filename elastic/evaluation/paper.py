"""The comparison of an evaluation as a table for a paper: Markdown, LaTeX (booktabs) and CSV.

One table: a block for each set, a line for each method, scores by length, and their mean with its distance
from the references'. The CSV has a line for each set, length, task and method, with all intervals.
"""

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from elastic.evaluation.comparison import Compared
from elastic.evaluation.scores import LOCK
from elastic.files import alone, write_atomic
from elastic.training.paired import Interval

MARKS = "*†‡§¶"  # of the references, in their order
TEX_MARKS = dict(zip(MARKS, ("*", r"\dagger", r"\ddagger", r"\S", r"\P"), strict=True))
_TEX = {c: f"\\{c}" for c in "_%&#${}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
}


@dataclass(frozen=True)
class Block:
    """The lines of a set.

    Attributes:
        name: of the set.
        counts: samples by length, then all of them; as wide as a line without its method and MSR.
        lines: method, MSR, score by length with marks, mean over lengths, differences.
    """

    name: str
    counts: list[str]
    lines: list[list[str]]


def write_tables(found: Sequence[Compared], against: Sequence[str], notes: Sequence[str], out: Path) -> list[Path]:
    """Write `comparison.md`, `comparison.tex` and `comparison.csv`.

    Args:
        found: as `comparison.compare` gives it.
        against: the references, in the order of the columns.
        notes: lines below the table.
        out: the folder of the evaluation.
    """
    header, blocks = header_of(found, against), blocks_of(found, against)
    told = [caption(against), *notes]
    texts = {"md": markdown(header, blocks, told), "tex": latex(header, blocks, told), "csv": as_csv(found, against)}
    with alone(out / LOCK):
        for ending, text in texts.items():
            write_atomic(out / f"comparison.{ending}", text)
    return [out / f"comparison.{ending}" for ending in texts]


def caption(against: Sequence[str]) -> str:
    """What the figures are."""
    marked = [f"{mark} another score than {name}" for mark, name in zip(MARKS, against, strict=False)]
    return (
        "; ".join(
            [
                "Scores in percent, every task of the same weight, MSR over all lengths",
                *(["differences in points with 95 % paired bootstrap intervals"] if against else []),
                *([f"{', '.join(marked)}, by the interval"] if marked else []),
            ]
        )
        + "."
    )


def header_of(found: Sequence[Compared], against: Sequence[str]) -> list[str]:
    """Names of the columns; lengths in tokens."""
    return ["method", "MSR", *map(_length, _lengths(found)), "mean", *(f"vs {name}" for name in against)]


def blocks_of(found: Sequence[Compared], against: Sequence[str]) -> list[Block]:
    """The table, set by set."""
    lengths = _lengths(found)
    blocks = []
    for name in dict.fromkeys(one.set for one in found):
        of_set = {(one.method, one.length): one for one in found if one.set == name and one.task is None}
        methods = list(dict.fromkeys(method for method, _ in of_set))
        own = [length for _, length in of_set]
        whole = None if None in own else own[0]  # of a set at one length, that one
        first = methods[0]
        counts = [str(of_set[first, n].n) if (first, n) in of_set else "" for n in lengths]
        lines = []
        for method in methods:
            by_length = [of_set.get((method, length)) for length in lengths]
            mean = of_set[method, whole]
            cells = ["" if one is None else _score(one, against) for one in by_length]
            differences = [_difference(mean.ahead.get(name)) for name in against]
            lines.append([method, f"{mean.msr:.2f}", *cells, _score(mean, against), *differences])
        blocks.append(Block(name, [*counts, str(of_set[first, whole].n), *([""] * len(against))], lines))
    return blocks


def markdown(header: Sequence[str], blocks: Sequence[Block], notes: Sequence[str]) -> str:
    """A table with a line of numbers of samples above each block."""
    lines = [_row(header), _row(["---", *["---:"] * (len(header) - 1)])]
    for block in blocks:
        lines.append(_row([f"**{_plain(block.name)}**", "n", *block.counts]))
        lines += [_row([_plain(line[0]), *line[1:]]) for line in block.lines]
    return "\n".join([*lines, "", *(f"{note}\n" for note in map(_plain, notes))])


def latex(header: Sequence[str], blocks: Sequence[Block], notes: Sequence[str]) -> str:
    r"""A `table*` for `\usepackage{booktabs}`, its caption made of the notes."""
    rows = [_tex_row([tex(name) for name in header])]
    for block in blocks:
        counts = [f"\\textit{{{tex(count)}}}" if count else "" for count in block.counts]
        rows += [r"\midrule", _tex_row([f"\\textit{{{tex(block.name)}}}", r"\textit{n}", *counts])]
        rows += [_tex_row([f"\\texttt{{{tex(line[0])}}}", *map(tex, line[1:])]) for line in block.lines]
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table*}[t]",
        r"\centering\small",
        f"\\caption{{{tex(' '.join(notes))}}}",
        r"\label{tab:comparison}",
        f"\\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
        *(r"\toprule", *rows, r"\bottomrule"),
        r"\end{tabular}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def tex(text: str) -> str:
    """A text with what LaTeX would read as commands written out; marks as superscripts."""
    plain = "".join(_TEX.get(c, c) for c in text)
    minus = re.sub(r"(?<![\w-])-(?=\d)", "$-$", plain)
    return re.sub(f"[{MARKS}]+", lambda marks: f"$^{{{''.join(TEX_MARKS[mark] for mark in marks[0])}}}$", minus)


def as_csv(found: Sequence[Compared], against: Sequence[str]) -> str:
    """A line for each set, length, task and method; a length or task that is empty is the mean over all of them."""
    columns: dict[str, Callable[[Compared], object]] = {
        "set": lambda one: one.set,
        "length": lambda one: one.length,
        "task": lambda one: one.task,
        "method": lambda one: one.method,
        "n": lambda one: one.n,
        **{name: lambda one, name=name: f"{getattr(one, name):.6g}" for name in  # type: ignore[misc]
           ("score", "half_width", "msr", "esr_all", "prefill_seconds")},
    }  # fmt: skip
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, *(f"vs {name}{end}" for name in against for end in ("", ", low", ", high"))])
    for one in found:
        intervals = [one.ahead.get(name) for name in against]
        bounds = [x for of in intervals for x in ((None,) * 3 if of is None else (of.value, of.low, of.high))]
        writer.writerow([*(read(one) for read in columns.values()), *("" if x is None else f"{x:.6g}" for x in bounds)])
    return text.getvalue()


def _lengths(found: Sequence[Compared]) -> list[int]:
    return sorted({one.length for one in found if one.length is not None})


def _length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def _score(one: Compared, against: Sequence[str]) -> str:
    marks = [
        mark for mark, name in zip(MARKS, against, strict=False) if name in one.ahead and one.ahead[name].excludes_zero
    ]
    return f"{_points(one.score)}{''.join(marks)}"


def _difference(ahead: Interval | None) -> str:
    if ahead is None:
        return ""
    return f"{_points(ahead.value)} [{_points(ahead.low)}, {_points(ahead.high)}]"


def _points(share: float) -> str:
    """In percent; nothing is -0.0."""
    return f"{round(100 * share, 1) + 0.0:.1f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    """A text in which Markdown sees no table and no emphasis."""
    return re.sub(r"([|_*])", r"\\\1", text)


def _tex_row(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"
