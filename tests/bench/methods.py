"""Quality of ways to run attention on held-out data: dense, XAttention, streaming, and the routers of one checkpoint
between the modes of every configuration. Writes records for `elastic bench table`.

    python -m data_prep.pack_mixture configs/mixture/heldout-long.yaml --out data/heldout-long
    python tests/bench/methods.py --checkpoint runs/smollm2-gpu/checkpoint --out tests/bench/results

Several processes may share the methods, and routers trained for other configurations may be compared with them:

    python tests/bench/methods.py --checkpoint runs/fa-ssa/checkpoint --methods elastic dense --tag methods-1
    python tests/bench/methods.py --checkpoint runs/fa-xa/checkpoint --methods elastic --name fa-xa --tag methods-2
    elastic bench merge runs/bench/methods-*.json --out tests/bench/results --tag methods
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from elastic.bench.records import save, stamp
from elastic.bench.studies.methods import density_cells, records, score_cells
from elastic.console import say, table
from elastic.routing.methods import GRAMMAR, parse_method

METHODS = (
    *("elastic", "dense", "xattention:0.8", "xattention:0.9", "xattention:0.95", "streaming"),
    *("elastic/fa-xa", "elastic/xa-ssa"),
)


def build_parser() -> argparse.ArgumentParser:
    """What is compared on what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="routers, as `elastic fit` leaves them")
    parser.add_argument("--data", type=Path, default=Path("data/heldout-long"), help="packed data with a test split")
    parser.add_argument("--batches", type=int, help="so many of the shuffled data; default all")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="evaluate no further batch after these")
    parser.add_argument("--batch-rows", type=int, default=8, help="packed rows in a forward pass")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"as for `elastic test`: {GRAMMAR}")
    parser.add_argument("--name", default="elastic", help="what the records call the checkpoint's routers")
    parser.add_argument("--dtype", default="bfloat16", help="of the backbone")
    parser.add_argument("--stride", type=int, help="of XAttention; default the checkpoint's")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--tag", default="methods", help="name of the file")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    return parser


DEFAULTS = {action.dest: action.default for action in build_parser()._actions}


def evaluate(args: argparse.Namespace) -> dict:
    """What `elastic test` would measure with the checkpoint's routers."""
    from dataclasses import replace

    import torch
    from lightning import Trainer
    from torch.utils.data import DataLoader, Subset

    from elastic.config import ElasticConfig
    from elastic.data.datamodule import MixtureDataModule, collate_placed
    from elastic.model.checkpoint import read_elastic
    from elastic.training.evaluation_module import RoutedModule
    from elastic.training.result_files import results_of

    stored = read_elastic(args.checkpoint)
    config = ElasticConfig.from_dict(stored["config"])
    config = replace(config, sparse=replace(config.sparse, stride=args.stride or config.sparse.stride))
    deadline = time.monotonic() + args.seconds

    class Timed(RoutedModule):
        """For a limited time."""

        def test_step(self, batch: Any, batch_idx: int) -> None:
            if time.monotonic() < deadline:
                super().test_step(batch, batch_idx)

    class Shuffled(MixtureDataModule):
        """Rows in a random order, the same in every run, so that any number of them is a fair sample."""

        def test_dataloader(self) -> DataLoader:
            rows = super().test_dataloader().dataset
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
            return DataLoader(Subset(rows, order), batch_size=args.batch_rows, collate_fn=collate_placed)

    module = Timed(stored["backbone"], config, args.dtype, None, 1024, args.methods, str(args.checkpoint))
    data = Shuffled(str(args.data), rows_per_step=args.batch_rows, micro_batch_rows=args.batch_rows)
    trainer = Trainer(
        devices=1, logger=False, enable_model_summary=False, enable_progress_bar=False, enable_checkpointing=False,
        limit_test_batches=args.batches or 1.0,
    )  # fmt: skip
    trainer.test(module, data, verbose=False)
    return results_of(module, "test", str(args.checkpoint))


def recipe(checkpoint: Path) -> dict[str, Any]:
    """How the routers were trained."""
    from elastic.model.checkpoint import read_elastic

    stored = read_elastic(checkpoint)
    told = {name: stored["recipe"].get(name) for name in ("step", "seed", "objective")}
    return {**told, "weights_sha256": stored["weights_sha256"]}


def repeat(args: argparse.Namespace) -> str:
    """The command, without folders."""
    words = ["python", "tests/bench/methods.py"]
    for name in ("batches", "seconds", "batch_rows", "methods", "name", "dtype", "stride"):
        value = getattr(args, name)
        if value != DEFAULTS[name]:
            words += [f"--{name.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    return " ".join(words)


def own_name(method: str, name: str) -> str:
    """A method of these routers under the name that their records have: `elastic/xa-ssa` as `<name>/xa-ssa`."""
    return name + method.removeprefix("elastic") if parse_method(method).kind == "elastic" else method


def main(argv: list[str]) -> int:
    """Evaluate, write the records, print the tables."""
    import torch

    args = build_parser().parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    made_by = stamp(repeat(args), args.commit, device)
    results = evaluate(args)
    sizes = {name: results["elastic"]["sparse"][name] for name in ("sink", "window", "block", "stride", "threshold")}
    told = {**sizes, "routers": recipe(args.checkpoint), **made_by}
    found = [{**record, "who": own_name(record["who"], args.name), **told} for record in records(results)]
    for header, rows in (score_cells(found), density_cells(found)):
        say(table(header, rows) + "\n")
    say(f"wrote {save(args.out / f'{args.tag}.json', found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
