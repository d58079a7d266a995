"""`elastic bench`: timings beside competitors, and the table of recorded ones."""

import argparse
import importlib
import os
from pathlib import Path

from elastic.console import Parser, say

SUMMARY = "time the kernels on this GPU beside their competitors; show recorded timings"
# Modules of `elastic.bench` with SUMMARY, add_arguments and run.
BENCHMARKS = ("attention", "backward", "decode", "e2e", "router", "routing", "training", "xattention")


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(prog="elastic bench", description=SUMMARY)
    chosen = parser.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    for name in BENCHMARKS:
        module = importlib.import_module(f"elastic.bench.{name}")
        module.add_arguments(chosen.add_parser(name, help=module.SUMMARY, description=f"Times {module.SUMMARY}."))
    page = chosen.add_parser("table", help="Markdown of a folder of records", description=write_table.__doc__)
    page.add_argument("folder", type=Path, metavar="DIR", help="holds the *.json of earlier runs")
    page.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    args = parser.parse_args(argv)
    if args.benchmark == "table":
        return write_table(args)
    from elastic.bench.records import command_line

    return importlib.import_module(f"elastic.bench.{args.benchmark}").run(args, command_line(argv))


def write_table(args: argparse.Namespace) -> int:
    """Write the Markdown page of a folder of records, with the pictures that lie beside them."""
    from elastic.bench.records import load_folder
    from elastic.bench.tables import markdown

    runs = load_folder(args.folder)
    beside = Path(os.path.relpath(args.folder, args.out.parent if args.out else Path()))
    pictures = [(beside / file.name).as_posix() for file in sorted(args.folder.glob("*.png"))]
    text = markdown(runs, pictures)
    if args.out is None:
        say(text, end="")
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)
        say(f"wrote {args.out}")
    return 0
