"""Models of `elastic bench e2e`: random weights in the shape of published models, with routes of a given MSR.

Legend: L layers, K KV heads, D head dim, N samples.
"""

from typing import Any

import torch
from torch import Tensor

from elastic.backbone import attach, routers
from elastic.config import ElasticConfig
from elastic.router import Router

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


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A stock causal LM of this shape in eval mode; nothing is downloaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, sizes = SHAPES[shape]
    config = AutoConfig.for_model(family, **{**_SHARED, **sizes}, pad_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(dtype).eval().requires_grad_(False)


class DecidedRouter(Router):
    """Does a router's work, pooling included, and then answers with given routes: the cost of routing without training.

    Args:
        inner: the router whose work is done.
        route_K: what it shall decide, in {0, 1}.
    """

    def __init__(self, inner: Router, route_K: Tensor) -> None:
        super().__init__(inner.kv_heads)
        self.inner = inner
        self.register_buffer("offset", torch.stack([1.0 - route_K, route_K], dim=-1) * 1e6)

    def forward(self, pooled_NKD: Tensor) -> Tensor:
        """Logits [N, K, 2]."""
        return self.inner(pooled_NKD) + self.offset


def route_at_random(model: Any, msr: float, config: ElasticConfig, seed: int = 0) -> float:
    """Attach routers that send a random share `msr` of all (layer, KV head) pairs to SA; returns the exact share."""
    attach(model, config)
    found = routers(model)
    pairs = len(found) * found[0].kv_heads
    chosen = torch.randperm(pairs, generator=torch.Generator().manual_seed(seed))[: round(msr * pairs)]
    route = torch.zeros(pairs)
    route[chosen] = 1.0
    for layer, router, route_K in zip(model.get_decoder().layers, found, route.view(len(found), -1), strict=True):
        layer.self_attn.router = DecidedRouter(router, route_K).to(model.device)
    return len(chosen) / pairs
