"""Gemma 3 and Qwen3.5 as the hub has them: the text part of a model that reads pictures too."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, Gemma3Config, Gemma3ForConditionalGeneration

from elastic.model.attach import attach, override_routes
from elastic.model.loading import architecture, backbone_architecture, load_backbone, load_tokenizer, longest_context
from elastic.model.text_part import WITH_TEXT, text_part
from tests.helpers.models import random_ids, small_config, tiny_model

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip


def with_pictures(family):
    """A tiny model of all parts, with the settings of the text part's."""
    torch.manual_seed(0)
    if family == "gemma3":
        text = tiny_model("gemma3_text", final_logit_softcapping=None).config.to_dict()
        config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
        return Gemma3ForConditionalGeneration(config).eval()
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
              "out_hidden_size": 64, "num_position_embeddings": 16}  # fmt: skip
    config = AutoConfig.for_model(
        family, text_config=tiny_model(f"{family}_text").config.to_dict(), vision_config=vision
    )
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize("family", WITH_TEXT)
@torch.no_grad()
def test_a_folder_of_all_parts_gives_its_text_part(tmp_path, family):
    whole, ids = with_pictures(family), random_ids(2, 40)
    whole.save_pretrained(tmp_path)
    load_tokenizer("tiny").save_pretrained(tmp_path)
    model, _ = load_backbone(str(tmp_path))
    assert model.config.model_type == f"{family}_text" and not any(p.is_meta for p in model.parameters())
    assert longest_context(str(tmp_path)) == 512 and backbone_architecture(str(tmp_path)) == architecture(model)
    assert torch.equal(model(ids).logits, whole(ids).logits)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = whole.generate(ids, **options)
    for part in (model, text_part(whole)):
        attach(part, small_config())
        with override_routes(part, 0):
            assert torch.equal(part.generate(ids, **options), expected)


@pytest.mark.parametrize("family", WITH_TEXT)
def test_all_parts_at_once_are_refused_with_the_way_out(family):
    with pytest.raises(ValueError, match=rf"family '{family}' is not supported.*text_part\(model\)"):
        attach(with_pictures(family), small_config())
