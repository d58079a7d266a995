"""`elastic push`: publish the routers of a checkpoint, with a model card, on the hub or in a folder."""

import argparse
import shlex

from elastic.commands.catalogue import COMMANDS
from elastic.console import Parser, complain, say


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = Parser(prog="elastic push", description=COMMANDS["push"])
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder with elastic.json")
    target = "repository on the Hugging Face Hub, made where there is none; or a folder, such as ./routers"
    parser.add_argument("target", metavar="OWNER/NAME", help=target)
    backbone = "what others load the backbone by (default: as the checkpoint says)"
    parser.add_argument("--backbone", metavar="NAME", help=backbone)
    licence = "licence of the routers for the model card, as the hub names it: apache-2.0 (default: none is named)"
    parser.add_argument("--license", metavar="ID", help=licence)
    parser.add_argument("--private", action="store_true", help="a new repository is for its owner alone")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    try:
        from elastic.model.sharing import push

        done = push(args.checkpoint, args.target, backbone=args.backbone, license_id=args.license, private=args.private)
    except (ValueError, OSError) as error:
        return complain("push", error)
    say(f"{done.place}: {'pushed' if done.is_new else 'the same routers are there already'}")
    if done.card_kept:
        say("README.md there was written or edited by hand, and stays")
    revision = "" if done.commit is None else f" --revision {done.commit}"
    say(f'Next: elastic generate --checkpoint {shlex.quote(done.place)}{revision} --prompt "..."')
    return 0
