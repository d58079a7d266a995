"""Models of `elastic bench e2e`: random weights in the shape of published models, with routes of a given MSR.

Legend: L layers, K KV heads, D head dim, N samples.
"""

from typing import Any

import torch
from torch import Tensor

from elastic.config import ElasticConfig
from elastic.model.attach import attach, routers
from elastic.protocols import CausalLM
from elastic.routing.router import MIN_STATISTICS, AttentionRouter

_SHARED: dict[str, Any] = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 1 << 19}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        },
    ),
    "tiny": (
        "llama",
        {
            "vocab_size": 97,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
}


def attention_shape(shape: str) -> tuple[int, int, int, int]:
    """Layers, query heads, KV heads and head dim of a shape.

    Raises:
        ValueError: no such shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is not known; use one of {', '.join(SHAPES)}")
    of = {**_SHARED, **SHAPES[shape][1]}
    heads = of["num_attention_heads"]
    head_dim = of.get("head_dim", of["hidden_size"] // heads)
    return of["num_hidden_layers"], heads, of["num_key_value_heads"], head_dim


def config_of(shape: str, layers: int | None = None) -> Any:
    """The configuration of a shape, with all or so many of its layers."""
    from transformers import AutoConfig

    family, sizes = SHAPES[shape]
    sizes = sizes if layers is None else {**sizes, "num_hidden_layers": layers}
    return AutoConfig.for_model(family, **{**_SHARED, **sizes}, pad_token_id=0, eos_token_id=None)


def random_model(shape: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> CausalLM:
    """A stock causal LM of this shape in eval mode, with all or so many of its layers; nothing is downloaded."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(shape, layers), dtype=dtype, attn_implementation="sdpa")
    stock: CausalLM = model.to(dtype).eval().requires_grad_(False)
    return stock


def force(router: Any, route_K: Tensor) -> None:
    """Let a router do all of its work and then decide `route_K` on any input: statistics far from every key push all
    features of a head to +10 or -10, and the first of them runs through the MLPs to the SA logit.
    """
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.zero_()
        for linear in (router.task[0], router.task[2], router.head[0], router.head[2]):
            linear.weight[0, 0] = 1.0
        router.head[4].weight[1, 0] = 1.0
        router.head[4].bias[0] = 1.0  # the FA logit; the SA logit is about 10 or 0
        router.mean.copy_((1.0 - 2.0 * route_K)[:, None].expand_as(router.mean) * 1e6)
        router.count.fill_(MIN_STATISTICS)


def route_at_random(model: CausalLM, msr: float, config: ElasticConfig, seed: int = 0) -> Tensor:
    """Attach routers that send a random share `msr` of all (layer, KV head) pairs to SA; returns the routes [L, K]."""
    found = routers(attach(model, config))
    pairs = len(found) * found[0].kv_heads
    chosen = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))[: round(msr * pairs)]
    route = torch.zeros(pairs)
    route[chosen] = 1.0
    route_LK = route.view(len(found), -1)
    for router, route_K in zip(found, route_LK, strict=True):
        assert isinstance(router, AttentionRouter)
        force(router, route_K.to(model.device))
    return route_LK
