"""Where a training step's time goes: python -m tests.bench.profile_training OUT [micro:share:compiled ...].

A random backbone of SmolLM2-135M's shape, 8 packed rows of 4,096 tokens a step, objective `target`.
"""

import json
import random
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from torch.utils.data import DataLoader

from elastic.config import ElasticConfig, SparseConfig
from elastic.data.packing import IGNORE, Batch, PackedRow, collate
from elastic.model.attach import routers
from elastic.model.compiling import compile_layers
from elastic.training import evaluation_module
from elastic.training.module import ElasticModule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CPU = torch.autograd.DeviceType.CPU
ROW, ROWS, WARM, TIMED, PROFILED = 4096, 8, 6, 8, 2
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def backbone(*_: Any, **__: Any) -> tuple[Any, None]:
    """Random weights in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval(), None


def packed_row(rng: random.Random) -> PackedRow:
    """One to six samples with short answers, nearly full."""
    cuts = sorted(rng.sample(range(300, ROW - 300), rng.randrange(0, 6)))
    bounds = [0, *cuts, ROW - rng.randrange(60)]
    row = PackedRow(input_ids=[], labels=[], cu_seq_lens=bounds, prompt_spans=[], task_id=[], source=[])
    for begin, end in pairwise(bounds):
        answer = min(rng.randrange(10, 250), (end - begin) // 2)
        ids = [rng.randrange(5, 49000) for _ in range(end - begin)]
        row["input_ids"] += ids
        row["labels"] += [IGNORE] * (end - begin - answer) + ids[end - begin - answer :]
        row["prompt_spans"].append([begin, end - answer])
        row["task_id"].append(rng.randrange(5))
        row["source"].append("random")
    return row


def steps(micro: int) -> list[list[Batch]]:
    """Micro-batches of every step."""
    rng = random.Random(0)
    found = []
    for _ in range(WARM + TIMED + PROFILED):
        rows = [packed_row(rng) for _ in range(ROWS)]
        found.append([collate(rows[at : at + micro]) for at in range(0, ROWS, micro)])
    return found


def _synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


class Clock(Callback):
    """Seconds of every step, and a profile of the last ones."""

    def __init__(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.seconds: list[float] = []
        self.profiler = torch.profiler.profile(activities=activities)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start."""
        if len(self.seconds) == WARM + TIMED:
            self.profiler.start()
        _synchronise()
        self.started = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop."""
        _synchronise()
        self.seconds.append(time.perf_counter() - self.started)
        if len(self.seconds) == WARM + TIMED + PROFILED:
            self.profiler.stop()


def profile(micro: int, share: float, compiled: str, out: Path) -> dict[str, Any]:
    """Time and profile one setting."""
    seed_everything(0, verbose=False)
    evaluation_module.load_backbone = backbone
    sparse = SparseConfig(sink=128, window=512)
    module = ElasticModule("random", ElasticConfig(sparse=sparse, gradient_share=share), dtype="bfloat16")
    module.configure_model()
    torch.compiler.reset()
    if compiled != "eager":
        compile_layers(module.model)
    if compiled == "routers":
        for router in routers(module.model):
            router.compile(dynamic=True)
    clock = Clock()
    trainer = Trainer(
        max_steps=WARM + TIMED + PROFILED, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        callbacks=[clock], enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, DataLoader(steps(micro), batch_size=None, collate_fn=lambda step: step))  # type: ignore[arg-type]
    table = clock.profiler.key_averages()
    name = f"m{micro}-s{share:g}-{compiled}"
    for key in ("self_cpu_time_total", "self_device_time_total"):
        (out / f"{name}-{key}.txt").write_text(table.table(sort_by=key, row_limit=45, max_name_column_width=70))
    launches = sum(e.count for e in table if "LaunchKernel" in e.key)
    timed = clock.seconds[WARM : WARM + TIMED]
    return {
        "setting": name,
        "seconds": sorted(timed)[len(timed) // 2],
        "all_seconds": clock.seconds,
        "device_seconds": sum(e.self_device_time_total for e in table if e.device_type != CPU) / 1e6 / PROFILED,
        "launches": launches / PROFILED,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None,
    }


def main() -> None:
    """All settings asked for, one JSON line each."""
    out = Path(sys.argv[1])
    settings = sys.argv[2:] or ["4:1:eager", "8:1:eager", "8:0.125:eager", "8:0.125:compiled"]
    for setting in settings:
        micro, share, compiled = setting.split(":")
        try:
            found = profile(int(micro), float(share), compiled, out)
        except Exception as error:  # noqa: BLE001 - the other settings still count
            found = {"setting": setting, "error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
