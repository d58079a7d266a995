"""`elastic bench training --devices N`: training steps of a whole backbone (random weights) on several GPUs beside one.

Every step is `ElasticModule`'s own under Lightning's trainer, as `elastic fit` runs it, on one packed row per group of
processes; routers and noise are such that all rows draw the same routes in every strategy. A run's first step is on a
short row and not timed. The time of a step is that of the slowest process. Scaling efficiency is tokens a second over
those of as many single GPUs, which are timed at the same time, each on its own.
"""

import argparse
import gc
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor

from elastic.bench import records
from elastic.bench.drawing import draw
from elastic.bench.records import Measurement
from elastic.bench.scaling_tables import EFFICIENCY, scaling_table
from elastic.bench.step import SHAPES, random_model, random_row
from elastic.config import ElasticConfig
from elastic.console import say
from elastic.data.packing import Batch
from elastic.model.attach import last_routes
from elastic.protocols import CausalLM
from elastic.routing.relaxation import gumbel_noise
from elastic.training.config import OptimiserConfig
from elastic.training.launch import launch
from elastic.training.module import ElasticModule
from elastic.training.sharding import ContextParallel, ShardedBackbone

WARM_UP = 4096  # tokens of the step before the timed ones
STILL = 1e-12  # rates: the routes must not drift between steps
NCCL = "nccl"  # begins the names of its kernels


class RandomModule(ElasticModule):
    """Trains routers on a random backbone of a known shape, at a given MSR.

    Args:
        shape: one of `elastic.bench.step.SHAPES`.
        layers: how many; None: those of the shape.
        ratio: MSR that every row draws.
        share: gradient share.
        settings: of `ElasticModule`.
    """

    def __init__(self, shape: str, layers: int | None, ratio: float, share: float, **settings: Any) -> None:
        rates = OptimiserConfig(lr=STILL, head_lr=STILL, multiplier_lr=STILL, start=math.log(ratio / (1 - ratio)))
        given = {"optimiser": rates, "dtype": "bfloat16", "gradient_checkpointing": True, **settings}
        super().__init__(shape, replace(ElasticConfig(), gradient_share=share), **given)
        self.layers, self.ratio = layers, ratio

    def _load(self) -> tuple[CausalLM, Any]:
        return random_model(self.backbone, self.layers, self.trainer.strategy.root_device), None

    def _noise(self, row_samples: list[int], *_place: int) -> Tensor:
        """Of the seed among the first 64 whose routes are nearest to the ratio; the same for all rows and steps."""
        size = (self.shape["num_layers"], sum(row_samples), self.shape["num_kv_heads"], 2)
        drawn = [gumbel_noise(size, torch.Generator().manual_seed(seed)) for seed in range(64)]

        def distance(noise: Tensor) -> float:
            sparse = noise[..., 1] + self.optimiser.start > noise[..., 0]
            return abs(sparse.double().mean().item() - self.ratio)

        return min(drawn, key=distance).to(self.device)


class Rows:
    """A loader of given steps; Lightning would take a list as several loaders."""

    def __init__(self, steps: list[list[Batch]]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Batch]]:
        return iter(self.steps)


class StepClock(Callback):
    """Times the steps after the first; on a GPU notes their peak memory and the kernels of the last one.

    Args:
        steps: of the run, the first included.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds = steps, list[float]()
        self.peak = 0  # bytes
        self.kernels: list[tuple[str, float, float]] = []  # name, begin and end in seconds
        self.profiler: Any = None

    def on_train_batch_start(self, trainer: Trainer, module: Any, _batch: Any, batch_idx: int) -> None:
        """All processes begin together."""
        on_gpu = module.device.type == "cuda"
        if on_gpu and batch_idx == 1:
            torch.cuda.reset_peak_memory_stats(module.device)
        if on_gpu and batch_idx == self.steps - 1:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
        _wait(module.device)
        trainer.strategy.barrier()
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, _batch: Any, batch_idx: int) -> None:
        """Take the time; the profiler's own work comes after it."""
        _wait(module.device)
        if batch_idx:
            self.seconds.append(time.perf_counter() - self.began)
        if self.profiler is not None:
            self.profiler.stop()
            self.peak = torch.cuda.max_memory_allocated(module.device)
            found = [event for event in self.profiler.events() if str(event.device_type).endswith("CUDA")]
            self.kernels = [(e.name, e.time_range.start / 1e6, e.time_range.end / 1e6) for e in found]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def communication(kernels: Sequence[tuple[str, float, float]]) -> tuple[float, float]:
    """Seconds in which NCCL's kernels ran, and those in which nothing else did; waiting for another GPU counts, as NCCL
    waits inside its kernels.

    Args:
        kernels: name, begin and end of each, in any order.
    """
    sent = _merged([(begin, end) for name, begin, end in kernels if name.lower().startswith(NCCL)])
    other = _merged([(begin, end) for name, begin, end in kernels if not name.lower().startswith(NCCL)])
    together, place = 0.0, 0
    for begin, end in sent:
        while place < len(other) and other[place][1] <= begin:
            place += 1
        ahead = place
        while ahead < len(other) and other[ahead][0] < end:
            together += min(end, other[ahead][1]) - max(begin, other[ahead][0])
            ahead += 1
    busy = sum(end - begin for begin, end in sent)
    return busy, busy - together


def _merged(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of the spans as spans that are apart, in order."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


def strategy_of(name: str | None, sliced: int, device: torch.device) -> tuple[Strategy, int]:
    """Lightning's strategy, and how many processes share a row; `name` None is this GPU alone."""
    made: dict[str | None, Callable[[], Strategy]] = {
        None: lambda: SingleDeviceStrategy(device),
        "ddp": DDPStrategy,
        "fsdp": ShardedBackbone,
        "context": lambda: ContextParallel(context_parallel=sliced),
    }
    return made[name](), sliced if name == "context" else 1


def steps_of(module: ElasticModule, strategy: Strategy, devices: int, rows: list[list[Batch]]) -> StepClock:
    """Run a step on each of the lists of micro-batches."""
    clock, on_gpu = StepClock(len(rows)), torch.cuda.is_available()
    if isinstance(strategy, SingleDeviceStrategy):
        places: Any = [strategy.root_device.index] if on_gpu else 1
    else:
        places = devices
    trainer = Trainer(
        accelerator="gpu" if on_gpu else "cpu", devices=places, strategy=strategy, logger=False,
        max_steps=len(rows), max_epochs=-1, callbacks=[clock], enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, Rows(rows))
    return clock


def measured(
    args: argparse.Namespace, shape: str, name: str | None, device: torch.device
) -> tuple[list[Measurement], float]:
    """Figures of one shape under one strategy, and tokens a second of this many GPUs; equal on all processes."""
    left = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0  # by DDP, which no one can take apart
    strategy, sliced = strategy_of(name, args.context_parallel or args.devices, device)
    share, vocabulary, cpu = min(args.shares), SHAPES[shape]["vocab_size"], torch.device("cpu")
    module = RandomModule(shape, None, args.msr, share, compiled=args.compile)
    rows = [[random_row(WARM_UP, 1, vocabulary, cpu)]]
    rows += [[random_row(args.length, args.samples, vocabulary, cpu)]] * args.steps
    clock = steps_of(module, strategy, args.devices, rows)
    busy, exposed = communication(clock.kernels)
    mine = [sum(clock.seconds) / len(clock.seconds), clock.seconds[-1], clock.peak - left, busy, exposed]
    worst = torch.tensor(mine, dtype=torch.float64, device=device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    seconds, last, peak, busy, exposed = worst.tolist()
    speed = args.length * args.devices / sliced / seconds
    figures = {
        "step time": (seconds * 1e3, "ms"),
        "speed": (speed if name else speed / args.devices, "tokens/s"),
        "MSR": (last_routes(module.model).route.mean().item(), ""),
    }
    if device.type == "cuda":
        figures |= {"peak allocated": (peak / 1e9, "GB")}
        figures |= {"communication": (busy / last, ""), "exposed communication": (exposed / last, "")} if name else {}
    who = "1 GPU" if name is None else f"{args.devices} GPUs, {name}"
    about = {"case": f"{shape}-{args.length // 1024}k", "who": who, "shape": shape, "strategy": name or "one",
             "devices": args.devices if name else 1, "sliced": sliced, "steps": args.steps}  # fmt: skip
    del module.model  # the strategy keeps the module alive, for which the next model would have no room
    return [{**about, "metric": m, "value": value, "unit": unit} for m, (value, unit) in figures.items()], speed


def launched(devices: int) -> torch.device:
    """Start a process a GPU and return this one's; Lightning keeps its remarks to itself."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return launch("cuda" if torch.cuda.is_available() else "cpu", devices).device


def run(args: argparse.Namespace, command: str) -> int:
    """Measure every shape on one GPU and under every strategy, show the table, write `<out>/<tag>.json`.

    Raises:
        ValueError: fewer GPUs than asked for, or groups that do not fit.
    """
    if args.steps < 1 or args.devices % (args.context_parallel or args.devices):
        raise ValueError(
            f"--steps {args.steps} --context-parallel {args.context_parallel} --devices {args.devices}: expected at "
            "least one step and groups that divide the devices"
        )
    device = launched(args.devices)
    stamp, path = records.stamp(command, args.commit, device), args.out / f"{args.tag}.json"
    found: list[Measurement] = []
    for shape in args.backbones:
        alone: float | None = None
        for name in (*(() if args.no_single else (None,)), *args.strategies):
            new, speed = measured(args, shape, name, device)
            if name is None:
                alone = speed
            elif alone is not None:
                new.append({**new[0], "metric": EFFICIENCY, "value": speed / alone, "unit": ""})
            found += [{**record, "length": args.length, "samples": args.samples, **stamp} for record in new]
            gc.collect()  # a model and its hooks refer to each other
            torch.cuda.empty_cache()
            if dist.get_rank() == 0:
                records.save(path, found)
                say(f"{new[0]['case']:24s} {new[0]['who']:18s} " + ", ".join(_shown(record) for record in new))
    if dist.get_rank() == 0:
        pictures = draw(path, found)
        say(f"\n{scaling_table(found)}\n\nWritten: {', '.join(map(str, [path, *pictures]))}")
    return 0


def _shown(record: Measurement) -> str:
    return f"{record['metric']} {record['value']:.4g} {record['unit']}".rstrip()
