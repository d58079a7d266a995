"""The routers' gradient under every strategy beside one GPU's, with the fused kernels, over NCCL:

    torchrun --nproc-per-node 2 -m tests.training.several_gpus OUT.json

Two packed rows make the step. DDP and FSDP2 read one each, under context parallelism both processes share both. In bf16
a matrix product of half a row's tokens rounds otherwise than one of all; how much that may be is told by one GPU that
reads both rows in one pass instead of two. Without GPUs the same runs on CPUs over gloo, in PyTorch.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from elastic.bench import scaling, step
from elastic.config import ElasticConfig, SparseConfig
from elastic.console import say
from elastic.data.packing import Batch
from elastic.model.attach import last_routes, routers

SHAPE = "small"
SMALL = ElasticConfig(sparse=SparseConfig(sink=64, window=128, block=64))
LENGTH = 4097  # odd, so that two slices do not cut it evenly
SIZES = {
    "model_type": "qwen3",
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "vocab_size": 999,
}


class Watched(scaling.RandomModule):
    """Routers that look at their input; keeps the gradient of the first step and its routes."""

    def __init__(self, ratio: float = 0.5, **settings: Any) -> None:
        super().__init__(SHAPE, None, ratio, 1.0, **settings)
        self.gradient: torch.Tensor | None = None

    def configure_model(self) -> None:
        super().configure_model()
        generator = torch.Generator().manual_seed(1)
        for router in routers(self.model):
            weight = router.head[-1].weight
            with torch.no_grad():
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator, device="cpu"))

    def _noise(self, row_samples: list[int], step: int, row: int) -> torch.Tensor:
        """That of each row is its own, however rows are joined."""
        return torch.cat([super(Watched, self)._noise([samples], step, row) for samples in row_samples], dim=1)

    def training_step(self, batch: list[Batch], batch_idx: int) -> None:
        clip = torch.nn.utils.clip_grad_norm_

        def watched(weights: list[torch.nn.Parameter], norm: float) -> torch.Tensor:
            if self.gradient is None:
                self.gradient = torch.cat([p.grad.reshape(-1) for p in weights if p.grad is not None]).clone()
                self.routes = last_routes(self.model).route.detach().clone()
            return clip(weights, norm)

        torch.nn.utils.clip_grad_norm_ = watched  # type: ignore[assignment]
        try:
            super().training_step(batch, batch_idx)
        finally:
            torch.nn.utils.clip_grad_norm_ = clip


def row(seed: int) -> Batch:
    """A packed row: two samples for seed 0, one of an odd length for 1."""
    length, samples = ((LENGTH - 1, 2), (LENGTH, 1))[seed]
    return step.random_row(length, samples, SIZES["vocab_size"], torch.device("cpu"), seed)


def joined(batches: list[Batch]) -> Batch:
    """Both rows as one."""
    first, second = batches
    offset = first["input_ids"].shape[1]
    ends = second["cu_seq_lens"][1:] + offset
    found: Any = {
        name: torch.cat([first[name], second[name]], dim=1)  # type: ignore[literal-required]
        for name in ("input_ids", "labels", "position_ids")
    }
    found["cu_seq_lens"] = torch.cat([first["cu_seq_lens"], ends])
    for name in ("prompt_spans", "user_spans"):
        found[name] = torch.cat([first[name], second[name] + offset])  # type: ignore[literal-required]
    found["task_id"] = torch.cat([first["task_id"], second["task_id"]])
    found["source"], found["row_samples"] = first["source"] + second["source"], [2, 1]
    return found


def for_cpu() -> None:
    """Sizes that a CPU can run, with a window and answers shorter than the samples."""
    scaling.ElasticConfig = lambda: SMALL  # type: ignore[assignment,misc]
    step.ANSWER = 64
    torch.set_num_threads(1)
    step.SHARED.update(num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    SIZES.update(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    global LENGTH
    LENGTH = 577


def main(out: Path, compiled: bool = False) -> int:
    """Compare, print and write; 1 where a gradient differs by more than rounding."""
    device = scaling.launched(2)
    if device.type == "cpu":
        for_cpu()
    else:
        torch.use_deterministic_algorithms(True, warn_only=True)
    step.SHAPES[SHAPE] = dict(SIZES)
    rank, rows = dist.get_rank(), [row(0), row(1)]
    steps = {
        "one": rows,
        "one, both rows in one pass": [joined(rows)],
        "ddp": [rows[rank]],
        "fsdp": [rows[rank]],
        "context": rows,
    }
    gradients, routes = {}, {}
    for name, of in steps.items():
        module = Watched(compiled=compiled)
        strategy, _ = scaling.strategy_of(None if name.startswith("one") else name, 2, device)
        scaling.steps_of(module, strategy, 2, [of, of])
        assert module.gradient is not None
        gradients[name], routes[name] = module.gradient, module.routes
    one = gradients.pop("one")
    found = {name: float((gradient - one).norm() / one.norm()) for name, gradient in gradients.items()}
    same = torch.equal(routes["context"], routes["one"])
    dist.barrier()
    if rank == 0:
        out.write_text(json.dumps({"relative difference": found, "same routes": same, "device": str(device)}) + "\n")
        for name, value in found.items():
            say(f"{name:32s} relative difference of the gradient from one GPU's {value:.3g}")
        say(f"context: same routes {same}")
    torch.use_deterministic_algorithms(False)
    rounding = 3 * found["one, both rows in one pass"] + 1e-5
    return int(max(found["ddp"], found["fsdp"]) > 1e-5 or found["context"] > rounding)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), "--compiled" in sys.argv))
