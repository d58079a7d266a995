"""Backbones whose RoPE is stretched read more than `max_position_embeddings`, and rows of short samples may be longer
than what any backbone reads.
"""

import asyncio

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest.importorskip("fastapi", reason="needs the extra serve")

import elastic
from elastic.data.context_length import context_length
from elastic.data.packing import Sample, packed_row
from elastic.data.shards import DataWriter, longest_sample, read_manifest, tokenizer_hash
from elastic.evaluation.routed_lm import RoutedLM
from elastic.inference.serving.errors import RefusedError
from elastic.inference.serving.reading import PromptReader
from elastic.model.attach import attach, override_routes
from elastic.model.loading import load_backbone, longest_context
from elastic.training.resume import check_data
from tests.helpers.models import FAMILIES, random_ids, small_config, tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def stretched(rope, family="llama", limit=80):
    return tiny_model(family, max_position_embeddings=limit, rope_parameters={"rope_theta": 10000.0, **rope})


READS = [(YARN, 256), (DYNAMIC, 240), (LINEAR, 160), (LLAMA3, 80), ({"rope_type": "default"}, 80)]
READS += [({**YARN, "factor": 1.0}, 80), ({"rope_type": "yarn", "factor": 4.0}, 320)]


@pytest.mark.parametrize(("rope", "tokens"), READS)
def test_context_length(rope, tokens):
    assert context_length(stretched(rope).config) == tokens


@pytest.mark.parametrize("rope", [YARN, DYNAMIC, LINEAR], ids=["yarn", "dynamic", "linear"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_beyond_the_first_length_are_answered_as_by_the_stock_model(family, rope):
    ids, tokenizer = random_ids(1, 100), load_backbone("tiny")[1]
    prompt = " ".join(["then"] * 100)
    options = {"max_new_tokens": 4, "do_sample": False}
    stock, model = stretched(rope, family), attach(stretched(rope, family), small_config())
    expected, tokens = stock(ids).logits, stock.generate(ids, **options)
    with override_routes(model, 0):
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(model.generate(ids, **options), tokens)
    (answer,) = elastic.generate(model, tokenizer, prompt, chat_template=False, max_new_tokens=4)
    assert answer.report.prompt_tokens > 80 and answer.token_ids
    with pytest.raises(ValueError, match=f"the model reads at most {context_length(model.config)}"):
        elastic.generate(model, tokenizer, prompt * 4, chat_template=False, max_new_tokens=4)


def test_serving_and_evaluation_read_as_much():
    tokenizer = load_backbone("tiny")[1]
    model = attach(stretched(YARN), small_config())
    reader = PromptReader(model, tokenizer)
    try:
        message = {"role": "user", "content": " ".join(["then"] * 150)}
        assert len(asyncio.run(reader.read([message]))) > 80
        with pytest.raises(RefusedError, match="reads at most 256"):
            asyncio.run(reader.read([{**message, "content": " ".join(["then"] * 300)}]))
    finally:
        reader.close()
    assert RoutedLM(model, tokenizer, 0).max_length == 256
    assert RoutedLM(model, tokenizer, 0, max_length=100).max_length == 100


def test_calibration_reads_as_much(tmp_path):
    stretched(YARN).save_pretrained(tmp_path)
    assert longest_context(str(tmp_path)) == 256


def folder(path, tokenizer, lengths, seq_length):
    origin = {"seq_length": seq_length, "tokenizer": {"name": "tiny", "sha256": tokenizer_hash(tokenizer)}}
    with DataWriter(path, origin) as writer:
        for split in ("train", "test"):
            writer.add(split, "all", [packed_row([Sample([5] * n, n - 2, 0) for n in lengths])])
    return read_manifest(path)


@pytest.mark.parametrize("recorded", [True, False])
def test_rows_may_be_longer_than_a_context_but_samples_may_not(tmp_path, recorded):
    tokenizer = load_backbone("tiny")[1]
    manifest = folder(tmp_path / "data", tokenizer, [40, 64, 33], 1 << 20)
    if not recorded:
        for corpora in manifest["splits"].values():
            for entry in corpora.values():
                del entry["longest"]
    assert longest_sample(manifest) == 64
    check_data(manifest, 64, tokenizer, "tiny")
    with pytest.raises(ValueError, match=r"samples have up to 64 tokens but backbone 'tiny' reads at most 63"):
        check_data(manifest, 63, tokenizer, "tiny")
