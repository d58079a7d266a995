"""Static heads by the recipes of DuoAttention and PruLong on our rows: rivals of the order by measured need. Each
writes a pattern file, a number per KV head, which `static:<file>@<msr>` reads in every command.

    python tests/bench/static_recipes.py duo prulong --data-dir data/routing --out runs/recipes --seeds 0 1 2

Both mix every head's full and streaming output by a gate of its own, 1 for full. The answers of the mixture are what
they are judged on, where DuoAttention takes its pass keys and PruLong all tokens of long texts.
Legend: L layers, K KV heads, P labelled positions, E hidden size.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, its neighbours are found too

from elastic.bench.training import BothModes
from elastic.config import ElasticConfig, SparseConfig
from elastic.console import say
from elastic.data.calibration_rows import of_folder
from elastic.data.packing import Batch, collate
from elastic.data.shards import read_manifest
from elastic.files import write_atomic
from elastic.model.attach import attach, handle_of, override_routes, routers, set_row_slice
from elastic.model.loading import load_backbone
from elastic.model.logits import logit_head
from elastic.model.pass_state import forced_on, forcing
from elastic.training.evaluation_module import packed_hidden_states
from elastic.training.losses import chunked_cross_entropy, labelled_positions

LOSS_CHUNK = 1024


class Recipe(Protocol):
    """How gates are learned."""

    def gates(self) -> Tensor:
        """Gates [L, K] of a step, 1 for full attention, with gradient."""
        ...

    def step(self, model: Any, batch: Batch, gates_LK: Tensor, progress: float) -> dict[str, float]:
        """One step on a batch whose gates these are; what is shown of it. `progress` from 0 to 1."""
        ...

    def scores(self) -> Tensor:
        """How much each head needs full attention, [L, K]."""
        ...


def mixed(model: Any, batch: Batch, gates_LK: Tensor) -> Tensor:
    """Final hidden states [1, S, E] of the mixture."""
    state = handle_of(model).state
    with forcing(state, replace(forced_on(state), route=1 - gates_LK)):
        return packed_hidden_states(model, batch)


class DuoAttention:
    """arXiv 2410.10819: gates clamped to [0, 1] from 1 on; squared difference of the last hidden states to the dense
    model's, mean over E and answer tokens, plus 0.05 times the mean gate. AdamW at 0.02, with a fifth of the steps to
    rise and a fifth to fall. As in its published code.
    """

    REGULARISER, LR = 0.05, 0.02

    def __init__(self, layers: int, kv_heads: int, device: torch.device) -> None:
        self.gate_LK = nn.Parameter(torch.ones(layers, kv_heads, device=device))
        self.descent = torch.optim.AdamW([self.gate_LK], lr=self.LR, weight_decay=0.0)

    def gates(self) -> Tensor:
        """The clamped gates."""
        with torch.no_grad():
            self.gate_LK.clamp_(0, 1)
        return self.gate_LK

    def step(self, model: Any, batch: Batch, gates_LK: Tensor, progress: float) -> dict[str, float]:
        """Distil, descend."""
        with torch.no_grad(), override_routes(model, 0):
            dense_PE, _ = labelled_positions(packed_hidden_states(model, batch), batch["labels"])
        routed_PE, _ = labelled_positions(mixed(model, batch, gates_LK), batch["labels"])
        distance = (routed_PE.float() - dense_PE.float()).square().mean()
        size = gates_LK.abs().mean()
        self.descent.param_groups[0]["lr"] = self.LR * min(1.0, max(5 * progress, 0.1), max(5 * (1 - progress), 0.1))
        (distance + self.REGULARISER * size).backward()
        self.descent.step()
        self.descent.zero_grad()
        return {"distance": distance.item(), "mean gate": size.item()}

    def scores(self) -> Tensor:
        """The gates."""
        return self.gates().detach()


class PruLong:
    """arXiv 2506.17121: gates are hard-concrete variables (Louizos et al. 2018; temperature 2/3, stretched to
    [-0.1, 1.1]); next-token loss plus l1 (s - t) + l2 (s - t)^2 with s the expected share of gates that are 0. The
    target t rises from 0 to `end` over the first 80 % of the steps; masks descend and l1, l2 ascend by Adam at 1.0.
    """

    BETA, LOW, HIGH, LR, WARMUP, START = 2 / 3, -0.1, 1.1, 1.0, 0.8, 5.0

    def __init__(self, layers: int, kv_heads: int, device: torch.device, end: float = 0.7, lr: float = LR) -> None:
        self.end = end
        self.log_alpha_LK = nn.Parameter(torch.full((layers, kv_heads), self.START, device=device))
        self.price_2 = nn.Parameter(torch.zeros(2, device=device))
        self.descent = torch.optim.Adam([self.log_alpha_LK], lr=lr)
        self.ascent = torch.optim.Adam([self.price_2], lr=lr, maximize=True)

    def gates(self) -> Tensor:
        """Sampled gates."""
        u_LK = torch.rand_like(self.log_alpha_LK).clamp(1e-6, 1 - 1e-6)
        soft_LK = torch.sigmoid((u_LK.log() - (1 - u_LK).log() + self.log_alpha_LK) / self.BETA)
        return (soft_LK * (self.HIGH - self.LOW) + self.LOW).clamp(0, 1)

    def sparsity(self) -> Tensor:
        """Expected share of gates that are 0: 1 - sigmoid(log alpha - beta log(-low / high)). Scalar."""
        return 1 - torch.sigmoid(self.log_alpha_LK - self.BETA * math.log(-self.LOW / self.HIGH)).mean()

    def step(self, model: Any, batch: Batch, gates_LK: Tensor, progress: float) -> dict[str, float]:
        """Descend on the masks, ascend on the prices."""
        loss = chunked_cross_entropy(mixed(model, batch, gates_LK), logit_head(model), batch["labels"], LOSS_CHUNK)
        over = self.sparsity() - self.end * min(1.0, progress / self.WARMUP)
        (loss + self.price_2[0] * over + self.price_2[1] * over**2).backward()
        self.descent.step()
        self.ascent.step()
        self.descent.zero_grad()
        self.ascent.zero_grad()
        return {"loss": loss.item(), "sparsity": self.sparsity().item()}

    def scores(self) -> Tensor:
        """The probability that a gate is not 0; its order is that of log alpha."""
        return torch.sigmoid(self.log_alpha_LK.detach() - self.BETA * math.log(-self.LOW / self.HIGH))


RECIPES = {"duo": DuoAttention, "prulong": PruLong}


@dataclass(frozen=True)
class Rows:
    """Where training rows come from."""

    data_dir: Path
    batch_tokens: int

    def batches(self, steps: int, seed: int, device: torch.device) -> Iterator[Batch]:
        """A batch for each step, all of the drawn ones before any comes again."""
        samples = steps * max(1, self.batch_tokens // 512)  # more than the steps hold: short samples are 512 tokens
        found = of_folder(self.data_dir, read_manifest(self.data_dir), "train", (samples, 1), self.batch_tokens, seed)
        drawn = found[0].batches
        for step in range(steps):
            batch: Any = collate(drawn[step % len(drawn)])
            yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}  # type: ignore[misc]


def learn(model: Any, recipe: Recipe, batches: Iterator[Batch], steps: int) -> Tensor:
    """Scores [L, K] after the steps; the model is attached and stays as it was."""
    previous = set_row_slice(model, BothModes())
    try:
        for number, batch in enumerate(batches):
            shown = recipe.step(model, batch, recipe.gates(), (number + 1) / steps)
            if not all(math.isfinite(value) for value in shown.values()):
                raise FloatingPointError(f"step {number} gave {shown}; the rate is too high for these rows")
            if number % max(1, steps // 10) == 0 or number == steps - 1:
                say(f"step {number + 1} of {steps}: " + ", ".join(f"{name} {v:.4g}" for name, v in shown.items()))
    finally:
        set_row_slice(model, previous)
    return recipe.scores()


def write_pattern(path: Path, score_LK: Tensor) -> Path:
    """A line per layer, a number per KV head."""
    lines = ["\t".join(f"{value:.6g}" for value in line) for line in score_LK.tolist()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "\n".join(lines) + "\n")
    return path


def main(argv: Sequence[str]) -> int:
    """Learn by every recipe and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", choices=list(RECIPES))
    parser.add_argument("--data-dir", type=Path, required=True, help="packed data with a train split")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"), help="folder of <recipe>-<seed>.tsv")
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--gguf-file", help="where the backbone's weights are in GGUF format")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch-tokens", type=int, default=16384, help="of a step (default 16384)")
    parser.add_argument("--sink", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of the backbone (default bfloat16)")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    sparse = SparseConfig(sink=args.sink, window=args.window, block=args.block)
    model, _ = load_backbone(args.backbone, dtype=args.dtype, device=args.device, gguf_file=args.gguf_file)
    layers = routers(attach(model, ElasticConfig(sparse=sparse)))
    for name in args.recipes:
        for seed in args.seeds:
            torch.manual_seed(seed)
            batches = Rows(args.data_dir, args.batch_tokens).batches(args.steps, seed, device)
            scores = learn(model, RECIPES[name](len(layers), layers[0].kv_heads, device), batches, args.steps)
            say(f"wrote {write_pattern(args.out / f'{name}-{seed}.tsv', scores)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
