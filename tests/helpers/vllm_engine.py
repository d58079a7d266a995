"""Tiny routed models in folders that vLLM loads, engines over them in this process, and what transformers answers."""

import gc
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.data.prompts import EncodedPrompt
from elastic.inference.generate import answer_tokens
from elastic.model.attach import attach, elastic_config, routers, set_config
from elastic.model.checkpoint import save_elastic
from elastic.model.loading import load_backbone, load_tokenizer
from elastic.model.ordered_routers import begin_in_order
from elastic.routing.router import STEEPNESS
from tests.helpers.models import KV_HEADS, LAYERS, tiny_model, varied_routers

SPARSE = SparseConfig(sink=4, window=16, block=4)
LONGEST = 24  # tokens of an answer


@dataclass
class Routed:
    """A routed model on disk and in transformers.

    Attributes:
        folder: of the backbone and its tokenizer.
        checkpoint: of its routers.
    """

    folder: Path
    checkpoint: Path
    model: Any
    tokenizer: Any
    known: dict[tuple[int, ...], tuple[list[int], list[list[int]]]] = field(default_factory=dict)

    def answer(self, prompt: EncodedPrompt) -> tuple[list[int], list[list[int]]]:
        """Transformers' `LONGEST` greedy tokens after a prompt alone in its batch, and its routes [L][K]."""
        key = tuple(prompt.ids)
        if key not in self.known:
            options = {"max_new_tokens": LONGEST, "eos_token_id": None}
            (found,) = answer_tokens(self.model, self.tokenizer, [prompt], **options)
            self.known[key] = (found.token_ids, found.report.route)
        return self.known[key]


def routed(
    folder: Path, family: str, kind: str, seed: int = 0, kv_heads: int = KV_HEADS, layers: int = LAYERS,
    head_dim: int = 32, sparse: SparseConfig = SPARSE, **config: Any,
) -> Routed:  # fmt: skip
    """A random backbone whose answers vary, with routers of a kind whose decisions vary, both saved."""
    tokenizer = load_tokenizer("tiny")
    sizes = {"hidden_size": 128, "head_dim": head_dim, "num_key_value_heads": kv_heads, "num_hidden_layers": layers}
    model = tiny_model(family, seed, vocab_size=len(tokenizer), eos_token_id=None, **sizes)
    with torch.no_grad():  # weights large enough that attention decides what comes next
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.mul_(20 if "embed" in name else 4)
    model.save_pretrained(folder / "backbone")
    tokenizer.save_pretrained(folder / "backbone")
    model, _ = load_backbone(str(folder / "backbone"))
    attach(model, ElasticConfig(RouterConfig(pool_tokens=8, kind=kind), sparse, **config))
    generator = torch.Generator().manual_seed(seed)
    if kind == "paper":
        varied_routers(model, seed)
    elif kind == "static":
        begin_in_order(model, torch.randperm(layers * kv_heads, generator=generator).tolist(), 0.5)
    elif kind in ("level", "reach"):
        spread_reach(model, generator)
    save_elastic(folder / "routers", model, str(folder / "backbone"))
    return Routed(folder / "backbone", folder / "routers", model, tokenizer)


def spread_reach(model: Any, generator: torch.Generator) -> None:
    """Let routers by level or reach decide near the middle of the features that random prompts have."""
    found: list[Any] = []
    hooks = [
        router.register_forward_pre_hook(lambda router, given: found.append((router, given[0])))
        for router in routers(model)
    ]
    ids = torch.randint(4, 64, (16, 90), generator=generator)
    with torch.no_grad():
        for length in (30, 90):
            model(ids[:, :length])
    for hook in hooks:
        hook.remove()
    for router in routers(model):
        features = torch.cat([given for of, given in found if of is router])
        if hasattr(router, "rank"):
            router.mean.copy_(features.mean(0))
            router.scale.copy_(1 / features.std(0).clamp_min(1e-3))
            router.weight.data = torch.randn(router.weight.shape, generator=generator) / len(router.weight) ** 0.5 / 2
            router.rank.copy_(torch.rand(router.rank.shape, generator=generator))
    if not hasattr(routers(model)[0], "rank"):
        largest = torch.cat([given.flatten() for _, given in found])
        bias = STEEPNESS * (float(largest.median()) - 0.5)
        set_config(model, replace(elastic_config(model), sparsity_bias=bias))


@contextmanager
def engine(folder: Path, elastic: dict[str, Any] | None, **options: Any):
    """A vLLM engine in this process; one at a time, as its process groups are global. None: without the plugin."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 208, "kv_cache_memory_bytes": 1 << 26}
    settings |= {"block_size": 16, "additional_config": {} if elastic is None else {"elastic": elastic}} | options
    made = None
    try:
        made = LLM(str(folder), **settings)
        yield made
    finally:
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def sampling(tokens: int, n: int = 1) -> Any:
    """Greedy; for several answers to one prompt by sampling among one token, as vLLM wants it."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    own = {"temperature": 0.0} if n == 1 else {"temperature": 1.0, "top_k": 1, "n": n}
    return SamplingParams(max_tokens=tokens, ignore_eos=True, output_kind=RequestOutputKind.FINAL_ONLY, **own)
