"""`elastic calibrate`: measure what each KV head of a backbone is needed for, and write an order of the heads."""

import argparse
import logging
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.commands.calibration_report import advice, comparison, cost_table, describe, draw
from elastic.commands.catalogue import COMMANDS
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.console import Parser, complain, hint, say
from elastic.files import check_place, find_config, is_foreign, read_yaml
from elastic.routing.calibration import Calibration, read_calibration
from elastic.routing.methods import MODES

if TYPE_CHECKING:
    from elastic.data.calibration_rows import RowSet
    from elastic.training.calibration import HeadNeed

SIZES = {"sink": "streaming", "window": "streaming", "block": "streaming", "stride": "XAttention"}  # heads of which


@dataclass(frozen=True)
class Target:
    """What is calibrated: a backbone, and what its heads choose between."""

    backbone: str
    dtype: str
    gguf_file: str | None
    sparse: SparseConfig


def build_parser() -> argparse.ArgumentParser:
    """Options of the command."""
    parser = Parser(prog="elastic calibrate", description=COMMANDS["calibrate"])
    what = parser.add_argument_group("what is measured")
    named = "backbone, dtype and sparse settings of a shipped configuration (tiny, model/qwen3-4b) or a YAML file"
    what.add_argument("-c", "--config", action="append", default=[], metavar="NAME|FILE", help=named)
    what.add_argument("name", nargs="?", metavar="BACKBONE", help="tiny, smollm2-135m, a folder or a hub id")
    what.add_argument("--backbone", metavar="NAME", help="the same")
    what.add_argument("--gguf-file", metavar="FILE", help="where its weights are in GGUF format")
    what.add_argument("--dtype", help="float32, bfloat16 or float16 (default float32, on a GPU bfloat16)")
    for name, heads in SIZES.items():
        told = f"of {heads} heads, in tokens (default {getattr(SparseConfig(), name)})"
        what.add_argument(f"--{name}", type=int, metavar="N", help=told)
    what.add_argument("--modes", choices=list(MODES), help="modes of routes 0 and 1 (default fa-ssa)")
    ways = "gradient: one backward pass for all heads; ablation: every head by itself, in rounds (default gradient)"
    what.add_argument("--by", choices=("gradient", "ablation"), default="gradient", help=ways)
    what.add_argument(
        "--rates",
        type=_numbers,
        default=(0.1, 0.2, 0.35),
        metavar="P,P",
        help="of random routes (default 0.1,0.2,0.35)",
    )
    context = "random routes of the second round, in which cheap heads mostly run sparse (default 3; 0: no such round)"
    what.add_argument("--draws", type=int, default=3, metavar="N", help=context)
    what.add_argument(
        "--rounds", type=_numbers, default=(0.0, 0.5, 0.75), metavar="M,M", help="of ablation (default 0,0.5,0.75)"
    )
    rows = parser.add_argument_group("on which rows (default: the offline generators)")
    rows.add_argument("--data", type=Path, metavar="DIR", help="packed data")
    rows.add_argument("--split", default="train", help="of packed data (default train)")
    rows.add_argument("--text", type=Path, metavar="DIR", help="folder of .txt and .md files, judged as they are")
    samples = "that make the order; half as many measure what it costs (default 144)"
    rows.add_argument("--samples", type=int, default=144, metavar="N", help=samples)
    lengths = "tokens of contexts or pieces of text (default 2, 4 and 6 times what streaming heads see)"
    rows.add_argument("--lengths", type=_whole, metavar="N,N", help=lengths)
    rows.add_argument("--seed", type=int, default=0, help="of rows and random routes (default 0)")
    run = parser.add_argument_group("how it runs")
    run.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    run.add_argument("--devices", type=int, default=1, metavar="N", help="processes, a GPU each (default 1)")
    batch = "in a forward pass, at least one sample (default 32768, or as many as a GPU's memory holds)"
    run.add_argument("--batch-tokens", type=int, metavar="N", help=batch)
    again = "recompute layers in the backward pass (default: by a GPU's memory, on a CPU from a billion parameters on)"
    run.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, help=again)
    out = parser.add_argument_group("what comes out")
    out.add_argument(
        "--out", type=Path, metavar="FILE", help="calibration to write (default runs/calibrate/<backbone>.json)"
    )
    fitted = (
        "also fit level routers, which go down the order as far as an input allows, and write this checkpoint folder"
    )
    out.add_argument("--levels", type=Path, metavar="DIR", help=fitted)
    count = "that level routers are fitted to, apart from the others (default 480)"
    out.add_argument("--level-samples", type=int, default=480, metavar="N", help=count)
    budget = f"divergence that level routers stay below, in nats per answer token (default {RouterConfig().budget})"
    out.add_argument("--budget", type=float, default=RouterConfig().budget, metavar="NATS", help=budget)
    out.add_argument("--picture", type=Path, metavar="FILE", help="draw need and cost as a PNG picture")
    other = "print how well the order finds the heads that this calibration needs most; two files: compare the first "
    out.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help=f"{other}with the second, measure nothing")
    return parser


def main(argv: list[str]) -> int:
    """Run the command."""
    args = build_parser().parse_args(argv)
    # Sums on a GPU repeat only with this; torch must not be loaded before.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        if len(args.compare or ()) > 1:
            if len(args.compare) > 2:
                raise ValueError(f"--compare names {len(args.compare)} files; expected one or two")
            say(comparison(*map(read_calibration, args.compare)))
        else:
            run(args)
    except (ValueError, OSError) as error:
        return complain("calibrate", error)
    return 0


def run(args: argparse.Namespace) -> None:
    """Check everything that can be checked, measure, write the file, say what it is good for."""
    target = read_target(args)
    out = args.out or Path("runs/calibrate") / f"{Path(target.backbone).name}.json"
    reference = check_outputs(out, args, target)
    if args.levels is not None:
        check_levels(args, target)
    from lightning.pytorch.utilities import rank_zero_only

    from elastic.commands.calibration_data import Wanted, build, choose_sizes
    from elastic.model.loading import check_device
    from elastic.training.head_need import Recipe
    from elastic.training.partial_results import partial_file

    check_device(args.device)
    if args.devices < 1 or (":" in args.device and args.devices > 1):
        raise ValueError(f"--devices {args.devices} with --device {args.device}; expected 1, or more with cpu or cuda")
    recipe = Recipe(args.by, args.rates, args.draws, args.rounds, args.seed)
    tell: Callable[[str], Any] = rank_zero_only(say)  # other processes run this too
    began = time.perf_counter()
    if told := choose_sizes(args, target):
        tell(told)
    rows, origin = build(
        Wanted(target.backbone, target.gguf_file, target.sparse, args.samples, args.lengths, args.batch_tokens,
               args.seed, args.data, args.split, args.text, args.level_samples if args.levels else 0)
    )  # fmt: skip
    tell("\n".join(map(describe, ("order", "cost", "levels"), rows)))
    found, module = _measured(args, target, recipe, rows, partial_file(out), origin)
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return
    found.write(out)
    say(f"\n{cost_table(found)}\n")
    if reference is not None:
        say(f"{comparison(found, reference)}\n")
    picture = [str(draw(found, args.picture))] if args.picture else []
    made = [str(write_levels(module, found, args.levels, args.budget))] if args.levels else []
    say(f"Written: {', '.join([str(out), *picture, *made])}")
    say(advice(found, out, args.levels))
    partial_file(out).unlink(missing_ok=True)
    say(f"Done in {(time.perf_counter() - began) / 60:.1f} minutes.")


def read_target(args: argparse.Namespace) -> Target:
    """Backbone and sparse settings: of the configurations, later ones winning, then of the options.

    Raises:
        FileNotFoundError: no such configuration.
        ValueError: no backbone, or settings that do not exist.
    """
    model: dict[str, Any] = {}
    sparse: dict[str, Any] = {}
    known = [field.name for field in fields(SparseConfig)]
    for name in args.config:
        try:
            layer = read_yaml(find_config(name)).get("model") or {}
            model |= {key: layer[key] for key in ("backbone", "dtype", "gguf_file") if key in layer}
            own = (layer.get("elastic") or {}).get("sparse") or {}
            if unknown := [key for key in own if key not in known]:
                raise ValueError(
                    f"-c {name} sets model.elastic.sparse.{unknown[0]}, which is not a setting; "
                    f"{hint(str(unknown[0]), known, 'settings there')}"
                )
            sparse |= own
        except (AttributeError, TypeError) as error:
            raise ValueError(f"-c {name} is not a configuration of this project ({error})") from error
    sparse |= {name: value for name in SIZES if (value := getattr(args, name)) is not None}
    if args.name and args.backbone and args.name != args.backbone:
        raise ValueError(f"two backbones are named, {args.name} and --backbone {args.backbone}; name one")
    backbone = args.name or args.backbone or model.get("backbone")
    if not backbone:
        raise ValueError("no backbone is named; write its name, or -c with a configuration that has one")
    settings = SparseConfig(**sparse)
    if args.modes:
        route0, route1 = MODES[args.modes]
        settings = replace(settings, route0=route0, route1=route1)
    usual = "bfloat16" if args.device.startswith("cuda") else "float32"  # the kernels take 16 bits
    dtype, gguf_file = args.dtype or model.get("dtype") or usual, args.gguf_file or model.get("gguf_file")
    return Target(backbone, dtype, gguf_file, settings)


def check_outputs(out: Path, args: argparse.Namespace, target: Target) -> Calibration | None:
    """Refuse what could not be written before anything is measured; the calibration to compare with, if one is named.

    Raises:
        ValueError: names that do not fit, or a file that is something else, or of another backbone or modes.
    """
    check_place("--out", out)
    if args.picture is not None:
        check_place("--picture", args.picture)
    if args.levels is not None:
        check_place("--levels", args.levels, folder=True)
    if out.suffix != ".json":
        raise ValueError(f"--out {out} does not end in .json; a calibration is a JSON file")
    if out.exists():
        try:
            there = read_calibration(out)
        except (ValueError, OSError) as error:
            raise ValueError(f"--out {out} exists but is not a calibration that may be replaced ({error})") from error
        _check_replaced("--out", out, "a calibration", there.backbone, there.sparse, target)
    if args.picture is not None and args.picture.suffix.lower() != ".png":
        raise ValueError(f"--picture {args.picture} does not end in .png; pictures are written as PNG")
    return read_calibration(args.compare[0]) if args.compare else None


def _check_replaced(flag: str, path: Path, what: str, backbone: str, sparse: SparseConfig, target: Target) -> None:
    """What takes long to make is replaced by the like of it alone.

    Raises:
        ValueError: naming both.
    """
    from elastic.model.loading import backbone_id

    mine = f"{backbone_id(target.backbone)!r} for {target.sparse.name}"
    if mine != (theirs := f"{backbone!r} for {sparse.name}"):
        raise ValueError(f"{flag} {path} is {what} of {theirs}, which one of {mine} would replace; name another place")


def check_levels(args: argparse.Namespace, target: Target) -> None:
    """Refuse level routers that could not be fitted or written, before anything is measured.

    Raises:
        ValueError: with the reason.
    """
    from elastic.model.checkpoint import METADATA, read_elastic

    if is_foreign(args.levels, METADATA):
        raise ValueError(f"--levels {args.levels} exists but is not a checkpoint that may be replaced")
    if (args.levels / METADATA).exists():
        there = read_elastic(args.levels)
        config = ElasticConfig.from_dict(there["config"])
        if config.router.kind != "level":
            raise ValueError(
                f"--levels {args.levels} holds routers of kind {config.router.kind}, which stay; name another place"
            )
        _check_replaced("--levels", args.levels, "a checkpoint", there["backbone"], config.sparse, target)
    RouterConfig(kind="level", budget=args.budget)
    if args.level_samples < 1:
        raise ValueError(f"--level-samples {args.level_samples} is below 1")


def _measured(
    args: argparse.Namespace, target: Target, recipe: Any, rows: list["RowSet"], partial: Path, origin: Any
) -> tuple[Calibration, "HeadNeed"]:
    """The calibration, and what measured it; a batch that does not fit into memory is the user's to make smaller."""
    import torch
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from elastic.training.calibration import HeadNeed
    from elastic.training.calibration_run import measure

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice of libraries that no user can act on
        try:
            module = HeadNeed(
                target.backbone, target.sparse, recipe, (rows[0], rows[1]), partial, origin, target.dtype,
                target.gguf_file, args.checkpointing, level_rows=rows[2] if args.levels else None,
            )  # fmt: skip
            return measure(module, args.device, args.devices), module
        except MisconfigurationException as error:
            raise ValueError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"a batch ran out of the memory of {args.device} with --batch-tokens {args.batch_tokens}; use fewer, "
                "--checkpointing, or shorter --lengths; what was measured so far is kept where rows stay the same"
            ) from error


def write_levels(module: "HeadNeed", found: Calibration, path: Path, budget: float) -> Path:
    """Fit level routers and write their checkpoint."""
    from elastic.data.prompts import TEMPLATE
    from elastic.model.checkpoint import save_elastic

    explained = module.fit(budget)
    recipe = {"by": "outcomes", "order": found.provenance["by"], "budget": budget, "data": found.provenance["data"]}
    rounded = [round(share, 4) for share in explained]
    measured, told = {"explained variance by layer": rounded}, found.provenance["data"].get(TEMPLATE)
    return save_elastic(path, module.model, found.backbone, None, recipe, measured, told)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _whole(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


# What argparse calls them in its messages.
_numbers.__name__, _whole.__name__ = "list of numbers", "list of whole numbers"
