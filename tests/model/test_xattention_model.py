"""XAttention heads in a model: FA-XA and XA-SSA in prefill, decoding, reports and training."""

import itertools
import json

import pytest
import torch

from elastic.config import ElasticConfig
from elastic.inference.generate import generate, load
from elastic.model.attach import attach, last_routes, override_routes, route_of
from elastic.model.checkpoint import save_elastic
from elastic.routing.sparsity import density_by_layer, esr, visited_pairs
from tests.helpers.models import KV_HEADS, LAYERS, left_padded, random_ids, small_config, tiny_model, varied_routers
from tests.helpers.training import ROOT, build_data, small_run
from tests.helpers.xattention import MODES, sparse_of


def xa_model(name: str, family: str = "llama", **sizes):
    model = attach(tiny_model(family), small_config(**vars(sparse_of(name, **sizes))))
    varied_routers(model)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_threshold_of_one_is_the_dense_model(family):
    model, ids = tiny_model(family), random_ids(2, 90)
    with torch.no_grad():
        dense = model(ids).logits
        attach(model, small_config(**vars(sparse_of("FA-XA", threshold=1.0))))
        with override_routes(model, 1):
            torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-5)
            assert last_routes(model).density.shape == (LAYERS, 2, KV_HEADS)
            torch.testing.assert_close(last_routes(model).density, torch.ones(LAYERS, 2, KV_HEADS, dtype=torch.float64))
        sparser = sparse_of("FA-XA", threshold=0.3)
        with override_routes(model, 1, sparser):
            assert not torch.allclose(model(ids).logits, dense, rtol=1e-3)
            state = last_routes(model)
        assert bool((state.density < 0.9).all())
        with override_routes(model, 0, sparse_of("FA-XA")):
            assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize("name", ["FA-XA", "XA-SSA"])
def test_batches_decode_as_their_samples_alone(name):
    """Prefill with mixed routes, left padding, then cached steps in which XAttention heads see the whole cache."""
    model = xa_model(name)
    ids, mask = left_padded(random_ids(2, 70), [0, 23])
    alone = [model.generate(ids[row : row + 1, pad:], max_new_tokens=5, do_sample=False, eos_token_id=None,
                            pad_token_id=0)[0, -5:].tolist() for row, pad in ((0, 0), (1, 23))]  # fmt: skip
    both = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert both[:, -5:].tolist() == alone


@pytest.mark.parametrize("name", ["FA-XA", "XA-SSA"])
def test_ratios_come_from_what_was_visited(name):
    model = xa_model(name)
    ids, mask = left_padded(random_ids(2, 90), [0, 40])
    with torch.no_grad():
        model(ids, attention_mask=mask)
    state, sparse = last_routes(model), model._elastic_handle.state.config.sparse
    assert set(state.route.unique().tolist()) == {0.0, 1.0}
    last, overall = esr(state.route, state.lengths, sparse, state.density)
    pruned = torch.empty(LAYERS, 2, KV_HEADS, dtype=torch.float64)
    for layer, n, head in itertools.product(range(LAYERS), range(2), range(KV_HEADS)):
        mode, length = MODES[name][int(state.route[layer, n, head])], int(state.lengths[n])
        share = 2 * visited_pairs(length, mode, sparse) / length / (length + 1) if mode != "xattention" else None
        pruned[layer, n, head] = 1 - (state.density[layer, n, head] if share is None else share)
    torch.testing.assert_close(overall, pruned.mean((0, 2)))
    torch.testing.assert_close(last, pruned[-1].mean(-1))
    with pytest.raises(ValueError, match=f"what the xattention heads of {name} visit depends on the input"):
        esr(state.route, state.lengths, sparse)


def test_density_by_layer_looks_at_xattention_heads_only():
    route = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]])  # [L 2, N 1, K 2]
    share = torch.tensor([[[0.25, 0.5]], [[0.75, 0.25]]], dtype=torch.float64)
    assert density_by_layer(route, sparse_of("FA-XA"), share) == [[0.25, None]]
    assert density_by_layer(route, sparse_of("XA-SSA"), share) == [[0.5, 0.5]]
    assert density_by_layer(route, sparse_of("XA-SSA"), None) == [[]]


def test_generation_reports_what_was_visited(tmp_path):
    from elastic.model import loading

    model, tokenizer = loading.load_backbone("tiny")
    attach(model, small_config(**vars(sparse_of("XA-SSA"))))
    varied_routers(model)
    path = save_elastic(tmp_path / "ck", model, "tiny")
    assert json.loads((path / "elastic.json").read_text())["config"]["sparse"]["route0"] == "xattention"
    prompt = "f4 f5 " * 30 + "key k3 1 2 3 4 " + "f6 " * 20 + "find k3"
    result = generate(model, tokenizer, prompt, max_new_tokens=3)[0]
    assert generate(load(path)[0], tokenizer, prompt, max_new_tokens=3)[0] == result
    report = result.report
    layers = [share for share, layer in zip(report.density, report.route, strict=True) if 0 in layer]
    assert layers and all(0 < share < 1 for share in layers)
    assert all(share is None for share, layer in zip(report.density, report.route, strict=True) if 0 not in layer)
    assert f"xattention heads compute {sum(layers) / len(layers):.3f} of the pairs" in report.render()
    assert "█ xattention (stride 4, threshold 0.5)   ░ streaming (sink 4, window 8)" in report.render()
    assert 0 < report.esr_all < 1
    one_token = generate(model, tokenizer, "f4", max_new_tokens=2, chat_template=False)[0].report
    assert one_token.esr_all == 0.0 and set(one_token.density) <= {1.0, None}


def test_interleaved_requests_keep_their_own_counts():
    from transformers import DynamicCache

    model, caches, shares = xa_model("FA-XA"), [], []
    with torch.no_grad(), override_routes(model, 1):
        for seed in (1, 2):
            cache = DynamicCache(config=model.config)
            model(random_ids(1, 80, seed), past_key_values=cache, use_cache=True)
            caches.append(cache)
            shares.append(last_routes(model).density)
        for cache in caches:
            model(random_ids(1, 1), past_key_values=cache, use_cache=True)
    assert not torch.equal(*shares)
    for cache, share in zip(caches, shares, strict=True):
        assert torch.equal(route_of(cache).density, share)


@pytest.mark.parametrize("name", ["FA-XA", "XA-SSA"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_the_routers(name, checkpointing, tmp_path):
    data = build_data(tmp_path)
    config = ElasticConfig(small_config().router, sparse_of(name))
    settings = {"backbone": "tiny", "elastic": config, "gradient_checkpointing": checkpointing}
    before, _, _ = small_run(data, tmp_path, fit=False, **settings)
    before.configure_model()
    module, _, trainer = small_run(data, tmp_path, **settings)
    assert trainer.global_step == 2
    assert 0 < float(trainer.callback_metrics["train/esr/single_qa"]) < 1
    moved = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), module.parameters(), strict=True) if b.requires_grad
    ]
    assert sum(moved) > len(moved) // 2


@pytest.mark.parametrize("file", ["fa_xa", "xa_ssa"])
def test_the_shipped_configuration_trains(file, tmp_path, monkeypatch):
    from elastic import cli

    data = build_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    files = [f for path in ("debug.yaml", f"sparse/{file}.yaml") for f in ("-c", str(ROOT / "configs" / path))]
    words = ["--model.elastic.sparse.stride=4", f"--data.data_dir={data}", "--trainer.max_steps=2"]
    words += ["--trainer.enable_progress_bar=false"]
    assert cli.main(["fit", *files, *words]) == 0
    stored = json.loads((tmp_path / "runs" / "debug" / "checkpoint" / "elastic.json").read_text())["config"]["sparse"]
    assert (stored["route0"], stored["route1"]) == MODES[file.upper().replace("_", "-")]
