"""A backbone's RoPE stretched over more tokens than it was trained on: YaRN (arXiv 2309.00071), or the base of dynamic
NTK at one length.

transformers' own `dynamic` type keeps the base of the longest prompt so far and moves it while an answer is generated,
so that an answer depends on what was asked before; here the base is that of the longest prompt for all, and stays.
"""

from typing import Any

from elastic.config import RopeScaling
from elastic.protocols import CausalLM


def stretch(model: CausalLM, scaling: RopeScaling, factor: float) -> None:
    """Let a backbone read `factor` times its length.

    yarn: transformers' YaRN with its defaults. ntk: base * factor^(d / (d - 2)) for d rotated dimensions of a head,
    which dynamic NTK comes to at factor times the trained length.

    Args:
        model: a causal LM, attached or not, that has generated nothing yet.
        factor: 1 or more; 1 changes nothing.

    Raises:
        ValueError: a factor below 1, or a model whose RoPE is not the plain one of all its layers.
    """
    if factor < 1:
        raise ValueError(f"factor={factor:g} is below 1; a backbone reads its own length without stretching")
    rope: dict[str, Any] = dict(getattr(model.config, "rope_parameters", None) or {})
    if rope.get("rope_type") != "default":
        kind = rope.get("rope_type") or ("several kinds" if rope else "none")
        raise ValueError(
            f"the backbone's RoPE is {kind!r}, expected 'default': it is stretched already, or differs by layer; leave "
            "the scaling out"
        )
    if factor == 1:
        return
    decoder: Any = model.get_decoder()
    config, trained = model.config, model.config.max_position_embeddings
    if scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": trained}
    else:
        rotated = 2 * decoder.rotary_emb.inv_freq.shape[0]
        rope["rope_theta"] *= factor ** (rotated / (rotated - 2))
    config.rope_parameters, config.max_position_embeddings = rope, int(trained * factor)
    device = decoder.rotary_emb.inv_freq.device
    decoder.rotary_emb = type(decoder.rotary_emb)(config).to(device)
