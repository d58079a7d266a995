"""Tiny random backbones of every supported family, and inputs for them. Nothing is downloaded."""

import copy
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from elastic.config import ElasticConfig, RouterConfig, SparseConfig

_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
# Two layers with a window of 12 tokens among three that get routers.
SLIDING: dict[str, Any] = {
    "num_hidden_layers": 5,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "full")],
    "sliding_window": 12,
}
# Two layers of linear attention among three that get routers.
STATES: dict[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 5,
    "layer_types": [f"{kind}_attention" for kind in ("linear", "full", "linear", "full", "full")],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SHARED = {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, **_EXPERTS}
# Every supported family with what its tiny model must be told; the whole battery of tests runs over it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"head_dim": 16},
    "qwen2": {},
    "mistral": {"sliding_window": None},
    "olmo2": {},
    "granite": {"logits_scaling": 2.0},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32, **_EXPERTS},
    "mixtral": {"head_dim": 16, "num_local_experts": 4, **_EXPERTS},
    "granitemoe": {"attention_multiplier": 0.2, "num_local_experts": 4, "logits_scaling": 2.0, **_EXPERTS},
    "olmoe": {"num_experts": 4, "clip_qkv": 0.5, **_EXPERTS},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "cohere": {"use_qk_norm": True},
    "glm4": {"head_dim": 16},
    "phi3": {"partial_rotary_factor": 0.5},
    "cohere2": SLIDING,
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, **_EXPERTS, **SLIDING},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 24, "final_logit_softcapping": 5.0, **SLIDING},
    "ministral": {"head_dim": 16, **SLIDING},
    "olmo3": SLIDING,
    "qwen3_next": {**_SHARED, **STATES},
    "qwen3_5_text": STATES,
    "qwen3_5_moe_text": {**_SHARED, **STATES},
}
# What a stock model fails at by itself in some releases of transformers, which no test can ask of it there.
STOCK_FAULTS = {"granitemoe": "transformers 5.17's own Granite-MoE fails on output_router_logits"}
ASSISTED = "sliding caches of transformers 5.17 fail under an assistant, in the stock model too"
EXPERTS = tuple(family for family, settings in FAMILIES.items() if "num_experts_per_tok" in settings)
HYBRIDS = tuple(family for family, settings in FAMILIES.items() if settings.items() >= SLIDING.items())
LINEAR = tuple(family for family, settings in FAMILIES.items() if settings.items() >= STATES.items())
VOCAB = 97
LAYERS, KV_HEADS = 3, 2


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random causal LM of 3 routed layers in fp32 eval mode: 4 heads, 2 KV heads, head dim 16.

    Every call gives a model of its own, and leaves torch's generator as making one does.
    """
    if not all(isinstance(value, (int, float, str, type(None))) for value in changes.values()):
        return _made(family, seed, changes)
    model, state = _kept(family, seed, tuple(changes.items()))
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.lru_cache(maxsize=64)
def _kept(family: str, seed: int, changes: tuple[tuple[str, Any], ...]) -> tuple[Any, Tensor]:
    return _made(family, seed, dict(changes)), torch.get_rng_state()


def _made(family: str, seed: int, changes: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        **FAMILIES.get(family, {}),
        **changes,
    }
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):  # as large as the logits beside them
            torch.nn.init.normal_(parameter, 1.0)
        if name.endswith("A_log"):  # states that remember tens of tokens, where those of random models forget the last
            torch.nn.init.uniform_(parameter, -4.0, -2.0)
    return model


def doubled(model: Any) -> Any:
    """The model in fp64; its experts one by one, because torch's grouped product takes fp32 and narrower."""
    if model.config.model_type in EXPERTS:
        model.set_experts_implementation("eager")
    return model.double()


def small_config(**sparse: Any) -> ElasticConfig:
    """Sizes at which streaming differs from full attention on short inputs."""
    return ElasticConfig(RouterConfig(pool_tokens=8), SparseConfig(**{"sink": 4, "window": 16, "block": 4, **sparse}))


def varied_routers(model: Any, seed: int = 0) -> None:
    """Give an attached model's routers random last layers that split near the middle of the logits of features as small
    as those of random tokens.

    Decisions then differ between layers, heads and inputs, which a test of routing needs.
    """
    from elastic.model.attach import routers

    generator = torch.Generator().manual_seed(seed)
    for router in routers(model):
        last = router.head[-1]
        with torch.no_grad():
            last.weight.copy_(0.1 * torch.randn(last.weight.shape, generator=generator))
            probe = torch.randn(64, *router.mean.shape, generator=generator).to(router.mean.device)
            router.update_statistics(probe * 0.3)
            gap = router(probe * 0.05)[..., 1] - router(probe * 0.05)[..., 0]
            last.bias.copy_(torch.stack([gap.median(), gap.new_zeros(())]))


def sliding_caches_record() -> bool:
    """Whether a recording sliding layer of transformers returns what its mask is made for."""
    layer, part = DynamicSlidingWindowLayer(4), torch.zeros(1, 1, 6, 2)
    layer.activate_past_recording()
    layer.update(part, part)
    return layer.get_mask_sizes(1)[0] == layer.update(part[:, :, :1], part[:, :, :1])[0].shape[2]


def random_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """[rows, length] token ids without the padding id."""
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(ids: Tensor, pads: list[int]) -> tuple[Tensor, Tensor]:
    """Rows with their first `pads[b]` tokens replaced by padding, and the attention mask."""
    mask = torch.ones_like(ids)
    padded = ids.clone()
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
        padded[row, :pad] = 0
    return padded, mask


@functools.cache
def small_bpe():
    """A fast byte-level BPE tokenizer of 6,000 tokens, trained on this repository's pages and wonderwords' nouns."""
    import wonderwords
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=["<e>"], initial_alphabet=alphabet, show_progress=False
    )
    pages = [file.read_text(encoding="utf-8") for file in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))]
    nouns = wonderwords.RandomWord()._categories["nouns"]
    made.train_from_iterator([*pages, *(f" {noun}" for noun in nouns)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<e>", eos_token="<e>")
    fast.padding_side = "left"
    return fast
