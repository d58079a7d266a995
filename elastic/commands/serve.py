"""`elastic serve`: serve a routed model over an OpenAI-compatible HTTP endpoint."""

import argparse
import errno
import importlib.util
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.commands.catalogue import COMMANDS
from elastic.console import Parser, complain, say

if TYPE_CHECKING:
    from elastic.inference.serving.door import Door


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = Parser(prog="elastic serve", description=COMMANDS["serve"])
    routers = (
        "folder with elastic.json, owner/name on the Hugging Face Hub, or static:<file>[@<msr>]: heads of a "
        "calibration or a pattern file"
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=routers)
    revision = "branch, tag or commit hash of a checkpoint on the hub (default main)"
    parser.add_argument("--revision", metavar="REV", help=revision)
    parser.add_argument("--backbone", metavar="NAME", help="default: what the checkpoint was trained on")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")
    name = "under which clients ask for it (default: that of the folder or file)"
    parser.add_argument("--name", metavar="NAME", help=name)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    keys = "one of them must come with each request under /v1 (default: those in ELASTIC_API_KEY, else none is asked)"
    parser.add_argument("--api-key", nargs="+", metavar="KEY", help=keys)
    hosts = "names that clients may call this server by, * for any (default: loopback names and --host)"
    parser.add_argument("--allowed-hosts", nargs="+", metavar="NAME", help=hosts)
    pieces = "read prompts in pieces of so many tokens, which needs less memory (default: in one pass)"
    parser.add_argument("--prefill-chunk-size", type=int, metavar="N", help=pieces)
    places = "answered at a time, fewer where memory does not hold them (default 64)"
    parser.add_argument("--max-batch", type=int, default=64, metavar="N", help=places)
    parser.add_argument("--max-queue", type=int, default=64, metavar="N", help="waiting requests (default 64)")
    parser.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="of an answer (default 512)")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="of a request (default 300)")
    parser.add_argument("--max-body", type=int, default=8 << 20, metavar="BYTES", help="default 8 MiB")
    parser.add_argument("--grace", type=float, default=30.0, metavar="S", help="to finish at shutdown (default 30)")
    safe = "control tokens that messages spell out, such as <|im_start|>, stay text (default: they become tokens)"
    parser.add_argument("--sanitize-control-tokens", action="store_true", help=safe)
    return parser


def main(argv: list[str]) -> int:
    """Run the command until it is interrupted."""
    args = build_parser().parse_args(argv)
    try:
        serve(args)
    except (ValueError, OSError) as error:
        return complain("serve", error)
    return 0


def serve(args: argparse.Namespace) -> None:
    """Load the model, then listen.

    Raises:
        ValueError: a setting out of range, or packages of the extra `serve` that are missing.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"the package {package} is missing; run `pip install 'elastic-attention[serve]'`")
    from elastic.inference.generate import load
    from elastic.inference.serving.door import LOOPBACK
    from elastic.inference.serving.engine import Engine
    from elastic.inference.serving.front import front_of, passed_on
    from elastic.inference.serving.host import Host
    from elastic.inference.serving.limits import ServerLimits
    from elastic.model.generation import judge

    door = door_of(args)
    limits = ServerLimits(args.max_new_tokens, args.timeout, args.max_body, args.grace, args.sanitize_control_tokens)
    name = args.name or Path(args.checkpoint).resolve().name
    with (
        listen_on(args.host, args.port) as listening,  # a used port is told before the model is loaded
        front_of(listening, name, limits, door, args.max_queue) as (front, connection),
    ):
        model, tokenizer = load(args.checkpoint, args.backbone, args.device, args.dtype, revision=args.revision)
        judge(model, {} if args.prefill_chunk_size is None else {"prefill_chunk_size": args.prefill_chunk_size})
        host = Host(
            connection,
            lambda metrics, told: Engine(
                model,
                tokenizer,
                max_batch=args.max_batch,
                max_queue=args.max_queue,
                metrics=metrics,
                prefill_chunk_size=args.prefill_chunk_size,
                told=told,
            ),
        )

        def greet() -> None:
            url = f"http://{args.host}:{listening.getsockname()[1]}/v1"
            say(f"model {name!r} at {url} (chat/completions, models; /health, /metrics, /docs)")
            if not door.api_keys and args.host not in LOOPBACK:
                say(f"no --api-key was given: whoever reaches {args.host} can use the model", stream=sys.stderr)

        leave_at_once(listening)
        with passed_on(front):
            host.run(greet)
    if host.engine.working:  # within a step of the model, which nothing can interrupt
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # the interpreter's usual end would abort in that thread


def listen_on(host: str, port: int) -> socket.socket:
    """A socket that holds the address; it takes connections once the server runs.

    Raises:
        ValueError: a port out of range.
        OSError: an address that is in use, not of this machine, or not allowed.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port {port} is out of range; choose one of 1 to 65535, or 0 for any that is free")
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        try:
            return _bound(family, kind, address, reuse=False)
        except OSError:  # connections of a server that has just ended are remembered for a minute
            return _bound(family, kind, address, reuse=True)
    except OSError as error:
        way = "choose another --port" if error.errno == errno.EADDRINUSE else "see --host and --port"
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}; {way}") from error


def leave_at_once(listening: socket.socket) -> None:
    """Let the next server take the address as soon as this one ends. Not before the model is loaded: until a socket
    takes connections, a second one with this option could be bound to its address.
    """
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)


def _bound(family: int, kind: int, address: Any, reuse: bool) -> socket.socket:
    made = socket.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def door_of(args: argparse.Namespace) -> "Door":
    """Who is let in, by the options and ELASTIC_API_KEY.

    Raises:
        ValueError: a key that no client could send.
    """
    from elastic.inference.serving.door import LOOPBACK, Door

    keys = args.api_key or os.environ.get("ELASTIC_API_KEY", "").split()
    return Door(tuple(keys), (*LOOPBACK, args.host, *(args.allowed_hosts or ())))
