"""Quality of ways to run attention on held-out data: dense, XAttention, streaming, and the routers of one checkpoint
between the modes of every configuration. Writes records for `elastic bench table`.

    python -m data_prep.pack_mixture configs/mixture/heldout.yaml --out data/heldout
    python tests/bench/methods.py --checkpoint runs/smollm2-gpu/checkpoint --data data/heldout --out tests/bench/results
"""

import argparse
import sys
from pathlib import Path

from elastic.bench.methods import density_cells, records, score_cells
from elastic.bench.records import save, stamp
from elastic.console import say, table

METHODS = (
    *("elastic", "dense", "xattention:0.8", "xattention:0.9", "xattention:0.95", "streaming"),
    *("elastic:fa-xa", "elastic:xa-ssa"),
)


def build_parser() -> argparse.ArgumentParser:
    """What is compared on what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="routers, as `elastic fit` leaves them")
    parser.add_argument("--data", type=Path, default=Path("data/heldout"), help="packed data with a test split")
    parser.add_argument("--batches", type=int, help="first ones of the data; default all")
    parser.add_argument("--batch-rows", type=int, default=4, help="packed rows in a forward pass")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="as for `elastic test`")
    parser.add_argument("--dtype", default="bfloat16", help="of the backbone")
    parser.add_argument("--stride", type=int, help="of XAttention; default the checkpoint's")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--tag", default="methods", help="name of the file")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    return parser


def evaluate(args: argparse.Namespace) -> dict:
    """What `elastic test` would measure with the checkpoint's routers."""
    from dataclasses import replace

    from lightning import Trainer

    from elastic.backbone import routers
    from elastic.checkpoint import read_elastic
    from elastic.config import ElasticConfig
    from elastic.data import MixtureDataModule
    from elastic.inference import load
    from elastic.results import results_of
    from elastic.routed_module import RoutedModule

    stored = read_elastic(args.checkpoint)
    config = ElasticConfig.from_dict(stored["config"])
    config = replace(config, sparse=replace(config.sparse, stride=args.stride or config.sparse.stride))
    trained = [router.state_dict() for router in routers(load(args.checkpoint)[0])]

    class Trained(RoutedModule):
        """With the checkpoint's routers."""

        def configure_model(self) -> None:
            super().configure_model()
            for router, state in zip(routers(self.model), trained, strict=True):
                router.load_state_dict(state)

    module = Trained(stored["backbone"], config, args.dtype, None, 1024, args.methods)
    data = MixtureDataModule(str(args.data), rows_per_step=args.batch_rows, micro_batch_rows=args.batch_rows)
    trainer = Trainer(
        devices=1, logger=False, enable_model_summary=False, enable_progress_bar=False, enable_checkpointing=False,
        limit_test_batches=args.batches or 1.0,
    )  # fmt: skip
    trainer.test(module, data, verbose=False)
    return results_of(module, "test", str(args.checkpoint))


def main(argv: list[str]) -> int:
    """Evaluate, write the records, print the tables."""
    import torch

    args = build_parser().parse_args(argv)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    shown = [word for word in ("--dtype", args.dtype) if args.dtype != "bfloat16"]
    shown += [] if args.batches is None else ["--batches", str(args.batches)]
    facts = stamp(" ".join(["python tests/bench/methods.py", *shown]), args.commit, device)
    found = [{**record, **facts} for record in records(evaluate(args))]
    for header, rows in (score_cells(found), density_cells(found)):
        say(table(header, rows) + "\n")
    say(f"wrote {save(args.out / f'{args.tag}.json', found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
