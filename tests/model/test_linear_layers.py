"""Backbones with layers of linear attention: routers in the others alone, the linear ones as in the stock model. That
they stay as they were, and what caches hold of them, is in test_sliding_layers.py.
"""

import pytest
import torch
from transformers import DynamicCache

import elastic
from elastic.attention.row_slice import RowSlice
from elastic.cache.elastic_cache import ElasticCache
from elastic.model.attach import attach, detach, elastic_config, last_routes, override_routes, routers, set_row_slice
from elastic.model.checkpoint import load_into, save_elastic
from elastic.model.loading import architecture
from tests.helpers.cached import generate, new_cache, routed
from tests.helpers.models import (
    LINEAR,
    STATES,
    random_ids,
    small_config,
    tiny_model,
)

BOUNDS = torch.tensor([0, 20, 50])


@pytest.mark.parametrize("family", LINEAR)
def test_detach_gives_the_layers_their_own_forward_back(family):
    model = tiny_model(family)
    layers = [model.get_decoder().layers[number].linear_attn for number in (0, 2)]
    before = [sorted(vars(layer)) for layer in layers]
    attach(model, small_config())
    assert all("forward" in vars(layer) for layer in layers)
    detach(model)
    assert [sorted(vars(layer)) for layer in layers] == before


@pytest.mark.parametrize("family", LINEAR)
@torch.no_grad()
def test_samples_of_a_packed_row_begin_without_a_state(family):
    model, ids = routed(family), random_ids(1, 50)
    alone = [model(ids[:, begin:end]).logits[0] for begin, end in ((0, 20), (20, 50))]
    for places in ({"cu_seq_lens": BOUNDS}, {"position_ids": torch.cat([torch.arange(20), torch.arange(30)])[None]}):
        found = model(ids, **places, use_cache=False).logits[0]
        torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-4)
    whole = model(ids, use_cache=False).logits[0]
    assert (whole[20:] - alone[1]).abs().max() > 0.1  # the state of the first would have been seen


@torch.no_grad()
def test_a_cache_that_was_reset_takes_other_rows():
    model, ids = routed("qwen3_5_text", "elastic"), random_ids(2, 50)
    cache = new_cache(model)
    _, alone = generate(model, ids, steps=10)
    generate(model, ids, cache=cache, steps=10)
    cache.reset()
    assert cache.get_seq_length() == 0 and not any(layer.nbytes for layer in cache.linear)
    again = generate(model, ids[:1], cache=cache, steps=10)[1]
    torch.testing.assert_close(again[:, 0], alone[:, 0], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_what_a_state_cannot_do_is_refused():
    model = routed("qwen3_next", "full")
    cache, padded = new_cache(model), new_cache(model)
    model(random_ids(1, 40), past_key_values=cache)
    with pytest.raises(ValueError, match="cropping 2 tokens would take them out of the state of a layer of linear"):
        cache.crop(-2)
    cache.crop(0)
    assert cache.get_seq_length() == 40
    mask = torch.ones(1, 20, dtype=torch.int64)
    mask[:, 15:] = 0
    model(random_ids(1, 20), attention_mask=mask, past_key_values=padded)
    with pytest.raises(ValueError, match="padded on the right, so new tokens would follow padding"):
        cache.join(padded)
    with pytest.raises(ValueError, match=r"made for windows \{\} by layer .*has \{0: None, 2: None\}"):
        model(random_ids(1, 20), past_key_values=ElasticCache(5, elastic_config(model)))
    with pytest.raises(ValueError, match="the model has layers of linear_attention too"):
        model(random_ids(1, 30), attention_mask={"full_attention": torch.ones(1, 30, dtype=torch.int64)})
    with pytest.raises(ValueError, match="called outside the attached model's decoder"):
        model.model.layers[0].linear_attn(torch.zeros(1, 4, 64))


class Half(RowSlice):
    size = 2


def test_slices_of_a_row_are_refused():
    model = routed("qwen3_5_text")
    set_row_slice(model, Half())
    with pytest.raises(ValueError, match="linear attention carries a state through the whole of it"):
        model(random_ids(1, 10), cu_seq_lens=torch.tensor([0, 20]), use_cache=False)


REFUSED = {
    "no full layer": ("qwen3_next", {"layer_types": ["linear_attention"] * 5}, "every layer has linear attention, but"),
    "of this type by name alone": ("qwen3", STATES, "layer 0 is of type 'linear_attention', but has no linear_attn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_attach_refuses_by_name(case):
    family, changes, told = REFUSED[case]
    with pytest.raises(ValueError, match=told):
        attach(tiny_model(family, **changes), small_config())


@pytest.mark.parametrize("make", ["elastic", "dynamic"])
@torch.no_grad()
def test_a_report_counts_routed_layers_and_all_layers(make):
    model = routed("qwen3_next", "full")
    cache = new_cache(model) if make == "elastic" else DynamicCache(config=model.config)
    with override_routes(model, 0):
        model(random_ids(1, 50), past_key_values=cache)
    (report,) = elastic.route_report(model, cache)
    assert (report.msr, report.msr_model, report.layers, report.routed_layers) == (0.0, 0.4, 5, (1, 3, 4))
    assert (report.esr_all, report.esr_model) == (0.0, pytest.approx(2 / 5))
    token, state = 2 * 2 * 16 * 4, (2 * 2 * 8 + 4 * 8) * 4 * 4 + 4 * 8 * 8 * 4  # of the convolution and the heads
    assert report.kv_bytes_kept == report.kv_bytes_full == 3 * 50 * token
    assert report.kv_bytes_kept_model == report.kv_bytes_full_model == 3 * 50 * token + 2 * state
    assert report.kv_bytes_held == {"elastic": 3 * 56, "dynamic": 3 * 50}[make] * token + 2 * state
    assert "routers in layers 1, 3, 4 of 5; with its other layers, counted as sparse" in str(report)


def test_checkpoints_go_by_routed_layers(tmp_path):
    model = routed("qwen3_5_moe_text")
    assert architecture(model)["routed_layers"] == [1, 3, 4] and architecture(model)["decoder_layers"] == 5
    save_elastic(tmp_path / "routers", model, "tiny")
    again = load_into(tiny_model("qwen3_5_moe_text"), tmp_path / "routers")
    for mine, theirs in zip(routers(again), routers(model), strict=True):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in mine.state_dict().items())
    moved = [f"{kind}_attention" for kind in ("full", "linear", "full", "linear", "full")]
    with pytest.raises(ValueError, match=r"routed_layers=\[1, 3, 4\], but this backbone has routed_layers=\[0, 2, 4\]"):
        load_into(tiny_model("qwen3_5_moe_text", layer_types=moved), tmp_path / "routers")


@torch.no_grad()
def test_positions_of_pictures_and_text_tell_packed_rows_too():
    """Qwen3.5 takes positions of text, time, height and width; the first tell where samples begin."""
    model, ids = routed("qwen3_5_text"), random_ids(1, 50)
    places = torch.cat([torch.arange(20), torch.arange(30)])[None]
    expected = model(ids, position_ids=places, use_cache=False).logits
    found = model(ids, position_ids=places.expand(4, 1, 50), use_cache=False).logits
    assert torch.equal(found, expected) and last_routes(model).route.shape == (3, 2, 2)
