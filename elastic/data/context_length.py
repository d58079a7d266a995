"""How many tokens a backbone reads at once, by its configuration."""

from typing import Any

_STRETCHED = ("dynamic", "linear", "yarn")  # max_position_embeddings of the others is what they read already


def context_length(config: Any) -> int:
    """Tokens of one text that a backbone reads: `max_position_embeddings`, or more where its RoPE is stretched (YaRN,
    dynamic NTK, linear) by a factor over the length it was trained on, as vLLM counts them.

    Args:
        config: of a transformers causal LM.
    """
    limit, rope = int(config.max_position_embeddings), getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in _STRETCHED:
        return limit
    trained = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(trained * (rope.get("factor") or 1.0)))
