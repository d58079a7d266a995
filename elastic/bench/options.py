"""Options that the benchmarks share: which cases are timed, against whom, for how long, and where the records go."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from elastic.bench.cases import DTYPES, Case
from elastic.bench.contestants import Contestant
from elastic.console import say

LENGTHS = (8192, 16384, 32768, 65536, 131072, 262144)
RATIOS = (0.0, 0.5, 0.75, 1.0)


def add_options(parser: argparse.ArgumentParser, competitors: Mapping[str, Contestant], tag: str) -> None:
    """Give a benchmark's parser the shared options; `tag` is the default name of its files."""
    listed = "; ".join(f"{name}: {one.about}" for name, one in competitors.items())
    add_shape_options(parser, LENGTHS, RATIOS, tag)
    parser.add_argument("--density", type=float, nargs="*", default=(0.25,), metavar="R",
                        help="random block masks that keep this share of the causal blocks (default 0.25)")  # fmt: skip
    parser.add_argument("--contestants", nargs="*", metavar="NAME",
                        help=f"who runs beside our kernel (default: all that are installed). {listed}")  # fmt: skip
    parser.add_argument("--flex-max-length", type=int, default=LENGTHS[-1], metavar="N",
                        help="leave FlexAttention and the serial dispatch out of longer cases")  # fmt: skip


def add_shape_options(
    parser: argparse.ArgumentParser, lengths: tuple[int, ...], ratios: tuple[float, ...], tag: str
) -> None:
    """Lengths, shares of streaming heads and head shape of the cases; time to spend; where the records go."""
    span, listed = f"{lengths[0] // 1024}K-{lengths[-1] // 1024}K", " ".join(f"{ratio:g}" for ratio in ratios)
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths, metavar="N",
                        help=f"tokens (default {span})")  # fmt: skip
    parser.add_argument("--msr", type=float, nargs="*", default=ratios, metavar="R",
                        help=f"shares of streaming KV heads (default {listed})")  # fmt: skip
    parser.add_argument("--heads", type=int, default=32, metavar="H", help="query heads (default 32)")
    parser.add_argument("--kv-heads", type=int, default=8, metavar="K", help="KV heads (default 8)")
    parser.add_argument("--head-dim", type=int, default=128, metavar="D",
                        help="64 or 128; with others `attention` times PyTorch (default 128)")  # fmt: skip
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="element type (default bf16)")
    add_record_options(parser, tag)


def add_record_options(parser: argparse.ArgumentParser, tag: str) -> None:
    """Time to spend, and where the records go."""
    parser.add_argument("--budget-ms", type=float, default=400.0, metavar="MS",
                        help="time for 3 to 50 repeats of one contestant on one case (default 400)")  # fmt: skip
    add_output_options(parser, tag)


def add_output_options(parser: argparse.ArgumentParser, tag: str) -> None:
    """Where the records go; `tag` is the default name of their file."""
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="default runs/bench")
    parser.add_argument("--tag", default=tag, metavar="NAME", help=f"name of the files (default {tag})")
    parser.add_argument("--commit", metavar="HASH", help="commit to state where git is not at hand")


def streaming_heads(ratio: float, kv_heads: int) -> int:
    """KV heads that stream at an MSR.

    Raises:
        ValueError: a ratio that is not a whole number of heads.
    """
    streaming = round(ratio * kv_heads)
    if not 0 <= ratio <= 1 or abs(streaming - ratio * kv_heads) > 1e-6:
        raise ValueError(
            f"--msr {ratio:g} is {ratio * kv_heads:g} of {kv_heads} KV heads; expected a whole number, so a multiple "
            f"of 1/{kv_heads} from 0 to 1"
        )
    return streaming


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases that the options ask for, by length.

    Raises:
        ValueError: a length, ratio or head shape that does not fit.
    """
    shape = {name: getattr(args, name) for name in ("heads", "kv_heads", "head_dim", "dtype")}
    found = []
    for length in args.lengths:
        for ratio in args.msr:
            found.append(Case(length, streaming_heads(ratio, args.kv_heads), **shape))
        found += [Case(length, density=density, **shape) for density in args.density]
    if not found:
        raise ValueError("no case to time; give --msr or --density at least one value")
    return found


def chosen(args: argparse.Namespace, competitors: Mapping[str, Contestant]) -> dict[str, Contestant]:
    """The contestants to run. Those that nobody asked for by name and whose package is absent are left out, which is
    said.

    Raises:
        ValueError: an unknown name, one asked for by name that is not installed, or a budget that is not a time.
    """
    if not args.budget_ms > 0:
        raise ValueError(f"--budget-ms {args.budget_ms:g} is not positive; the default is 400")
    if args.contestants is None:
        for name, one in competitors.items():
            if not one.installed:
                say(f"{name} left out: {one.package} is not installed")
        return {name: one for name, one in competitors.items() if one.installed}
    for name in args.contestants:
        if name not in competitors:
            raise ValueError(f"there is no contestant {name!r}; expected some of {', '.join(competitors)}")
        if not competitors[name].installed:
            package = competitors[name].package
            raise ValueError(f"{name} needs {package}, which is not installed; run `pip install --pre {package}`")
    return {name: competitors[name] for name in competitors if name in args.contestants}


def kernel_device(
    args: argparse.Namespace, unsupported_reason: Callable[[torch.device, torch.dtype, int], str | None]
) -> torch.device:
    """The GPU that the kernels are timed on.

    Raises:
        ValueError: there is none that runs them, by `unsupported_reason`.
    """
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    why = unsupported_reason(device, DTYPES[args.dtype], args.head_dim)
    if why is not None:
        raise ValueError(
            f"timing the kernels needs an NVIDIA GPU that runs them: {why}; `elastic doctor` shows what this machine "
            "can run, `elastic bench table DIR` shows the records of another one"
        )
    return device
