"""`elastic bench`: timings beside competitors; recorded ones merged and as tables."""

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

from elastic.commands.catalogue import COMMANDS
from elastic.console import Parser, say

# Modules of `elastic.bench` with SUMMARY, add_arguments and run, by the name that is typed.
BENCHMARKS = {
    **{name: name for name in ("attention", "backward", "decode", "e2e", "paged", "router")},
    "routing": "studies.routing",
    "selection": "selection",
    "serve": "serving",
    **{name: name for name in ("training", "xattention")},
}
DERIVED = "routing"  # from the results of a study


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(prog="elastic bench", description=COMMANDS["bench"])
    chosen = parser.add_subparsers(dest="benchmark", required=True, metavar="WHAT")
    for name in BENCHMARKS:
        module = _benchmark(name)
        module.add_arguments(chosen.add_parser(name, help=module.SUMMARY, description=f"Times {module.SUMMARY}."))
    page = chosen.add_parser("table", help="Markdown of a folder of records", description=write_table.__doc__)
    page.add_argument("folder", type=Path, metavar="DIR", help="holds the *.json of earlier runs")
    page.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    merge = chosen.add_parser("merge", help="one record file of several runs", description=merge_files.__doc__)
    merge.add_argument("files", type=Path, nargs="+", metavar="FILE", help="*.json of runs of one benchmark, in order")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the merged file")
    merge.add_argument("--tag", required=True, metavar="NAME", help="name of the merged file")
    draw = chosen.add_parser("draw", help="the pictures of recorded runs", description=draw_files.__doc__)
    draw.add_argument("files", type=Path, nargs="+", metavar="FILE", help="*.json of earlier runs")
    args = parser.parse_args(argv)
    if args.benchmark in OTHERS:
        return OTHERS[args.benchmark](args)
    from elastic.bench.records import check_replaced, command_line

    command = command_line(argv)
    if args.benchmark != DERIVED:  # whose records are made again in a moment
        check_replaced(args.out / f"{args.tag}.json", command)
    code: int = _benchmark(args.benchmark).run(args, command)
    return code


def _benchmark(name: str) -> Any:
    return importlib.import_module(f"elastic.bench.{BENCHMARKS[name]}")


def write_table(args: argparse.Namespace) -> int:
    """Write the Markdown page of a folder of records, with the pictures that lie beside them; ablations go to pages of
    their own beside it.
    """
    from elastic.bench.records import load_folder
    from elastic.bench.tables import ablation_pages, markdown

    runs = load_folder(args.folder)
    apart = {name: (f"{name.upper()}.md", text) for name, text in ablation_pages(runs).items()}
    beside = Path(os.path.relpath(args.folder, args.out.parent if args.out else Path()))
    pictures = [(beside / file.name).as_posix() for file in sorted(args.folder.glob("*.png"))]
    text = markdown(runs, pictures, [file for file, _ in apart.values()])
    if args.out is None:
        say("\n".join([text, *(page for _, page in apart.values())]), end="")
        return 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for path, page in ((args.out, text), *((args.out.with_name(file), page) for file, page in apart.values())):
        path.write_text(page, encoding="utf-8")
        say(f"wrote {path}")
    return 0


def merge_files(args: argparse.Namespace) -> int:
    """Write the records of several runs of one benchmark as one file, and their pictures. What was measured more than
    once counts as in the first file that has it.
    """
    from elastic.bench.drawing import draw
    from elastic.bench.records import load, merge, save

    found, repeated = merge([load(file) for file in args.files])
    path = save(args.out / f"{args.tag}.json", found)
    say(f"wrote {path}: {len(found)} records of {len(args.files)} files, {repeated} measured again left out")
    for picture in draw(path, found):
        say(f"wrote {picture}")
    return 0


def draw_files(args: argparse.Namespace) -> int:
    """Draw the pictures of recorded runs again, each beside its records."""
    from elastic.bench.drawing import draw
    from elastic.bench.records import load

    for file in args.files:
        pictures = draw(file, load(file))
        say("\n".join(f"wrote {picture}" for picture in pictures) or f"{file} holds nothing to draw")
    return 0


OTHERS = {"table": write_table, "merge": merge_files, "draw": draw_files}
