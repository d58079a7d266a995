"""Several methods on several tasks: one JSON Lines file for each pair, kept where it is complete, then the summary."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from elastic._version import __version__
from elastic.config import ElasticConfig, RopeScaling, SparseConfig
from elastic.data.context_length import context_length
from elastic.data.prompts import TEMPLATE, TEMPLATE_KWARGS, set_template_kwargs
from elastic.evaluation.benchmark import Benchmark, Request, Routed
from elastic.evaluation.like_with_like import trained
from elastic.evaluation.scores import LOCK, row_of, sample_file, slug
from elastic.files import alone, file_sha256, write_atomic
from elastic.model.loading import longest_context
from elastic.model.rope_scaling import stretch
from elastic.protocols import CausalLM, Tokenizer
from elastic.routing.methods import Method
from elastic.training.launch import Processes

RANDOM_SEED = "random_seed"  # what the heads of a random method were drawn by, in the origin of its results
ROUTERS = "routers"  # settings of a checkpoint beside its weights


@dataclass(frozen=True)
class Cell:
    """One cell of the table: a task, at a length where its benchmark has lengths."""

    benchmark: Benchmark
    task: str
    length: int | None

    @property
    def label(self) -> str:
        """`task@length`, or the task alone."""
        return self.task if self.length is None else f"{self.task}@{self.length}"


@dataclass(frozen=True)
class EvaluationPlan:
    """What `elastic eval` is asked for.

    Attributes:
        backbone, device, dtype: of the model, the same for all methods.
        tasks: benchmarks and names of their tasks.
        lengths: tokens of prompt and answer, for the benchmarks that have lengths.
        samples: per task and length; None takes all documents of a benchmark without lengths.
        batch_size: samples in one forward pass.
        chat: put prompts into the chat template, where the task's protocol allows it.
        sparse: pattern of the methods without a checkpoint.
        seed: of the samples.
        template: what the chat template is told (`chat_template_kwargs`).
        rope: how the backbone's RoPE is stretched for lengths beyond its own, by length / its own.
    """

    backbone: str
    device: str
    dtype: str
    tasks: tuple[tuple[Benchmark, str], ...]
    lengths: tuple[int, ...]
    samples: int | None
    batch_size: int
    chat: bool
    sparse: SparseConfig
    seed: int
    template: Mapping[str, Any] = field(default_factory=lambda: dict(TEMPLATE_KWARGS))
    rope: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1")
        if not self.cells():
            tasks, lengths = ", ".join(task for _, task in self.tasks), ", ".join(map(str, self.lengths))
            raise ValueError(f"no samples of tasks {tasks or 'none'} at lengths {lengths or 'none'}; name others")

    def cells(self) -> list[Cell]:
        """Every task at every length that it has samples of, or once where its benchmark has no lengths."""
        return [
            Cell(benchmark, task, length)
            for benchmark, task in self.tasks
            for length in benchmark.lengths(task, self.lengths)
        ]

    def stretched(self, length: int | None) -> float:
        """By what the backbone's length is multiplied for prompts of this one."""
        if self.rope is None or length is None:
            return 1.0
        return max(1.0, length / longest_context(self.backbone))

    def missing(self) -> list[str]:
        """Tasks that have no samples at some length, with these lengths; the means there are over the other tasks."""
        found = []
        for benchmark, task in self.tasks:
            has = benchmark.lengths(task, self.lengths)
            if lacks := [str(length) for length in self.lengths if length not in has and None not in has]:
                found.append(f"{task} at {' and '.join(lacks)}")
        return found

    def batches(self) -> list[list[Cell]]:
        """Cells that are evaluated together: at one length, and few enough samples for one forward pass, in which
        answers of equal length limit are then generated side by side. Otherwise each by itself.
        """
        together = 1 if self.samples is None else max(1, self.batch_size // self.samples)
        alike: dict[Any, list[Cell]] = {}
        for cell in self.cells():
            key = (cell.benchmark.name, cell.length, cell.benchmark.takes_chat(cell.task))
            alike.setdefault(key if cell.length is not None else cell.label, []).append(cell)
        return [group[i : i + together] for group in alike.values() for i in range(0, len(group), together)]


def run(
    plan: EvaluationPlan, methods: Sequence[Method], out: Path, processes: Processes | None = None
) -> list[dict[str, Any]]:
    """Evaluate what is missing in `out/samples` and return one row per method, task and length. Several commands may
    share the folder.

    Args:
        processes: of this command; the samples of every task are shared out to them, and the first one writes.

    Raises:
        ValueError: a length over the model's limit, or tasks that cannot be had.
    """
    processes = processes or Processes(torch.device(plan.device))
    plan = replace(plan, device=str(processes.device))
    names = {slug(method.name) for method in methods}
    if len(names) < len(methods):
        raise ValueError(f"methods {', '.join(m.name for m in methods)} would share files; name each once")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    loaded: tuple[tuple[str, float], CausalLM, Tokenizer] | None = None
    rows = []
    total, hidden = len(methods) * len(plan.cells()), processes.rank > 0
    with tqdm(total=total, desc="evaluation", unit="task", disable=hidden) as bar:
        for method in methods:
            for cells in plan.batches():
                factor = plan.stretched(cells[0].length)
                source = method.checkpoint or plan.backbone, factor
                files = [sample_file(out, method.name, cell.task, cell.length) for cell in cells]
                origins = [_origin(plan, method, cell) for cell in cells]
                samples = processes.agree(partial(_read_all, files, origins))
                missing = [i for i, found in enumerate(samples) if found is None]
                if missing and (loaded is None or loaded[0] != source):
                    loaded = (source, *load_model(plan, method, factor))
                some = [cells[i] for i in missing]
                made = _evaluate(plan, method, some, *loaded[1:], processes) if missing and loaded else []
                for i, new in zip(missing, made, strict=True):
                    samples[i] = new
                    if processes.rank == 0:
                        _write(files[i], {**origins[i], "count": len(new)}, new, out / LOCK)
                rows += [row_of(origin, found or []) for origin, found in zip(origins, samples, strict=True)]
                bar.set_postfix_str(f"{method.name} {cells[-1].label} {rows[-1]['score']:.2f}", refresh=False)
                bar.update(len(cells))
    return rows


def _read_all(files: Sequence[Path], origins: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]] | None]:
    return [_read(file, origin) for file, origin in zip(files, origins, strict=True)]


def _write(file: Path, origin: dict[str, Any], samples: list[dict[str, Any]], lock: Path) -> None:
    with alone(lock):
        write_atomic(file, "".join(json.dumps(line) + "\n" for line in (origin, *samples)))


def load_model(plan: EvaluationPlan, method: Method, factor: float = 1.0) -> tuple[CausalLM, Tokenizer]:
    """The method's model, attached and in eval mode, its length multiplied, and its tokenizer."""
    if method.checkpoint is not None:
        from elastic.inference.generate import load

        model, tokenizer = load(method.checkpoint, plan.backbone, plan.device, plan.dtype)
    else:
        from elastic.model.attach import attach
        from elastic.model.loading import load_backbone

        model, tokenizer = load_backbone(plan.backbone, dtype=plan.dtype, device=plan.device)
        model = attach(model, ElasticConfig(sparse=plan.sparse)).eval()
    if plan.rope is not None:
        stretch(model, plan.rope, factor)
    set_template_kwargs(tokenizer, plan.template)
    return model, tokenizer


def _evaluate(
    plan: EvaluationPlan,
    method: Method,
    cells: Sequence[Cell],
    model: CausalLM,
    tokenizer: Tokenizer,
    processes: Processes,
) -> list[list[dict[str, Any]]]:
    """The lines of the samples of every cell. Each process evaluates its share of them, and all of them get what all
    found.
    """
    from elastic.model.attach import biased, elastic_config
    from elastic.model.loading import architecture

    limit, first = context_length(model.config), cells[0]
    if first.length is not None and first.length > limit:
        raise ValueError(f"length {first.length} is over the {limit} tokens that {plan.backbone} reads; take it out")
    chat = plan.chat and first.benchmark.takes_chat(first.task)
    requests = [Request(cell.task, cell.length, plan.samples, tokenizer, plan.seed, chat) for cell in cells]
    shape = architecture(model)
    sparse = method.sparse(plan.sparse if method.checkpoint is None else elastic_config(model).sparse)
    route = method.routes(shape["num_layers"], shape["num_kv_heads"], shape, sparse)
    routed = Routed(plan.backbone, model, tokenizer, route, sparse, plan.batch_size)

    def mine() -> list[tuple[int, int, dict[str, Any]]]:
        started = time.perf_counter()
        try:
            with biased(model, method.bias):
                found = first.benchmark.measure(routed, requests, processes.share)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{first.label} ran out of the memory of {plan.device} with --batch-size {plan.batch_size}; use a "
                "smaller one (finished results stay)"
            ) from error
        seconds = (time.perf_counter() - started) / len(cells)
        return [
            (of, place, {**line, "task_seconds": seconds}) for of, lines in enumerate(found) for place, line in lines
        ]

    gathered = sorted(processes.gather(mine), key=lambda line: line[:2])
    return [[line for of, _, line in gathered if of == place] for place in range(len(cells))]


def _origin(plan: EvaluationPlan, method: Method, cell: Cell) -> dict[str, Any]:
    """What a result file depends on and how it was made; it is used again only where all but the batch size agrees."""
    of = None if method.checkpoint is None else trained(method.checkpoint)
    chat = plan.chat and cell.benchmark.takes_chat(cell.task)
    return {
        "method": method.name,
        "task": cell.task,
        "length": cell.length,
        "samples": plan.samples,
        "seed": plan.seed,
        "chat_template": chat,
        **({TEMPLATE: dict(plan.template)} if chat and plan.template != TEMPLATE_KWARGS else {}),
        "backbone": plan.backbone,
        "dtype": plan.dtype,
        "device": plan.device.partition(":")[0],  # any GPU's results are as good as another's
        "batch_size": plan.batch_size,
        "sparse": asdict(method.sparse(plan.sparse if of is None else of.sparse)),
        **({} if of is None else {ROUTERS: dict(of.routers)}),
        **({RANDOM_SEED: method.seed} if method.kind == "random" else {}),
        **({"rope": f"{plan.rope}:{factor:g}"} if (factor := plan.stretched(cell.length)) > 1 else {}),
        "checkpoint": _stamp(method),
        "documents": cell.benchmark.identity(cell.task),
        "protocol": [f"{cell.benchmark.name} {cell.benchmark.protocol}", *cell.benchmark.corrections],
        "versions": {
            "elastic-attention": __version__,  # also where the package runs uninstalled
            **{name: version(name) for name in ("lm_eval", "torch", "transformers")},
        },
    }


def _stamp(method: Method) -> str | None:
    """Checksum of a checkpoint's tensors or of a pattern file."""
    if method.checkpoint is not None:
        from elastic.model.checkpoint import read_elastic

        return str(read_elastic(method.checkpoint)["weights_sha256"])
    return None if method.file is None else file_sha256(Path(method.file))


def _read(file: Path, origin: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Samples of an earlier run of the same evaluation; None where there is none, or only a damaged file."""
    if not file.is_file():
        return None
    try:
        first, *samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except ValueError:  # cut, or empty
        return None
    if not isinstance(first, dict):
        return None
    if RANDOM_SEED in origin:  # older files lack it: there the seed of the samples drew the heads
        first = {RANDOM_SEED: first.get("seed"), **first}
    if ROUTERS in origin:  # older files lack it
        first = {ROUTERS: origin[ROUTERS], **first}
    if isinstance(first.get("sparse"), dict):  # older files lack later settings, which they had the defaults of
        first = {**first, "sparse": {**asdict(SparseConfig()), **first["sparse"]}}
    if origin["method"] == "dense":  # no head has the sizes, and by default they follow the checkpoints beside it
        first = {**first, "sparse": origin["sparse"]}
    wanted = {**origin, "count": len(samples), "batch_size": first.get("batch_size")}
    return samples if first == wanted else None
