"""What a training step needs of a GPU's memory, beside what `elastic.model.memory` reckons, for shapes of published
models with random weights.

    python -m tests.bench.training_memory [--shapes NAME ...] [--out tests/bench/results]

Two depths of full width give the cost of a layer, from which the whole depth is extrapolated; `reckoned` is the
estimate of that whole depth. `elastic fit` chooses its sizes by the estimate, so it must not be below the need.
"""

import argparse
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch

from elastic.bench import e2e_models, records
from elastic.bench.records import LEFT_OUT, Measurement
from elastic.bench.step import ANSWER, Step, random_row
from elastic.config import ElasticConfig
from elastic.console import say
from elastic.model.attach import attach, routers
from elastic.model.memory import Shape, footprint

FULL, SLIDING = "full_attention", "sliding_attention"
# Beside the shapes of `elastic bench e2e`.
HYBRIDS: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {
        "model_type": "gpt_oss", "num_hidden_layers": 24, "hidden_size": 2880, "intermediate_size": 2880,
        "num_local_experts": 32, "num_experts_per_tok": 4, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 201088, "sliding_window": 128, "layer_types": [SLIDING, FULL] * 12,
    },
    "gemma-3-12b": {
        "model_type": "gemma3_text", "num_hidden_layers": 48, "hidden_size": 3840, "intermediate_size": 15360,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 262208,
        "sliding_window": 1024, "query_pre_attn_scalar": 256, "layer_types": ([SLIDING] * 5 + [FULL]) * 8,
    },
}  # fmt: skip
# Depths that are measured and tokens of a row. gpt-oss's sliding layers run eager attention, whose scores grow with the
# square of a row.
MEASURED = {
    "llama-3.1-8b": ((2, 4), (8192, 32768)),
    "qwen3-30b-a3b": ((2, 4), (8192, 32768)),
    "gpt-oss-20b": ((2, 4), (4096, 8192)),
    "gemma-3-12b": ((6, 12), (8192, 32768)),
}


def config_of(name: str, layers: int | None = None) -> Any:
    """The configuration of a shape with all or so many of its layers."""
    from transformers import AutoConfig

    if name not in HYBRIDS:
        return e2e_models.config_of(name, layers)
    of = {**HYBRIDS[name], "max_position_embeddings": 1 << 18}
    layers = layers or of["num_hidden_layers"]
    of |= {"num_hidden_layers": layers, "layer_types": of["layer_types"][:layers]}
    return AutoConfig.for_model(of.pop("model_type"), **of, pad_token_id=0, eos_token_id=1, bos_token_id=2)


def routed(name: str, layers: int, device: torch.device) -> Any:
    """A random bf16 model with routers, as `elastic fit` trains them."""
    from transformers import AutoModelForCausalLM

    config = config_of(name, layers)
    kind = "eager" if config.model_type == "gpt_oss" else "sdpa"
    torch.manual_seed(0)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=kind)
    attach(model, ElasticConfig()).train()
    return model


def peak_and_seconds(model: Any, tokens: int, checkpointing: bool) -> tuple[int, float]:
    """Peak bytes and seconds of the second of two steps on a row."""
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    device = model.device
    step = Step(model, random_row(tokens, 1, model.config.vocab_size, device), 1.0, 0.7)
    step()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device), time.perf_counter() - begun


def measured(name: str, device: torch.device) -> list[Measurement]:
    """Records of a shape: both depths measured, the whole one extrapolated and reckoned."""
    (depths, lengths), shape = MEASURED[name], Shape.of(config_of(name))
    found, peaks = list[Measurement](), dict[tuple[int, int, bool], int]()
    for layers in depths:
        model = routed(name, layers, device)
        for tokens, checkpointing in ((t, c) for t in lengths for c in (True, False)):
            about = {**case(name, layers, tokens), "who": who(checkpointing)}
            try:
                peaks[layers, tokens, checkpointing], seconds = peak_and_seconds(model, tokens, checkpointing)
            except torch.OutOfMemoryError:
                found.append({**about, "metric": LEFT_OUT, "value": None, "unit": "", "why": "out of memory"})
                continue
            finally:
                for router in routers(model):
                    router.zero_grad(set_to_none=True)
            found += [
                {**about, "metric": "peak", "value": peaks[layers, tokens, checkpointing] / 2**30, "unit": "GiB"},
                {**about, "metric": "step", "value": seconds, "unit": "s"},
            ]
        del model
        gc.collect()
    few, many = depths
    for tokens, checkpointing in ((t, c) for t in lengths for c in (True, False)):
        pair = [peaks.get((layers, tokens, checkpointing)) for layers in depths]
        if pair[0] is None or pair[1] is None:
            continue
        need = pair[0] + (pair[1] - pair[0]) / (many - few) * (shape.layers - few)
        reckoned = footprint(shape, tokens, 2, checkpointing, ANSWER).total
        about = {**case(name, shape.layers, tokens), "who": who(checkpointing)}
        found += [
            {**about, "metric": "peak, extrapolated", "value": need / 2**30, "unit": "GiB"},
            {**about, "metric": "reckoned", "value": reckoned / 2**30, "unit": "GiB"},
            {**about, "metric": "reckoned over extrapolated", "value": reckoned / need, "unit": "x"},
        ]
    return found


def case(name: str, layers: int, tokens: int) -> Measurement:
    """What a record is about."""
    return {"case": f"{name}-{layers}layers-{tokens // 1024}k", "shape": name, "layers": layers, "length": tokens}


def who(checkpointing: bool) -> str:
    """With gradient checkpointing, or without."""
    return "checkpointing" if checkpointing else "plain"


def main(argv: list[str]) -> int:
    """Measure, write the records after every shape; 1 where the estimate is below the need."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(MEASURED), default=list(MEASURED))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path("tests/bench/results"))
    parser.add_argument("--commit")
    args = parser.parse_args(argv)
    device, found = torch.device(args.device), list[Measurement]()
    command = f"python -m tests.bench.training_memory --shapes {' '.join(args.shapes)}"
    stamp = records.stamp(command, args.commit, device)
    for name in args.shapes:
        for record in measured(name, device):
            found.append({**record, **stamp})
            say(f"{record['case']} {record['who']} {record['metric']}: {record['value']} {record['unit']}")
        records.save(args.out / "training-memory.json", found)
    short = [record for record in found if record["metric"] == "reckoned over extrapolated" and record["value"] < 1]
    for record in short:
        say(f"below the need: {record['case']}, {record['who']}")
    return int(bool(short))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
