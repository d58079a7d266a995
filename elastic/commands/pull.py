"""`elastic pull`: fetch the routers of a checkpoint from the hub or a folder, checked, into a folder."""

import argparse
import shlex

from elastic.commands.catalogue import COMMANDS
from elastic.console import Parser, complain, say


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = Parser(prog="elastic pull", description=COMMANDS["pull"])
    source = "repository on the Hugging Face Hub, or a folder, such as ./routers"
    parser.add_argument("source", metavar="OWNER/NAME", help=source)
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: NAME)")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit hash on the hub (default main)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    try:
        from elastic.model.sharing import pull

        done = pull(args.source, args.out, args.revision)
    except (ValueError, OSError) as error:
        return complain("pull", error)
    commit = "" if done.commit is None else f" (commit {done.commit})"
    say(f"{done.place}: {'pulled' if done.is_new else 'the same routers are there already'}{commit}")
    if done.card_kept:
        say("README.md there is another one, and stays")
    say(f'Next: elastic generate --checkpoint {shlex.quote(done.place)} --prompt "..."')
    return 0
