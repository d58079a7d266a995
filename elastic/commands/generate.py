"""`elastic generate`: answer one prompt with the routed model. Text goes to stdout as it is made; the progress of
reading the prompt (on a terminal) and the route report go to stderr.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from elastic.commands.catalogue import COMMANDS
from elastic.console import Parser, complain, say, supports_unicode
from elastic.files import check_place
from elastic.protocols import CausalLM, Tokenizer


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = Parser(prog="elastic generate", description=COMMANDS["generate"])
    routers = (
        "folder with elastic.json, or owner/name on the Hugging Face Hub; or a method with --backbone: "
        "static:<file>[@<msr>], heads of a calibration or a pattern file, or another such as moba:3"
    )
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help=routers)
    revision = "branch, tag or commit hash of a checkpoint on the hub (default main)"
    parser.add_argument("--revision", metavar="REV", help=revision)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the user's message; - reads standard input")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="UTF-8 file with the user's message")
    source.add_argument("stdin", nargs="?", choices=["-"], metavar="-", help="read the message from standard input")
    parser.add_argument("--raw", action="store_true", help="take the prompt as it is, without the chat template")
    safe = "control tokens that the prompt spells out, such as <|im_start|>, stay text (default: they become tokens)"
    parser.add_argument("--sanitize-control-tokens", action="store_true", help=safe)
    parser.add_argument("--backbone", metavar="NAME", help="default: what the checkpoint was trained on")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    bias = "above 0 more heads run sparse, below 0 fewer (default: as the checkpoint says)"
    knob = parser.add_mutually_exclusive_group()
    knob.add_argument("--sparsity-bias", type=float, metavar="X", help=bias)
    nats = "level routers: divergence from dense to stay below, nats per answer token (default: the checkpoint's)"
    knob.add_argument("--budget", type=float, metavar="NATS", help=nats)
    parser.add_argument(
        "--kv-cache",
        choices=("full", "elastic"),
        help="keep all tokens, or only sink + window of streaming heads (default: as the checkpoint says)",
    )
    pieces = "read the prompt in pieces of so many tokens, which needs less memory (default: in one pass)"
    parser.add_argument("--prefill-chunk-size", type=int, metavar="N", help=pieces)
    parser.add_argument("--dense", action="store_true", help="answer with all heads full as well, to compare")
    parser.add_argument("--report-json", type=Path, metavar="FILE", help="write the route report as JSON")
    parser.add_argument("--heatmap", type=Path, metavar="FILE", help="write the decisions as a PNG picture")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default float32)")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    try:
        _check_outputs(args)
        prompt = _read_prompt(args)
        _answer(args, prompt)
    except (ValueError, OSError) as error:
        return complain("generate", error)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuse what could not be written before a model is loaded."""
    for option, path in (("--report-json", args.report_json), ("--heatmap", args.heatmap)):
        if path is not None:
            check_place(option, path)
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{option} {path}: the folder {path.absolute().parent} does not exist; make it first")
    if args.heatmap is not None and args.heatmap.suffix.lower() != ".png":
        raise ValueError(f"--heatmap {args.heatmap} does not end in .png; pictures are written as PNG")


def _read_prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is None and "-" not in (args.stdin, args.prompt):
        return str(args.prompt)
    if args.prompt_file is not None and not args.prompt_file.is_file():
        raise FileNotFoundError(f"--prompt-file {args.prompt_file}: no such file")
    where = "standard input" if args.prompt_file is None else f"--prompt-file {args.prompt_file}"
    try:
        text = sys.stdin.read() if args.prompt_file is None else args.prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte {error.start}); convert it") from error
    return str(text.removeprefix("\ufeff"))  # some editors begin a file with a mark


def _answer(args: argparse.Namespace, prompt: str) -> None:
    from elastic.inference.generate import generate, load
    from elastic.model.attach import elastic_config, override_routes

    where = {"kv_cache": args.kv_cache, "revision": args.revision}
    model, tokenizer = load(args.checkpoint, args.backbone, args.device, args.dtype, **where)
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "chat_template": not args.raw}
    options["sanitize_control_tokens"] = args.sanitize_control_tokens
    if args.prefill_chunk_size is not None:
        options["prefill_chunk_size"] = args.prefill_chunk_size

    def stream() -> Any:
        return _streamer(tokenizer)

    with prompt_progress(model):
        knob = {"sparsity_bias": args.sparsity_bias, "budget": args.budget}
        result = generate(model, tokenizer, prompt, **knob, streamer=stream(), **options)[0]
    say(result.report.render(supports_unicode(sys.stderr)), stream=sys.stderr)
    if args.dense:
        say("\nall heads full:", stream=sys.stderr)
        with override_routes(model, 0, elastic_config(model).sparse.dense), prompt_progress(model):
            dense = generate(model, tokenizer, prompt, streamer=stream(), **options)[0]
        same = sum(a == b for a, b in zip(result.token_ids, dense.token_ids, strict=False))
        longest = max(len(result.token_ids), len(dense.token_ids))
        say(f"{same} of {longest} tokens are the same with all heads full", stream=sys.stderr)
    if args.report_json is not None:
        result.report.to_json(args.report_json)
    if args.heatmap is not None:
        result.report.save_heatmap(args.heatmap)


@contextmanager
def prompt_progress(model: CausalLM) -> Iterator[None]:
    """While a prompt, or a piece of it, is read, a bar on stderr that counts layers, where stderr is a terminal."""
    from tqdm import tqdm

    layers = model.get_decoder().layers
    bar = tqdm(total=len(layers), desc="reading the prompt", unit="layer", leave=False, disable=None)

    def after_layer(_layer: Any, args: tuple[Any, ...], _output: Any) -> None:
        if args[0].shape[1] > 1 and not bar.disable:
            bar.update()
            if bar.n >= len(layers):
                bar.reset()  # for the next piece, if there is one
                bar.clear()

    hooks = [layer.register_forward_hook(after_layer) for layer in layers]
    try:
        yield
    finally:
        bar.close()
        for hook in hooks:
            hook.remove()


def _streamer(tokenizer: Tokenizer) -> Any:
    """Text to stdout as it is made, escaped where the terminal cannot show it."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text, end="\n" if stream_end else "")

    its_own: Any = tokenizer  # transformers asks for its own class
    return Streamer(its_own, skip_prompt=True, skip_special_tokens=True)
