"""What a training step on frozen weights needs of a GPU's memory, reckoned from the model's shape:

    bytes = weights + kept + working + logits

Autograd keeps of a layer what its backward pass reads: the input of each norm in fp32; queries, keys, values and the
output of attention; three tensors as wide as the MLP. Frozen projections keep nothing. With gradient checkpointing that
is so of one layer at a time, and of the others only their input stays. `working` is what the backward pass of a layer
makes beside it, at its peak. The coefficients follow from the operators of transformers' layers; tests count the bytes
that are alive in such a pass (tests/model/test_memory.py). The masks of sliding layers, and with attention sinks their
scores, grow with the square of a pass. Linear attention is that of transformers' own PyTorch. No KV cache exists.
Legend: T tokens of a pass, E hidden size, H query heads, K KV heads, D head dim, I width of the MLP, X experts a token.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from elastic.model.families import check_family
from elastic.model.layer_types import has_sinks, stock_layers
from elastic.model.text_part import text_config

FP32 = 4
# Numbers of tensors in the weights' type, kept and working: as wide as the MLP; as wide as the model, for each of a
# token's experts; eager attention's [H, T, T]. And, working alone, as wide as the model around norms and residuals.
USUAL_MLP, MLP = (3, 3), {"gpt_oss": (6, 4)}
EXPERTS, SCORES = (1, 3), (2, 1.5)
USUAL_NORMS, NORMS = 4, {"gemma3_text": 10}
LINEAR = (60, 40)  # bytes for each number of the keys and values of linear attention, every value head its own keys
LOGIT = 20  # bytes of a logit in the loss and its backward pass: itself, fp32 copies of two models', their gradients


@dataclass(frozen=True)
class Shape:
    """What the memory of a step depends on, by the configuration of a model.

    Attributes:
        family: model type.
        parameters: of the whole model.
        layers: of the decoder.
        hidden: E.
        attention: 2 H D + 2 K D.
        norms: E for each norm of a layer, and H D + K D where queries and keys have norms.
        mlp: I, of a mixture X I of its experts, and a shared one's.
        experts: X; 0 where there are none.
        vocabulary: logits of a position.
        heads: H.
        sliding: layers with a window.
        sinks: whether these run eager attention.
        linear: bytes that linear attention keeps of a token, and layers of it.
    """

    family: str
    parameters: int
    layers: int
    hidden: int
    attention: int
    norms: int
    mlp: int
    experts: int
    vocabulary: int
    heads: int
    sliding: int
    sinks: bool
    linear: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """The shape of the causal LM that transformers makes of a configuration; no weights are made.

        Raises:
            ValueError: a family that is not supported.
        """
        import torch
        from transformers import AutoModelForCausalLM

        config = text_config(config)
        check_family(config.model_type)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        heads, kv_heads, hidden = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        experts = int(getattr(config, "num_experts_per_tok", 0) or 0)
        width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        mlp = experts * width + int(getattr(config, "shared_expert_intermediate_size", 0) or 0)
        layers, stock = model.get_decoder().layers, list(stock_layers(config).values())
        return cls(
            config.model_type, sum(p.numel() for p in model.parameters()), len(layers), hidden,
            2 * (heads + kv_heads) * head_dim, _norms(layers[-1], hidden, (heads + kv_heads) * head_dim),
            mlp if experts else config.intermediate_size, experts, config.vocab_size, heads,
            sum(window is not None for window in stock), has_sinks(config), (_linear(config), stock.count(None)),
        )  # fmt: skip


def _linear(config: Any) -> int:
    """Bytes that a layer of linear attention keeps of a token; 0 where no layer is of this kind."""
    keys, values = (getattr(config, f"linear_{name}_head_dim", 0) for name in ("key", "value"))
    return int(getattr(config, "linear_num_value_heads", 0) * (LINEAR[0] * keys + LINEAR[1] * values))


def _norms(layer: nn.Module, hidden: int, heads: int) -> int:
    """Numbers of a token that a layer's norms read; norms of queries and keys read theirs together."""
    names = [name.rpartition(".")[2] for name, _ in layer.named_modules()]
    of_heads = [name for name in names if name in ("q_norm", "k_norm")]
    of_tokens = [name for name in names if name.endswith("norm") and name not in of_heads]
    return hidden * len(of_tokens) + (heads if of_heads else 0)


@dataclass(frozen=True)
class Footprint:
    """Bytes of a step: of the weights, of what is kept for the backward pass, of its work, and of the logits."""

    weights: int
    kept: int
    working: int
    logits: int

    @property
    def total(self) -> int:
        """All of it, at the peak."""
        return self.weights + self.kept + self.working + self.logits


def footprint(
    shape: Shape, tokens: int, element_size: int, checkpointing: bool, loss_chunk: int, shards: int = 1
) -> Footprint:
    """Memory of one forward and backward pass.

    Args:
        tokens: T, of all rows of the pass.
        element_size: bytes of a weight.
        checkpointing: whether layers are recomputed in the backward pass.
        loss_chunk: positions whose logits exist at a time.
        shards: processes that the weights are sharded over.
    """
    mlp, norms = MLP.get(shape.family, USUAL_MLP), NORMS.get(shape.family, USUAL_NORMS)
    wide, scores = shape.experts * shape.hidden, shape.heads * tokens if shape.sinks and shape.sliding else 0
    square, (linear, of_linear) = element_size * SCORES[0] * scores, shape.linear
    beside = FP32 * shape.norms + element_size * (mlp[0] * shape.mlp + EXPERTS[0] * wide)
    attention = element_size * shape.attention
    if checkpointing:
        kept = shape.layers * element_size * shape.hidden + beside + max(attention, linear) + square
    else:
        kept = shape.layers * beside + (shape.layers - of_linear) * attention + of_linear * linear
        kept += shape.sliding * square
    working = element_size * (norms * shape.hidden + mlp[1] * shape.mlp + EXPERTS[1] * wide + SCORES[1] * scores)
    mask = (1 + element_size) * tokens if shape.sliding else 0
    weights, logits = element_size * shape.parameters, LOGIT * loss_chunk * shape.vocabulary
    if shards > 1:
        weights = weights // shards + 2 * weights // shape.layers  # the layer that runs and the next one are whole
    return Footprint(weights, int(kept * tokens), int((working + mask) * tokens), logits)
