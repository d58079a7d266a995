"""Collect the results of `elastic eval` runs in one folder, from several processes perhaps, as records for
`elastic bench table`, with pictures.

    elastic eval --methods dense streaming --lengths 1024,2048 --limit 100 --out runs/ruler
    python tests/bench/evaluation.py runs/ruler --tag ruler --gpu "NVIDIA H100" --out tests/bench/results
"""

import argparse
import sys
from pathlib import Path

from elastic.bench.drawing import draw
from elastic.bench.records import git_commit, save
from elastic.bench.studies.evaluation import records, score_cells
from elastic.console import say, table
from elastic.evaluation.scores import read_rows


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
    made_by = {"gpu": args.gpu, "kernel": args.kernel, "commit": args.commit or git_commit(), "command": args.command}
    found = [
        {**record, **made_by, "versions": row["facts"]["versions"], "sparse": row["facts"]["sparse"]}
        for record, row in zip(records(rows), rows, strict=True)
    ]
    say(table(*score_cells(found)))
    path = save(args.out / f"{args.tag}.json", found)
    say(f"wrote {', '.join(map(str, [path, *draw(path, found)]))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
