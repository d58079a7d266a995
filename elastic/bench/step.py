"""A training step of a random backbone of a known model's shape, for timing and memory.

Legend: S tokens, N samples.
"""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from elastic.config import ElasticConfig
from elastic.data.packing import IGNORE, Batch
from elastic.data.tasks import TASKS
from elastic.model.attach import attach, elastic_config, last_routes, routers, set_config
from elastic.model.compiling import compile_layers
from elastic.model.logits import logit_head
from elastic.protocols import CausalLM
from elastic.routing.relaxation import sample_route
from elastic.routing.sparsity import msr
from elastic.training.objective import RoutedPass, TargetObjective

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of all shapes
ANSWER = 512  # labelled tokens of a sample
SHARED: dict[str, Any] = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
                          "max_position_embeddings": 1 << 20}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
                     "vocab_size": 128256},
    "qwen3-4b": {"model_type": "qwen3", "num_hidden_layers": 36, "hidden_size": 2560, "intermediate_size": 9728,
                 "vocab_size": 151936, "tie_word_embeddings": True},
}  # fmt: skip


def bounds_of(length: int, samples: int) -> Tensor:
    """Boundaries of equal samples."""
    return torch.arange(0, length + 1, length // samples, dtype=torch.int32)


def random_model(name: str, layers: int | None, device: torch.device) -> CausalLM:
    """A random bf16 causal LM of a shape; `layers` None: those of the shape."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SHARED, **SHAPES[name]}
    settings["num_hidden_layers"] = layers or settings["num_hidden_layers"]
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    with torch.device(device):
        model: CausalLM = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def random_backbone(name: str, layers: int | None, ratio: float, compiled: bool, device: torch.device) -> CausalLM:
    """A random bf16 causal LM of a shape, ready to train under gradient checkpointing.

    Args:
        layers: how many; None: those of the shape.
        ratio: MSR that its routers sample.
        compiled: whether torch.compile runs what surrounds attention.
    """
    model = random_model(name, layers, device)
    attach(model, ElasticConfig()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for router in routers(model):
        with torch.no_grad():
            router.head[-1].bias[1] = math.log(ratio / (1 - ratio))  # type: ignore[index, union-attr]
    return compile_layers(model) if compiled else model


def random_row(length: int, samples: int, vocabulary: int, device: torch.device, seed: int = 0) -> Batch:
    """A packed row of equal samples, the last `ANSWER` tokens of each labelled."""
    bounds = bounds_of(length, samples)
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, IGNORE)
    for _, end in pairwise(bounds.tolist()):
        labels[0, end - ANSWER : end] = ids[0, end - ANSWER : end]
    prompts = torch.stack([bounds[:-1], bounds[1:] - ANSWER], dim=1).long().to(device)
    return Batch(
        input_ids=ids.to(device),
        labels=labels.to(device),
        position_ids=torch.arange(length // samples).repeat(samples)[None].to(device),
        cu_seq_lens=bounds.to(device),
        prompt_spans=prompts,
        user_spans=prompts,
        task_id=(torch.arange(samples) % len(TASKS)).to(device),
        source=["random"] * samples,
        row_samples=[samples],
    )


def route_seed(model: CausalLM, ratio: float, samples: int, tries: int = 64) -> int:
    """The seed among the first `tries` whose noise brings undecided routers with their bias nearest to this MSR."""

    def distance(seed: int) -> float:
        torch.manual_seed(seed)
        with torch.no_grad():
            routes = [
                sample_route(router.head[-1].bias.expand(samples, router.kv_heads, 2).contiguous(), 1.0)  # type: ignore[index, union-attr]
                for router in routers(model)
            ]
        return abs(torch.stack(routes).mean().item() - ratio)

    return min(range(tries), key=distance)


class Step:
    """One optimiser step of a routed backbone on one packed row: objective `target`, AdamW on the routers."""

    def __init__(self, model: CausalLM, batch: Batch, share: float, ratio: float) -> None:
        self.model, self.batch = model, batch
        self.config = replace(elastic_config(model), gradient_share=share)
        self.seed = route_seed(model, ratio, batch["cu_seq_lens"].shape[0] - 1)
        self.objective = TargetObjective({}, 10.0)
        self.objective.multipliers.to(batch["input_ids"].device)
        self.weights = [p for router in routers(model) for p in router.parameters()]
        self.descent = torch.optim.AdamW(self.weights, lr=0.0)  # the routes must not drift between repeats

    def __call__(self) -> None:
        """Forward, backward, clip, descend."""
        set_config(self.model, self.config)
        torch.manual_seed(self.seed)  # the same routes in every repeat and recipe
        batch = self.batch
        names = ("input_ids", "position_ids", "cu_seq_lens", "prompt_spans")
        inputs: dict[str, Any] = {name: batch[name] for name in names}  # type: ignore[literal-required]
        hidden = self.model.get_decoder()(**inputs, use_cache=False).last_hidden_state
        ratio = msr(last_routes(self.model).route)
        head = logit_head(self.model)
        self.objective.judge(RoutedPass(batch, hidden, ratio, None, head, 1024)).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.descent.step()
        self.descent.zero_grad()
