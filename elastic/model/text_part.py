"""The language model of a backbone that also reads pictures, as a causal LM of its own (Gemma 3, Qwen3.5).

Its hub folders hold all parts in one, and transformers' text class does not find its weights among them.
"""

from typing import Any

WITH_TEXT = ("gemma3", "qwen3_5", "qwen3_5_moe")  # model types; what `attach` knows is the type of their text part


def text_config(config: Any) -> Any:
    """The text part's configuration, or the whole one if the model reads text alone."""
    return config.text_config if getattr(config, "model_type", None) in WITH_TEXT else config


def text_part(model: Any) -> Any:
    """A causal LM made of the text part's own modules, or the model itself if it reads text alone.

    Its logits equal the whole model's on text, bit for bit, but for `final_logit_softcapping`, which transformers'
    whole model leaves out.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if model.config.model_type not in WITH_TEXT:
        return model
    with torch.device("meta"):  # nothing of it stays
        part: Any = AutoModelForCausalLM.from_config(model.config.text_config, dtype=model.dtype)
    part.model, part.lm_head = model.model.language_model, model.lm_head
    part.config, part.generation_config = part.model.config, model.generation_config
    return part.train(model.training)
