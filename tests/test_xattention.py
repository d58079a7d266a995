"""XAttention heads from the plan to a trained run: FA-XA and XA-SSA against the oracle, what they visit, decoding."""

import importlib
import itertools
import json

import pytest
import torch

from elastic import reference
from elastic.attention import choose_blocks, fused, routed_attention
from elastic.backbone import attach, override_routes, route_of, routing
from elastic.checkpoint import save_elastic
from elastic.config import ElasticConfig, SparseConfig
from elastic.head_plan import HeadPlan, batch_layout, packed_layout
from elastic.inference import generate, load
from elastic.kernels.block_bits import count_bits, mask_from_bits, query_block
from elastic.kernels.params import Ranges
from elastic.kernels.xattention_oracle import select_oracle
from elastic.patterns import BLOCK_SPARSE, FULL, STREAMING
from elastic.selection import BlockPairs, density
from elastic.sparsity import density_by_layer, esr, visited_pairs
from tests.models import KV_HEADS, LAYERS, left_padded, random_ids, small_config, tiny_model, varied_routers
from tests.training import ROOT, build_data, small_run

CPU = torch.device("cpu")
SCALE = 0.25
MODES = {"FA-XA": ("full", "xattention"), "XA-SSA": ("xattention", "streaming"), "SSA-XA": ("streaming", "xattention")}
BOUNDS = [0, 1, 130, 300]


def sparse_of(name: str, block: int = 4, **sizes) -> SparseConfig:
    """A configuration whose XAttention heads leave out much."""
    route0, route1 = MODES[name]
    sizes = {"sink": block, "window": 2 * block, "stride": min(4, block), "threshold": 0.5, **sizes}
    return SparseConfig(route0, route1, block=block, **sizes)


def inputs(rows, queries, keys, heads=4, kv_heads=2, seed=0):
    """Queries and keys that prefer some keys to others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, queries, 16), (rows, kv_heads, keys, 16), (rows, kv_heads, keys, 16))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(x.requires_grad_() for x in (3 * q, 3 * k, v))


def oracle_mask(q, k, sparse):
    """What XAttention heads see of whole rows, [B, H, Lq, Lk]; a single query sees everything."""
    queries, keys = q.shape[2], k.shape[2]
    if queries == 1:
        return torch.ones(q.shape[0], q.shape[1], 1, keys, dtype=torch.bool)
    mode = torch.full((q.shape[0], k.shape[1]), BLOCK_SPARSE)
    sizes = sparse.stride, sparse.threshold, sparse.block, SCALE, Ranges()
    bits = select_oracle(q.detach().transpose(1, 2), k.detach().transpose(1, 2), mode, *sizes)
    blocks = mask_from_bits(bits).repeat_interleave(sparse.block, -1)[..., :keys]
    rows = blocks.repeat_interleave(query_block(sparse.block), -2)[:, :, :queries]
    return rows & (torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None])


def mixed_by_the_oracle(q, k, v, route, sparse):
    return reference.routed_attention(q, k, v, route, sparse, SCALE, oracle_mask(q, k, sparse)).transpose(1, 2)


@pytest.mark.parametrize("name", ["FA-XA", "SSA-XA"])
@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (5, 5), (193, 193), (300, 300), (1, 90), (150, 290)])
def test_mixed_routes_equal_the_oracle(name, block, queries, keys):
    sparse = sparse_of(name, block)
    q, k, v = inputs(2, queries, keys)
    route = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    plan = HeadPlan.build(route, sparse, batch_layout(2, queries, keys - queries, CPU))
    expected = mixed_by_the_oracle(q, k, v, route, sparse)
    torch.testing.assert_close(routed_attention(q, k, v, route, plan, SCALE), expected, rtol=0, atol=1e-12)
    if block == 64:  # the operators take no smaller blocks
        chosen = choose_blocks(q, k, v, route, plan, SCALE)
        torch.testing.assert_close(fused(q, k, v, route, chosen, SCALE), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["FA-XA", "XA-SSA"])
@pytest.mark.parametrize("block", [4, 64])
def test_gradients_equal_those_of_mixing_both_branches_under_fixed_blocks(name, block):
    """Straight-through against autograd through r * O_1 + (1 - r) * O_0: PyTorch path, and the fused operators."""
    sparse = sparse_of(name, block)
    for values in ([[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]):
        grads = []
        for path in ("oracle", "torch", "fused"):
            if path == "fused" and block < 64:
                continue
            q, k, v = inputs(2, 200, 200)
            route = torch.tensor(values, dtype=torch.float64).requires_grad_()
            if path == "oracle":
                out = mixed_by_the_oracle(q, k, v, route, sparse)
            else:
                plan = HeadPlan.build(route, sparse, batch_layout(2, 200, 0, CPU))
                chosen = choose_blocks(q, k, v, route, plan, SCALE)
                out = (routed_attention if path == "torch" else fused)(q, k, v, route, chosen, SCALE)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
            grads.append(torch.autograd.grad((out * weight).sum(), (q, k, v, route)))
        for found in grads[1:]:
            for ours, expected in zip(found, grads[0], strict=True):  # the route's gradient is summed in fp32
                torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-3 if expected.shape == (2, 2) else 1e-6)
        assert float(grads[0][3].abs().max()) > 1.0


@pytest.mark.parametrize("block", [4, 64])
@pytest.mark.parametrize("name", ["FA-XA", "XA-SSA"])
def test_packed_samples_and_their_route_gradients_equal_the_samples_alone(name, block):
    sparse = sparse_of(name, block)
    q, k, v = inputs(1, 300, 300)
    route = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    plan = HeadPlan.build(route, sparse, packed_layout(torch.tensor(BOUNDS, dtype=torch.int32), None, 300, CPU))
    parts, shares = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(BOUNDS)):
        own = tuple(t[:, :, begin:end] for t in (q, k, v))
        parts.append(reference.routed_attention(*own, route[n : n + 1], sparse, SCALE, oracle_mask(*own[:2], sparse)))
        alone = HeadPlan.build(route[n : n + 1], sparse, batch_layout(1, end - begin, 0, CPU))
        shares.append(density(choose_blocks(*own, route[n : n + 1], alone, SCALE)))
    expected = torch.cat(parts, 2).transpose(1, 2)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    want = torch.autograd.grad((expected * weight).sum(), (q, k, v, route), retain_graph=True)
    chosen = choose_blocks(q, k, v, route, plan, SCALE)
    torch.testing.assert_close(density(chosen), torch.cat(shares))
    for run in (routed_attention, fused)[: 2 if block == 64 else 1]:
        out = run(q, k, v, route, chosen, SCALE)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
        found = torch.autograd.grad((out * weight).sum(), (q, k, v, route))
        for ours, theirs in zip(found, want, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3 if theirs.shape == (3, 2) else 1e-6)


def test_a_share_of_the_slots_estimates_the_route_gradient_with_blocks(monkeypatch):
    """The mean over all equally likely draws is the exact gradient: slots find their own rows of the bits."""
    q, k, v = inputs(1, 1500, 1500, seed=2)
    layout = packed_layout(torch.tensor([0, 700, 1500]), None, 1500, CPU)
    monkeypatch.setattr(
        importlib.import_module("elastic.kernels.route_gap"), "_TARGET_SLOTS", 3
    )  # slots of several query blocks
    gradients = []
    for offset in (None, 0, 1, 2, 3):
        route = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
        plan = HeadPlan.build(route, sparse_of("FA-XA", 64), layout, 1.0 if offset is None else 0.25)
        chosen = choose_blocks(q, k, v, route, plan, SCALE)
        if offset is not None:
            monkeypatch.setattr(torch, "randint", lambda high, size, o=offset, **_: torch.full(size, o))
            layout.kept.clear()
        out = fused(q, k, v, route, chosen, SCALE)
        gradients.append(torch.autograd.grad((out * torch.sin(out.detach())).sum(), route)[0])
    torch.testing.assert_close(torch.stack(gradients[1:]).mean(0), gradients[0], rtol=1e-4, atol=1e-3)
    assert not torch.allclose(gradients[1], gradients[0], rtol=1e-2)


def test_left_padding_equals_the_samples_alone():
    sparse = sparse_of("FA-XA")
    q, k, v = inputs(2, 120, 120)
    mask = torch.ones(2, 120, dtype=torch.long)
    mask[1, :41] = 0
    route = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    plan = HeadPlan.build(route, sparse, batch_layout(2, 120, 0, CPU, mask))
    chosen = choose_blocks(q, k, v, route, plan, SCALE)
    out, share = routed_attention(q, k, v, route, chosen, SCALE), density(chosen)
    for row, pad in ((0, 0), (1, 41)):
        own = tuple(x[row : row + 1, :, pad:] for x in (q, k, v))
        expected = mixed_by_the_oracle(*own, route[row : row + 1], sparse)
        torch.testing.assert_close(out[row : row + 1, pad:], expected, rtol=0, atol=1e-12)
        alone = HeadPlan.build(route[row : row + 1], sparse, batch_layout(1, 120 - pad, 0, CPU))
        expected = density(choose_blocks(*own, route[row : row + 1], alone, SCALE))
        torch.testing.assert_close(share[row : row + 1, 1], expected[:, 1])


@pytest.mark.parametrize("block", [4, 64, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (129, 129), (300, 300), (70, 333), (5, 1000)])
def test_density_counts_the_pairs_in_visited_blocks(block, queries, keys):
    sparse = sparse_of("FA-XA", block)
    q, k, _ = inputs(1, queries, keys)
    bits = select_oracle(
        q.transpose(1, 2), k.transpose(1, 2), torch.full((1, 2), 2), 4, 0.5, block, SCALE, Ranges()
    )  # fmt: skip
    share = BlockPairs.of(torch.tensor([queries]), torch.tensor([keys]), block, bits.shape[2]).visited_share(bits)
    visible = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None]
    expected = oracle_mask(q, k, sparse).sum((-1, -2)) / visible.sum()
    torch.testing.assert_close(share, expected.double())


def test_bits_are_counted():
    bits = torch.tensor([[0, -1], [1, 1 << 30], [-(1 << 31), 0x55555555]], dtype=torch.int64).to(torch.int32)
    assert count_bits(bits).tolist() == [32, 2, 17]


def test_single_queries_attend_in_full():
    for name, modes in (("FA-XA", [FULL, FULL]), ("XA-SSA", [FULL, STREAMING]), ("SSA-XA", [STREAMING, FULL])):
        plan = HeadPlan.build(torch.tensor([[0.0, 1.0]]), sparse_of(name), batch_layout(1, 1, 80, CPU))
        assert plan.mode_NK.tolist() == [modes]
        assert plan.flipped().mode_NK.tolist() == [modes[::-1]]
        assert not plan.chooses_blocks and density(plan) is None
    plan = HeadPlan.build(torch.tensor([[0.0, 1.0]]), sparse_of("XA-SSA"), batch_layout(1, 5, 80, CPU))
    assert plan.mode_NK.tolist() == [[BLOCK_SPARSE, STREAMING]] and plan.flipped().mode_NK.tolist() == [[1, 2]]


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
            assert routing(model).density.shape == (LAYERS, 2, KV_HEADS)
            torch.testing.assert_close(routing(model).density, torch.ones(LAYERS, 2, KV_HEADS, dtype=torch.float64))
        sparser = sparse_of("FA-XA", threshold=0.3)
        with override_routes(model, 1, sparser):
            assert not torch.allclose(model(ids).logits, dense, rtol=1e-3)
            state = routing(model)
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
    state, sparse = routing(model), model._elastic_handle.routing.config.sparse
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
    from elastic import backbones

    model, tokenizer = backbones.load_backbone("tiny")
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
            shares.append(routing(model).density)
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


def test_the_quality_script_writes_records_and_tables(tmp_path, capsys):
    from elastic import backbones
    from elastic.bench.methods import DENSITY
    from elastic.bench.records import load as load_records
    from elastic.bench.tables import markdown
    from tests.bench.methods import main

    model, _ = backbones.load_backbone("tiny")
    attach(model, ElasticConfig(small_config().router, sparse_of("FA-XA")))
    varied_routers(model)
    checkpoint = save_elastic(tmp_path / "ck", model, "tiny")
    names = ["elastic", "dense", "xattention:0.3", "streaming", "elastic:xa-ssa"]
    words = ["--checkpoint", str(checkpoint), "--data", str(build_data(tmp_path)), "--out", str(tmp_path)]
    words += ["--dtype", "float32", "--batch-rows", "1", "--batches", "6", "--name", "own"]
    assert main([*words, "--methods", *names]) == 0
    names = [name.replace("elastic", "own") for name in names]
    found = load_records(tmp_path / "methods.json")
    assert found[0]["command"].endswith(
        "--methods elastic dense xattention:0.3 streaming elastic:xa-ssa --name own --dtype float32"
    )
    ratio = {(r["who"], r["metric"]): r["esr_all"] for r in found if r["case"] != DENSITY}
    assert {who for who, _ in ratio} == set(names) and ratio["dense", "exact"] == 0.0
    assert 0 < ratio["own", "loss"] < ratio["xattention:0.3", "loss"] < 1
    layers = {r["who"]: r["by_layer"] for r in found if r["case"] == DENSITY}
    assert set(layers) == {"own", "xattention:0.3", "own:xa-ssa"}
    assert all(0 < share < 1 for share in layers["xattention:0.3"])
    printed, page = capsys.readouterr().out, markdown({"methods": found})
    for text in (printed, page):
        assert all(name in text for name in (*names, "pairs visited", *{r["case"] for r in found} - {DENSITY}))
    loss = next(r for r in found if (r["who"], r["metric"]) == ("dense", "loss"))
    assert loss["unit"] == "nats a token" and loss["n"] > 0 and loss["half"] >= 0


def test_the_quality_table_means_what_counts_in_a_source():
    from elastic.bench.methods import score_cells

    def record(case, who, metric, value, esr):
        return {"case": case, "who": who, "metric": metric, "value": value, "half": 0.1, "n": 5, "esr_all": esr}

    found = [
        record(case, who, metric, value * (2 if who == "streaming" else 1), 0.5 if who == "streaming" else 0.0)
        for who in ("dense", "streaming")
        for case, metric, value in (
            ("needle_single-4096", "exact", 0.3),
            ("needle_single-4096", "loss", 9.0),
            ("verbatim_copy", "accuracy", 0.1),
            ("continuation", "loss", 2.0),
        )
    ]
    header, rows = score_cells(found)
    assert header == ["source", "score", "n", "dense", "streaming"]
    assert rows == [
        ["mean of retrieval", "", "10", "0.200 (0.00)", "0.400 (0.50)"],
        ["mean of text", "", "5", "2.000 (0.00)", "4.000 (0.50)"],
        ["needle_single-4096", "exact", "5", "0.300 ± 0.100 (0.00)", "0.600 ± 0.100 (0.50)"],
        ["verbatim_copy", "accuracy", "5", "0.100 ± 0.100 (0.00)", "0.200 ± 0.100 (0.50)"],
        ["continuation", "loss", "5", "2.000 ± 0.100 (0.00)", "4.000 ± 0.100 (0.50)"],
    ]
