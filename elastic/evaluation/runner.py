"""Several methods on several tasks: one JSON Lines file for each pair, kept where it is complete, then the summary."""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from elastic.config import ElasticConfig, SparseConfig
from elastic.evaluation import ruler
from elastic.evaluation.methods import Method


@dataclass(frozen=True)
class Plan:
    """What `elastic eval` is asked for.

    Attributes:
        backbone, device, dtype: of the model; `elastic` methods bring the backbone of their checkpoint.
        tasks: names of RULER tasks.
        lengths: tokens of prompt and answer.
        samples: per task and length.
        batch_size: samples in one forward pass.
        chat: put prompts into the chat template.
        sparse: pattern of the methods without a checkpoint.
        seed: of the samples and of random patterns.
    """

    backbone: str
    device: str
    dtype: str
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    batch_size: int
    chat: bool
    sparse: SparseConfig
    seed: int

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1")
        if not self.lengths or not self.tasks:
            raise ValueError("no lengths or no tasks; name at least one of each")


def run(plan: Plan, methods: Sequence[Method], out: Path) -> list[dict[str, Any]]:
    """Evaluate what is missing in `out/samples` and return one row per method, task and length.

    Raises:
        ValueError: a length over the model's limit, or tasks that cannot be had.
    """
    todo = [(m, task, length) for m in methods for task in plan.tasks for length in plan.lengths]
    names = {_slug(method.name) for method in methods}
    if len(names) < len(methods):
        raise ValueError(f"methods {', '.join(m.name for m in methods)} are not all different; name each once")
    (out / "samples").mkdir(parents=True, exist_ok=True)
    loaded: tuple[str, Any, Any] = ("", None, None)
    rows = []
    with tqdm(total=len(todo), desc="evaluation", unit="task") as bar:
        for method, task, length in todo:
            file = out / "samples" / f"{_slug(method.name)}.{task}.{length}.jsonl"
            facts = _facts(plan, method, task, length)
            samples = _read(file, facts)
            if samples is None:
                source = method.argument if method.kind == "elastic" else plan.backbone
                if loaded[0] != source:
                    loaded = (source, *_load(plan, method))
                samples = _evaluate(plan, method, task, length, *loaded[1:])
                _write(file, facts, samples)
            rows.append(_row(method.name, task, length, samples))
            bar.set_postfix_str(f"{method.name} {task}@{length} {rows[-1]['score']:.2f}", refresh=False)
            bar.update()
    return rows


def _load(plan: Plan, method: Method) -> tuple[Any, Any]:
    if method.kind == "elastic":
        from elastic.inference import load

        return load(method.argument, device=plan.device, dtype=plan.dtype)
    from elastic.backbone import attach
    from elastic.backbones import load_backbone

    model, tokenizer = load_backbone(plan.backbone, dtype=plan.dtype, device=plan.device)
    return attach(model, ElasticConfig(sparse=plan.sparse)).eval(), tokenizer


def _evaluate(plan: Plan, method: Method, task: str, length: int, model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """Per sample: prediction, references, score, MSR, ESR, prefill seconds and tokens."""
    import lm_eval

    from elastic.backbones import architecture
    from elastic.evaluation.routed_lm import RoutedLM

    limit = model.config.max_position_embeddings
    if length > limit:
        raise ValueError(f"length {length} is over the {limit} tokens that {plan.backbone} reads; take it out")
    docs = ruler.documents(task, length, plan.samples, tokenizer, plan.seed)
    shape = architecture(model)
    route = method.route(shape["num_layers"], shape["num_kv_heads"], plan.seed)
    lm = RoutedLM(model, tokenizer, route, plan.batch_size)
    started = time.perf_counter()
    results: Any = lm_eval.simple_evaluate(
        model=lm,
        tasks=[ruler.harness_task(task, length, docs)],
        apply_chat_template=plan.chat,
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
    )
    seconds = time.perf_counter() - started
    return [
        {
            "index": sample["doc"]["index"],
            "prediction": sample["resps"][0][0],
            "references": sample["doc"]["outputs"],
            "score": sample["score"],
            **asdict(lm.facts[sample["arguments"][0][0]]),
            "task_seconds": seconds,
        }
        for sample in results["samples"][f"{task}@{length}"]
    ]


def _facts(plan: Plan, method: Method, task: str, length: int) -> dict[str, Any]:
    """What a result file depends on; it is used again only where all of it agrees."""
    return {
        "method": method.name,
        "task": task,
        "length": length,
        "samples": plan.samples,
        "seed": plan.seed,
        "chat_template": plan.chat,
        "backbone": plan.backbone,
        "dtype": plan.dtype,
        "device": plan.device,
        "batch_size": plan.batch_size,
        "sparse": asdict(plan.sparse),
        "checkpoint": _stamp(method),
        "protocol": ["RULER by lm-evaluation-harness", *ruler.CORRECTIONS],
        "versions": {name: version(name) for name in ("elastic-attention", "lm_eval", "torch", "transformers")},
    }


def _stamp(method: Method) -> str | None:
    """Checksum of a checkpoint's tensors or of a pattern file."""
    import hashlib

    if method.kind == "elastic":
        from elastic.checkpoint import read_elastic

        return read_elastic(method.argument)["weights_sha256"]
    return hashlib.sha256(Path(method.argument).read_bytes()).hexdigest() if method.kind == "static" else None


def _read(file: Path, facts: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Samples of an earlier run of the same evaluation; None where there is none."""
    if not file.is_file():
        return None
    first, *lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines] if json.loads(first) == facts else None


def _write(file: Path, facts: dict[str, Any], samples: list[dict[str, Any]]) -> None:
    writing = file.with_name(f".{file.name}.writing")
    writing.write_text("".join(json.dumps(line) + "\n" for line in (facts, *samples)), encoding="utf-8")
    os.replace(writing, file)


def _row(method: str, task: str, length: int, samples: list[dict[str, Any]]) -> dict[str, Any]:
    mean = {
        name: sum(sample[name] for sample in samples) / len(samples)
        for name in ("score", "msr", "esr_last", "esr_all", "prefill_seconds", "tokens")
    }
    return {
        "method": method,
        "task": task,
        "length": length,
        "n": len(samples),
        **mean,
        "half_width": interval(samples),
    }


def interval(samples: list[dict[str, Any]]) -> float:
    """Half of the 95 % interval of the mean score, by the normal approximation; 0 for a single sample."""
    n = len(samples)
    mean = sum(sample["score"] for sample in samples) / n
    variance = sum((sample["score"] - mean) ** 2 for sample in samples) / max(1, n - 1)
    return 1.96 * math.sqrt(variance / n)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)
