"""`elastic bench e2e` on a tiny shape without a GPU: routes, records, the table and its factors, what is refused."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from elastic import cli
from elastic.bench import e2e, e2e_runs, records, tables
from elastic.bench.e2e_floor import has_experts, step_bytes
from elastic.bench.e2e_models import SHAPES, random_model, route_at_random
from elastic.bench.e2e_runs import Sizes
from elastic.bench.e2e_tables import e2e_cells
from elastic.bench.stock_graph import give_room, in_place_step
from elastic.cache.elastic_cache import ElasticCache
from elastic.config import ElasticConfig, SparseConfig
from elastic.model.attach import detach, elastic_config, last_routes, route_of, routers, set_config
from tests.helpers.models import random_ids

SMALL = [
    *("--device", "cpu", "--dtype", "float32", "--shapes", "tiny", "--new-tokens", "3"),
    *("--sink", "8", "--window", "16", "--block", "8", "--commit", "abc"),
]
CONFIG = ElasticConfig(sparse=SparseConfig(sink=8, window=16, block=8), kv_cache="elastic")


def bench(tmp_path, *options):
    return cli.main(["bench", "e2e", *SMALL, "--out", str(tmp_path), *options])


@pytest.mark.parametrize("msr", [0.0, 0.5, 0.7, 1.0])
@torch.no_grad()
def test_routers_decide_the_given_share_on_any_input(msr):
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    ids = random_ids(2, 60)
    stock = model(ids).logits
    share = float(route_at_random(model, msr, CONFIG).mean())
    assert share == pytest.approx(round(msr * 6) / 6)
    decided = []
    for seed in range(3):
        model(random_ids(2, 60, seed=seed))
        decided.append(last_routes(model).route)
        assert decided[-1].mean() == pytest.approx(share)
    assert all(torch.equal(decided[0], other) for other in decided)
    assert torch.equal(model(ids).logits, stock) == (msr == 0.0)
    assert len(routers(detach_and_attach(model))) == 3


def detach_and_attach(model):
    detach(model)
    route_at_random(model, 0.5, CONFIG)
    return model


def test_records_table_and_picture(tmp_path, capsys):
    assert bench(tmp_path, "--lengths", "64", "256", "--msr", "0", "0.7") == 0
    found = records.load(tmp_path / "e2e.json")
    assert (tmp_path / "e2e.png").read_bytes().startswith(b"\x89PNG")
    mine = [r for r in found if r["case"] == "tiny-256-msr0.67"]
    value = {r["metric"]: r["value"] for r in mine}
    assert {"first token", "peak memory", "attention", "router", "rest", "KV cache", "MSR", "decode"} == set(value)
    assert value["MSR"] == pytest.approx(2 / 3, rel=1e-4)
    assert value["KV cache"] == (4 * 24 + 2 * 1024) * 2 * 16 * 4  # tokens of 4 streaming and 2 full heads, in steps
    assert all(v > 0 for m, v in value.items() if m != "peak memory")
    out = capsys.readouterr().out
    assert "tiny 256 elastic MSR 0.67" in out and "tiny 256 cudnn" in out
    assert {r["commit"] for r in found} == {"abc"} and all("--shapes tiny" in r["command"] for r in found)
    page = tables.markdown({"e2e": found})
    assert "| tiny 256 elastic MSR 0.67 |" in page and "- tiny-256" not in page


def test_prompts_in_pieces_beside_one_pass(tmp_path, capsys):
    options = ["--lengths", "64", "1200", "--msr", "0.7", "--contestants", "cudnn", "--prefill-chunk-size", "100"]
    assert bench(tmp_path, *options) == 0
    found = records.load(tmp_path / "e2e.json")
    value = {(r["length"], r["who"], r["metric"]): r["value"] for r in found}
    assert {who for length, who, _ in value if length == 64} == {"elastic", "cudnn"}
    in_pieces = {"elastic in 100s", "static in 100s", "cudnn in 100s"}
    assert {who for length, who, _ in value if length == 1200} == {"elastic", "cudnn", *in_pieces}
    for who in ("elastic in 100s", "static in 100s"):
        for metric in ("MSR", "KV cache"):
            assert value[1200, who, metric] == value[1200, "elastic", metric]
    assert all(value[1200, who, "first token"] > 0 for who in in_pieces)
    assert "tiny 1200 elastic in 100s MSR 0.67" in capsys.readouterr().out


def test_several_rows_compiled_and_unfused_contestants(tmp_path, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda call: compile_(call, backend="eager"))
    options = ["--lengths", "64", "--msr", "0.7", "--contestants", "cudnn", "--batch", "3", "--compiled", "--unfused"]
    assert bench(tmp_path, *options) == 0
    found = records.load(tmp_path / "e2e.json")
    assert not [r for r in found if r["metric"] == records.LEFT_OUT]
    value = {(r["who"], r["metric"]): r["value"] for r in found}
    assert {who for who, _ in value} == {"elastic", "elastic unfused", "cudnn", "cudnn compiled"}
    assert value["cudnn compiled", "first token"] > 0 and ("cudnn compiled", "rest") not in value


@torch.no_grad()
def test_bytes_of_a_step_are_weights_and_what_the_heads_see():
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    weights = sum(p.nbytes for p in model.model.layers.parameters()) + model.lm_head.weight.nbytes
    route_at_random(model, 0.5, CONFIG)
    cache = ElasticCache(3, elastic_config(model))
    model(random_ids(1, 60), past_key_values=cache, use_cache=True)
    model(random_ids(1, 1), past_key_values=cache, use_cache=True)
    keys = 3 * 61 + 3 * min(61, 8 + 16)
    seen = step_bytes(model, cache) - weights
    granules = 3 * 8 * 2 * 16 * 4  # a streaming head sees whole blocks of its window
    assert 0 <= keys * 2 * 16 * 4 - seen <= granules


def row(who, msr, value):
    shared = {"case": "c", "shape": "s", "length": 1024, "who": who, "msr": msr}
    return [
        {**shared, "metric": m, "value": v, "unit": "tokens/s" if "decode" in m else "ms"} for m, v in value.items()
    ]


def test_factors_are_over_the_best_stock_model():
    base = {"peak memory": 1e9, "attention": 1.0, "router": 0.0, "rest": 1.0}
    found = [
        *row("elastic", 0.5, {**base, "first token": 500.0, "decode": 30.0, "decode graph": 90.0, "KV cache": 3e9}),
        *row("cudnn", None, {**base, "first token": 1000.0, "decode": 40.0, "KV cache": 1e10}),
        *row("flash2", None, {**base, "first token": 2000.0, "decode": 60.0, "KV cache": 1e10}),
        {"case": "c", "shape": "s", "length": 1024, "who": "other", "msr": None, "metric": records.LEFT_OUT,
         "value": None, "unit": "", "why": "no time"},
    ]  # fmt: skip
    header, rows = e2e_cells(found)
    shown = [dict(zip(header, cells, strict=True)) for cells in rows]
    assert [cells["first token s"] for cells in shown] == ["0.500", "1.000", "2.000", "left out"]
    assert [rows[n][2] for n in range(3)] == ["2.00", "1.00", "0.50"]
    assert [rows[n][5] for n in range(3)] == ["1.50", "0.67", "1.00"]
    assert shown[0]["with graph"] == "90.0" and shown[0]["of dense"] == "0.300"
    graphed = [
        {**r, "metric": "decode graph", "value": 120.0} for r in found if r["metric"] == "decode" and r["msr"] is None
    ]
    failed = {**graphed[0], "value": None, "why": "cannot be captured", "metric": "decode graph flash2"}
    assert [cells[5] for cells in e2e_cells([*found, graphed[0], failed])[1][:3]] == ["0.75", "1.00", "0.50"]


def test_cases_after_the_time_limit_and_failures_are_records(tmp_path, capsys, monkeypatch):
    assert bench(tmp_path, "--lengths", "64", "--msr", "0.5", "--seconds", "-1") == 0
    assert {r["why"] for r in records.load(tmp_path / "e2e.json")} == {"not started within --seconds -1"}

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of\nmemory")

    monkeypatch.setattr(e2e, "stock_runs", fails)
    (tmp_path / "e2e.json").unlink()
    assert bench(tmp_path, "--lengths", "64", "--msr", "0.5", "--contestants", "cudnn") == 0
    left = [r for r in records.load(tmp_path / "e2e.json") if r["metric"] == records.LEFT_OUT]
    assert [(r["who"], r["why"]) for r in left] == [("cudnn", "out of memory: CUDA out of memory")]
    out = capsys.readouterr().out
    assert "left out: out of memory" in out and "tiny 64 cudnn             out of memory" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "no GPU is at hand"),
        (["--lengths", "1"], "--lengths 1 is below 2"),
        (["--new-tokens", "0"], "--new-tokens 0 is below 1"),
        (["--layers", "0"], "--layers 0 is below 1"),
        (["--prefill-chunk-size", "0"], "--prefill-chunk-size 0 is below 1"),
        (["--msr", "1.5"], "expected shares from 0 to 1"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU that is not there")
def test_refused(tmp_path, capsys, options, message):
    assert bench(tmp_path, *options) == 2
    assert message in capsys.readouterr().err


def test_long_prompts_without_decode_steps_and_fewer_layers(tmp_path, capsys):
    options = ["--lengths", "64", "128", "--msr", "0.5", "--decode-max-length", "64", "--layers", "2"]
    assert bench(tmp_path, *options, "--contestants", "cudnn") == 0
    found = records.load(tmp_path / "e2e.json")
    assert {r["length"] for r in found if r["metric"] == "decode"} == {64}
    assert {r["length"] for r in found if r["metric"] == "first token"} == {64, 128}
    assert {r["case"] for r in found if r["msr"] is None} == {"tiny-2layers-64", "tiny-2layers-128"}
    assert "tiny-2layers 128 elastic MSR 0.50" in capsys.readouterr().out


@torch.no_grad()
def test_steps_in_place_are_steps_of_the_stock_model():
    model, ids = random_model("tiny", torch.device("cpu"), torch.float32), random_ids(1, 40)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    for cache in caches:
        model(ids, past_key_values=cache, use_cache=True)
    give_room(caches[1])
    step = in_place_step(model, caches[1])
    step(ids[:, 7:8])  # another token in the same place
    wanted = model(ids[:, :1], past_key_values=caches[0], use_cache=True).logits
    torch.testing.assert_close(step(ids[:, :1]), wanted, rtol=0, atol=1e-6)
    assert model.config._attn_implementation == "sdpa" and caches[1].get_seq_length() == 40


def test_a_backend_that_cannot_decode_is_named(monkeypatch):
    def decode(metric, *_):
        if metric.endswith("flash2"):
            raise RuntimeError("no\nkernel")
        return e2e_runs._record(metric, 5.0, "tokens/s")

    monkeypatch.setattr(e2e_runs, "_decode", decode)
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    found = e2e_runs.stock_runs(model, "cudnn", Sizes(64, 2, 1))[-3:]
    assert [(r["metric"], r["value"]) for r in found] == [
        ("decode cudnn", 5.0),
        ("decode flash2", None),
        ("decode", 5.0),
    ]
    assert found[1]["why"] == "RuntimeError: no kernel"


@torch.no_grad()
def test_timing_hooks_leave_the_model_as_it_was():
    model = random_model("tiny", torch.device("cpu"), torch.float32)
    e2e_runs.stock_runs(model, "cudnn", Sizes(64, 2, 1))
    assert model.config._attn_implementation == "sdpa"
    route_at_random(model, 0.5, CONFIG)
    set_config(model, replace(elastic_config(model), chunk_tokens=16))
    e2e_runs.elastic_runs(model, Sizes(64, 2, 1))
    cache = ElasticCache(3, elastic_config(model))
    model(random_ids(1, 64), past_key_values=cache, use_cache=True)
    assert route_of(cache).route.float().mean() == 0.5


def test_a_mixture_of_experts_has_no_floor(tmp_path, monkeypatch):
    sizes = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "num_experts": 8}
    monkeypatch.setitem(SHAPES, "qwen3-30b-a3b", ("qwen3_moe", {**SHAPES["qwen3-30b-a3b"][1], **sizes}))
    model = random_model("qwen3-30b-a3b", torch.device("cpu"), torch.float32)
    assert has_experts(model) and not has_experts(random_model("tiny", torch.device("cpu"), torch.float32))
    assert bench(tmp_path, "--shapes", "qwen3-30b-a3b", "--lengths", "200", "--msr", "0.5") == 0
    found = records.load(tmp_path / "e2e.json")
    assert {r["value"] for r in found if r["metric"] == "MSR"} == {0.5}
    assert {"first token", "decode"} <= {r["metric"] for r in found if r["who"] == "cudnn"}
