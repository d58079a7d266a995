"""Time and quality in one picture: joins the results of `elastic eval` with the times of a large shape, as records for
`elastic bench table`. `dense` is among the methods; lengths are those that e2e has timed, or `--at` names one for all.

    elastic eval --rows foreign=data/foreign --lengths 8192 --methods dense streaming moba:12:128 --out runs/eval
    elastic bench e2e --shapes llama-3.1-8b --lengths 8192 131072 --msr 0 0.5 0.9 --out runs/bench
    elastic bench selection --lengths 8192 131072 --methods moba:12:128 --out runs/bench
    python tests/bench/pareto.py runs/eval runs/bench/e2e.json runs/bench/selection.json --at 131072 --out runs/bench
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from elastic.bench.drawing import draw
from elastic.bench.records import Measurement, git_commit, load, save
from elastic.bench.studies import at_share
from elastic.bench.studies.pareto import Judged, records
from elastic.bench.studies.pareto_tables import cells
from elastic.config import SparseConfig
from elastic.console import say, table
from elastic.evaluation.comparison import compare
from elastic.evaluation.scores import read_rows
from elastic.training.paired import Interval

DENSE = "dense"


def judged(folder: Path, sets: Sequence[str] | None, methods: Sequence[str] | None) -> Iterator[Judged]:
    """What the methods of an evaluation came to on each of its sets, by length.

    Raises:
        ValueError: no dense model to compare with, a set or method that is not there, or methods that were not measured
            on the same tasks and lengths.
    """
    rows = read_rows(folder)
    for asked, key in ((sets, "benchmark"), (methods, "method")):
        known = list(dict.fromkeys(row[key] for row in rows))
        if missing := [name for name in asked or [] if name not in known]:
            raise ValueError(f"{folder} has no {key} {missing[0]}; it has {', '.join(known)}")
        rows = [row for row in rows if asked is None or row[key] in asked]
    _check(rows, folder)
    sparse = {(row["benchmark"], row["length"], row["method"]): row["facts"]["sparse"] for row in rows}
    found = [one for one in compare(rows, folder, [DENSE]) if one.task is None and one.length is not None]
    dense = {(one.set, one.length): one.score for one in found if one.method == DENSE}
    for one in found:
        assert one.length is not None
        base, ahead = dense[one.set, one.length], one.ahead.get(DENSE, Interval(0.0, 0.0, 0.0))
        if not base:
            say(f"Left out: {one.set} at {one.length} tokens, of which the dense model gets nothing right")
            continue
        low, value, high = (1 + difference / base for difference in (ahead.low, ahead.value, ahead.high))
        ran = SparseConfig(**sparse[one.set, one.length, one.method])
        yield Judged(one.set, one.length, one.method, one.n, value, low, high, one.msr, 1 - one.esr_all, ran)


def _check(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """All methods did the same, the dense model among them."""
    done: dict[str, set[tuple[str, int | None]]] = {}
    for row in rows:
        done.setdefault(row["method"], set()).add((row["task"], row["length"]))
    if DENSE not in done:
        raise ValueError(f"{folder} has no results of dense, which the others are compared with; add it to --methods")
    for method, cells_of in done.items():
        if differing := sorted(map(str, cells_of ^ done[DENSE])):
            raise ValueError(
                f"{method} and dense were not measured on the same tasks and lengths in {folder} ({differing[0]} is of "
                "one alone); let `elastic eval` finish, or leave the method out by --methods"
            )


def timed(files: Sequence[Path]) -> list[Measurement]:
    """The records of these files.

    Raises:
        OSError, ValueError: as `load`; times of different GPUs, which do not add up.
    """
    found = [record for file in files for record in load(file)]
    if others := sorted({record["gpu"] for record in found} - {found[0]["gpu"]}):
        raise ValueError(
            f"the times are of {found[0]['gpu']} and of {', '.join(others)}, which do not add up; name files of one GPU"
        )
    return found


def build_parser() -> argparse.ArgumentParser:
    """What is joined."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--out of `elastic eval`")
    parser.add_argument(
        "times", type=Path, nargs="+", help="*.json of `elastic bench e2e` and `elastic bench selection`"
    )
    parser.add_argument("--shape", default="llama-3.1-8b", help="whose times (default llama-3.1-8b)")
    parser.add_argument("--at", type=int, metavar="N", help="tokens of the timed prompts (default: as the rows have)")
    share = "of the dense model's score, at which methods are put side by side (default 0.97)"
    parser.add_argument("--share", type=float, default=0.97, metavar="S", help=share)
    parser.add_argument("--sets", nargs="+", help="of the evaluation (default all)")
    parser.add_argument("--methods", nargs="+", help="of the evaluation (default all)")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    parser.add_argument("--tag", default="pareto", help="name of the files (default pareto)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="default runs/bench")
    return parser


def main(argv: list[str]) -> int:
    """Read, join, write records and picture, print the table."""
    args = build_parser().parse_args(argv)
    try:
        times = timed(args.times)
        found = records(list(judged(args.folder, args.sets, args.methods)), times, args.shape, args.at)
        found += at_share.at_share(found, args.share)
    except (ValueError, OSError) as error:
        raise SystemExit(f"pareto: error: {error}") from error
    words = [
        f"--{name} {shlex.join(map(str, of))}" for name, of in (("sets", args.sets), ("methods", args.methods)) if of
    ]
    words += [f"--shape {args.shape}", *([f"--at {args.at}"] if args.at else []), f"--share {args.share:g}"]
    stamp = {
        **{key: times[0][key] for key in ("gpu", "kernel", "versions")},
        "commit": args.commit or git_commit(),
        "command": " ".join(["python tests/bench/pareto.py", args.folder.name, *(f.name for f in args.times), *words]),
    }
    say(f"{table(*cells(found))}\n\n{table(*at_share.cells(found))}")
    path = save(args.out / f"{args.tag}.json", [{**record, **stamp} for record in found])
    say(f"wrote {', '.join(map(str, [path, *draw(path, found)]))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
