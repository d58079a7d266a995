"""What `elastic calibrate` costs: SmolLM2-135M by the command itself, and a model of Llama-3.1-8B's shape with random
weights at 8K tokens, on a GPU. Writes records for `elastic bench table`.

    python tests/bench/calibration.py --out tests/bench/results

Of the large model a few samples are measured, the first batch of every round left out; the whole is reckoned from them.
"""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from elastic.bench.records import Measurement, save, stamp
from elastic.bench.tables import terminal
from elastic.commands.calibrate import build_parser as calibrate_parser
from elastic.commands.calibrate import main as calibrate
from elastic.commands.calibration_report import comparison
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.console import say
from elastic.data.calibration_rows import RowSet, batches_of
from elastic.data.packing import Sample
from elastic.model.attach import attach
from elastic.model.loading import architecture
from elastic.routing.calibration import agreement as compare
from elastic.routing.calibration import read_calibration
from elastic.training.calibration import HeadNeed
from elastic.training.calibration_run import measure
from elastic.training.head_need import CURVE, Recipe

GIB = 2**30
LENGTH, ANSWER = 8192, 64  # tokens of a sample of the large model, and those of them that are judged
SAMPLES: int = calibrate_parser().get_default("samples")
SMALL = ["--backbone", "smollm2-135m", "--window", "512", "--dtype", "bfloat16", "--device", "cuda"]


class RandomLlama(HeadNeed):
    """A model of Llama-3.1-8B's shape, random weights."""

    def configure_model(self) -> None:
        """Build it on the GPU, once."""
        if self.model is not None:
            return
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, max_position_embeddings=131072, rope_theta=5e5, attn_implementation="sdpa",
        )  # fmt: skip
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("cuda"):
                model: Any = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        self.model = attach(model, ElasticConfig(RouterConfig(kind="static"), self.sparse))
        self.shape = architecture(model)
        self.size = self.shape["num_layers"], self.shape["num_kv_heads"]
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.checkpointing = True


def small(by: str, folder: Path) -> Iterator[Measurement]:
    """Time and memory of the command on SmolLM2; the calibration stays in the folder."""
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    if calibrate([*SMALL, "--by", by, "--out", str(folder / f"{by}.json")]):
        raise SystemExit(f"`elastic calibrate --by {by}` failed")
    seconds = time.perf_counter() - began
    yield record("smollm2-135m", by, "time of the command", seconds, "s", samples=SAMPLES)
    yield record("smollm2-135m", by, "peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB")


def large(batches: int, folder: Path) -> Iterator[Measurement]:
    """Seconds a sample and memory of the large model, and what all samples of a calibration would take."""
    generator = torch.Generator().manual_seed(0)

    def rows(count: int) -> RowSet:
        drawn = torch.randint(10, 120000, (count, LENGTH), generator=generator).tolist()
        return batches_of([Sample(ids, LENGTH - ANSWER, 0, "random") for ids in drawn], LENGTH)

    sets = rows(batches), rows(batches)
    module = RandomLlama("random-8b", SparseConfig(), Recipe(), sets, folder / "8b.partial", dtype="bfloat16")
    seconds = {of.name: timed(of) for of in module.rounds}
    torch.cuda.reset_peak_memory_stats()
    measure(module, "cuda", progress=False)
    a_sample = {name: sum(times[1:]) / len(times[1:]) for name, times in seconds.items()}
    for name, value in a_sample.items():
        yield record("8b-8k", name, "time of a sample", value, "s", samples=batches - 1, length=LENGTH)
    of_order = SAMPLES * sum(value for name, value in a_sample.items() if name != CURVE)
    whole = of_order + SAMPLES // 2 * a_sample[CURVE]
    yield record(
        "8b-8k", "gradient", f"time of {SAMPLES} + {SAMPLES // 2} samples, reckoned", whole, "s", length=LENGTH
    )
    yield record("8b-8k", "gradient", "peak memory", torch.cuda.max_memory_allocated() / GIB, "GiB", length=LENGTH)


def timed(of: Any) -> list[float]:
    """Let a round note the seconds of each of its batches."""
    seconds: list[float] = []
    inner: Callable[..., torch.Tensor] = of.measure

    def run(*args: Any) -> torch.Tensor:
        torch.cuda.synchronize()
        began = time.perf_counter()
        values = inner(*args)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        return values

    object.__setattr__(of, "measure", run)  # rounds are frozen
    return seconds


def agreement(folder: Path) -> Iterator[Measurement]:
    """Need by ablation that the top fifth of the gradient's order covers, as a share of what ablation's own covers."""
    cheap, exact = (read_calibration(folder / f"{by}.json") for by in ("gradient", "ablation"))
    say(comparison(cheap, exact))
    found = compare(cheap, exact)
    about = f"need covered by its {found.heads} most needed of {len(exact.order)} heads"
    yield record("smollm2-135m", "gradient", about, found.covered, "of ablation's own")


def record(case: str, who: str, metric: str, value: float, unit: str, **about: Any) -> Measurement:
    """One figure."""
    return {"case": case, "who": who, "metric": metric, "value": value, "unit": unit, **about}


def main(argv: Sequence[str]) -> int:
    """Measure, write the records, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("gradient", "ablation", "8b")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--batches", type=int, default=3, help="samples of the large model, from 2 on (default 3)")
    parser.add_argument("--keep", type=Path, help="folder for the calibrations (default: none is kept)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--tag", default="calibration", help="name of the file")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    words = ["python tests/bench/calibration.py", "--parts", *args.parts, "--batches", str(args.batches)]
    made_by = stamp(" ".join(words), args.commit, torch.device("cuda", 0))
    with TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        found: list[Measurement] = []
        for part in args.parts:
            found += large(args.batches, Path(scratch)) if part == "8b" else small(part, folder)
        if all((folder / f"{by}.json").is_file() for by in ("gradient", "ablation")):
            found += agreement(folder)
    found = [{**one, **made_by} for one in found]
    say(terminal(found))
    say(f"wrote {save(args.out / f'{args.tag}.json', found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
