"""Collect the results of `elastic eval` runs in one folder, from several processes perhaps, as records for
`elastic bench table`, with pictures.

    elastic eval --methods dense streaming --lengths 1024,2048 --limit 100 --out runs/ruler
    python tests/bench/evaluation.py runs/ruler --tag ruler --gpu "NVIDIA H100" --out tests/bench/results
"""

import argparse
import sys
from pathlib import Path

from elastic.bench.records import git_commit, save
from elastic.bench.studies.evaluation import records, score_cells
from elastic.console import say, table
from elastic.evaluation.scores import read_rows
from elastic.plots import Panel, panels_figure, save_png


def build_parser() -> argparse.ArgumentParser:
    """Where results are, and what they do not say themselves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--out of `elastic eval`")
    parser.add_argument("--gpu", default="cpu", help="what they ran on (default cpu)")
    parser.add_argument("--kernel", default="torch (cpu)", help="what ran attention (default torch on the CPU)")
    parser.add_argument("--command", default="elastic eval", help="how to repeat them")
    parser.add_argument("--methods", nargs="+", help="order of the columns; default all, as found")
    parser.add_argument("--names", nargs="*", default=[], metavar="METHOD=NAME", help="what to call methods instead")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    parser.add_argument("--sweep", action="store_true", help="draw score against MSR instead of against length")
    parser.add_argument("--tag", default="ruler", help="name of the files")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    return parser


def main(argv: list[str]) -> int:
    """Read, write records and pictures, print the table."""
    args = build_parser().parse_args(argv)
    names = dict(pair.split("=", 1) for pair in args.names)
    rows = read_rows(args.folder)
    order = args.methods or list(dict.fromkeys(row["method"] for row in rows))
    rows = [row for row in rows if row["method"] in order]
    places = ["niah", "ruler"]  # needles first
    rows.sort(
        key=lambda r: (r["length"] or 0, places.index(r["task"].split("_")[0]), r["task"], order.index(r["method"]))
    )
    rows = [{**row, "method": names.get(row["method"], row["method"])} for row in rows]
    facts = {"gpu": args.gpu, "kernel": args.kernel, "commit": args.commit or git_commit(), "command": args.command}
    found = [
        {**record, **facts, "versions": row["facts"]["versions"], "sparse": row["facts"]["sparse"]}
        for record, row in zip(records(rows), rows, strict=True)
    ]
    say(table(*score_cells(found)))
    written = [save(args.out / f"{args.tag}.json", found), *pictures(rows, args)]
    say(f"wrote {', '.join(map(str, written))}")
    return 0


def pictures(rows: list[dict], args: argparse.Namespace) -> list[Path]:
    """Score of every task against length, a line per method; of a sweep, against MSR, a line per task."""
    lengths, tasks, methods = (list(dict.fromkeys(row[key] for row in rows)) for key in ("length", "task", "method"))

    def line(x: str, **wanted: object) -> list[tuple[float, float]]:
        return sorted((r[x], r["score"]) for r in rows if all(r[key] == value for key, value in wanted.items()))

    if args.sweep:
        titles = [(f"score at {n} tokens", {t: line("msr", task=t, length=n) for t in tasks}) for n in lengths]
    else:
        titles = [(task, {m: line("length", task=task, method=m) for m in methods}) for task in tasks]
    label = "MSR" if args.sweep else "length in tokens"
    panels = [Panel(title, lines, label, "score", marker="o") for title, lines in titles]
    figure = panels_figure([panels[i : i + 3] for i in range(0, len(panels), 3)])
    return [save_png(figure, args.out / f"{args.tag}.png")]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
