"""Backbones whose RoPE is stretched read more than `max_position_embeddings`, and rows of short samples may be longer
than what any backbone reads.
"""

import asyncio
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

pytest.importorskip("lm_eval", reason="needs the extra eval")
pytest.importorskip("fastapi", reason="needs the extra serve")

import elastic
from elastic.attention.layout import packed_layout
from elastic.attention.row_slice import RowSlice
from elastic.data.context_length import context_length
from elastic.data.packing import Sample, packed_row
from elastic.data.shards import DataWriter, longest_sample, read_manifest, tokenizer_hash
from elastic.evaluation.routed_lm import RoutedLM
from elastic.inference.serving.batch import Batch
from elastic.inference.serving.errors import RefusedError
from elastic.inference.serving.reading import PromptReader
from elastic.model.attach import attach, detach, override_routes
from elastic.model.loading import load_backbone, longest_context
from elastic.model.long_rope import check_whole_rows
from elastic.training.resume import check_data
from tests.helpers.cached import new_cache
from tests.helpers.models import FAMILIES, left_padded, random_ids, small_config, tiny_model

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.2, 1.4, 1.6], "long_factor": [2.0, 3.0, 4.0, 8.0],
        "original_max_position_embeddings": 64}  # fmt: skip
ROPES = {"yarn": YARN, "dynamic": DYNAMIC, "linear": LINEAR}
# A configuration of phi3 takes longrope alone, which has tests of its own below.
STRETCHED = [(family, name) for family in FAMILIES if family != "phi3" for name in ROPES]


def stretched(rope, family="llama", limit=80):
    return tiny_model(family, max_position_embeddings=limit, rope_parameters={"rope_theta": 10000.0, **rope})


READS = [(YARN, 256), (DYNAMIC, 240), (LINEAR, 160), (LLAMA3, 80), ({"rope_type": "default"}, 80)]
READS += [({**YARN, "factor": 1.0}, 80), ({"rope_type": "yarn", "factor": 4.0}, 320)]


@pytest.mark.parametrize(("rope", "tokens"), READS)
def test_context_length(rope, tokens):
    assert context_length(stretched(rope).config) == tokens


@pytest.mark.parametrize(("family", "name"), STRETCHED)
def test_prompts_beyond_the_first_length_are_answered_as_by_the_stock_model(family, name):
    ids, tokenizer, rope = random_ids(1, 100), load_backbone("tiny")[1], ROPES[name]
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


def phi3(original=64):
    rope = {"rope_theta": 1e4, "partial_rotary_factor": 0.5, **LONG, "original_max_position_embeddings": original}
    sizes = {"max_position_embeddings": 160, "original_max_position_embeddings": original}
    return tiny_model("phi3", rope_parameters=rope, eos_token_id=None, **sizes)


@pytest.mark.parametrize("length", [40, 64, 65, 100])
def test_phi3_answers_as_the_stock_model_on_either_side_of_its_switch(length):
    ids, options = random_ids(1, length), {"max_new_tokens": 8, "do_sample": False}
    stock, model = phi3(), attach(phi3(), small_config())
    expected = stock.generate(ids, **options)
    with override_routes(model, 0):
        assert torch.equal(model(ids).logits, stock(ids).logits)
        for cache in (None, DynamicCache(config=model.config), new_cache(model)):
            if length == 64:
                with pytest.raises(ValueError, match="cross 64, where this model's RoPE takes its long factors"):
                    model.generate(ids, past_key_values=cache, **options)
                continue
            assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
            assert cache is None or cache.get_seq_length() == length + 7
    assert torch.equal(detach(model).generate(ids, **options), expected)


def test_phi3_is_not_decoded_across_its_switch_by_hand():
    model, cache = attach(phi3(), small_config()), DynamicCache()
    model(random_ids(1, 64), past_key_values=cache)
    with pytest.raises(ValueError, match=r"cross 64.*end within 64"):
        model(random_ids(1, 1), past_key_values=cache)


def turns(change):
    """A Phi-3 whose two rows, the second padded, have read 70 columns; then `change` and three tokens more."""
    model = attach(phi3(), small_config())
    for cache in (DynamicCache(config=model.config), new_cache(model)):
        ids, mask = left_padded(random_ids(2, 70), change.pads)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with torch.no_grad(), override_routes(model, 0):
            model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            rows = change(cache)
            mask = torch.cat([mask[rows, : cache.get_seq_length()], mask.new_ones(len(rows), change.new)], 1)
            more = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -change.new :]}
            yield lambda: model(random_ids(len(rows), change.new), past_key_values=cache, **more)  # noqa: B023


class Kept:
    """Nothing happens; by columns the length of 64 was crossed before, by positions it is now."""

    pads, new = [8, 12], 5

    def __call__(self, cache):
        return [0, 1]


class Cropped(Kept):
    """The rest is short enough for the short factors, but was rotated by the long ones."""

    pads, new = [0, 12], 3

    def __call__(self, cache):
        cache.crop(-10)
        return [0, 1]


class Selected(Cropped):
    """The row that was long enough for the long factors leaves."""

    def __call__(self, cache):
        cache.batch_select_indices(torch.tensor([1]))
        return [1]


class Swapped(Cropped):
    """Both rows become the short one."""

    def __call__(self, cache):
        cache.reorder_cache(torch.tensor([1, 1]))
        return [1, 1]


@pytest.mark.parametrize("change", [Kept(), Cropped(), Selected(), Swapped()], ids=lambda it: type(it).__name__)
def test_phi3_rotates_new_tokens_as_the_cached_ones_or_says_so(change):
    told = "cross 64" if type(change) is Kept else "end within 64.*long factors"
    for more in turns(change):
        with pytest.raises(ValueError, match=told):
            more()


def test_phi3_continues_what_the_long_factors_rotated():
    """Cropped and read beyond the length again: all tokens equal those that were read at once."""
    model, ids = attach(phi3(), small_config()), random_ids(1, 75)
    for cache in (DynamicCache(config=model.config), new_cache(model)):
        with torch.no_grad(), override_routes(model, 0):
            model(ids[:, :70], past_key_values=cache)
            cache.crop(-10)
            found = model(ids[:, 60:], past_key_values=cache).logits
            torch.testing.assert_close(found, model(ids).logits[:, 60:], rtol=1e-4, atol=1e-4)


def test_a_rotation_of_one_kind_of_layers_is_watched_too():
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64, "factor": 4.0}  # fmt: skip
    kinds = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    model = attach(tiny_model("gemma3_text", rope_parameters=kinds), small_config())
    cache = new_cache(model)
    model(random_ids(1, 60), past_key_values=cache)
    with pytest.raises(ValueError, match="up to 70 in all, cross 64"):
        model(random_ids(1, 10), past_key_values=cache)


def test_pieces_of_a_prompt_that_crosses_the_switch_are_refused():
    model = attach(phi3(), small_config())
    with pytest.raises(ValueError, match="prefill_chunk_size=20: a prompt of 70 tokens in pieces crosses 64"):
        model.generate(random_ids(1, 70), max_new_tokens=2, prefill_chunk_size=20)
    assert model.generate(random_ids(1, 60), max_new_tokens=2, prefill_chunk_size=20).shape == (1, 62)


def test_slices_of_a_row_that_crosses_the_switch_are_refused():
    layout = packed_layout(torch.tensor([0, 20, 90]), None, 90, torch.device("cpu"))
    check_whole_rows((), layout, SimpleNamespace(size=2))
    check_whole_rows((64,), layout, RowSlice())
    check_whole_rows((70,), layout, SimpleNamespace(size=2))
    with pytest.raises(ValueError, match=r"a sample of 70 tokens crosses 64.*context parallelism"):
        check_whole_rows((64,), layout, SimpleNamespace(size=2))


def test_requests_of_two_rotations_do_not_decode_together():
    model = attach(phi3(), small_config())
    caches, batches = [], []
    for length in (30, 70):
        cache = new_cache(model)
        with torch.no_grad():
            model(random_ids(1, length), past_key_values=cache)
        caches.append(cache)
        job = SimpleNamespace(sampling=SimpleNamespace(seed=None))
        batches.append(Batch(model, [SimpleNamespace(job=job)], torch.zeros(1, 1, dtype=torch.int64), cache))
    assert not batches[0].takes(batches[1]) and not batches[1].takes(batches[0]) and batches[0].takes(batches[0])
    with pytest.raises(ValueError, match="rotated their keys by the same factors"):
        caches[0].join(caches[1])


def test_a_served_answer_ends_before_the_rotation_changes():
    """As long as it may be it is answered; a token more would fail whoever decodes beside it."""
    model, tokenizer = attach(phi3(), small_config()), load_backbone("tiny")[1]
    reader = PromptReader(model, tokenizer)
    try:
        assert [reader.room_after(length) for length in (30, 64, 65, 100, 159)] == [35, 1, 95, 60, 1]
    finally:
        reader.close()
    for length in (30, 64):
        ids, room = random_ids(1, length), reader.room_after(length)
        assert model.generate(ids, max_new_tokens=room, do_sample=False).shape[1] == length + room
        with pytest.raises(ValueError, match="cross 64"):
            model.generate(ids, max_new_tokens=room + 1, do_sample=False)


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
