"""The elastic cache on a GPU: the decode kernel against PyTorch, CUDA graphs, and no step that waits for the device."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache

from elastic.cache import decode_attention
from elastic.cache.elastic_cache import ElasticCache
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.inference.decode_graph import DecodeGraph, RowGraphs, graphed
from elastic.model.attach import attach, elastic_config, override_routes, route_of, set_config
from elastic.model.compiling import compile_layers
from elastic.model.fused_parts import always_fused
from tests.helpers.models import LAYERS, left_padded, random_ids, tiny_model, varied_routers
from tests.kernels.gpu import needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]
CONFIG = ElasticConfig(RouterConfig(pool_tokens=8), SparseConfig(sink=64, window=128, block=64))


def gpu_model(granule="token", kind="elastic"):
    model = tiny_model(hidden_size=512, head_dim=128, initializer_range=0.05).to(torch.bfloat16)
    attach(model, replace(CONFIG, kv_cache=kind, sparse=replace(CONFIG.sparse, granule=granule)))
    varied_routers(model)
    return model.to("cuda")


def new_cache(model, **options):
    return ElasticCache(LAYERS, elastic_config(model), **options)


@torch.no_grad()
def decode(model, cache, ids, mask, steps, forced=None):
    """Logits [steps, B, V] while feeding `forced` tokens, or the greedy ones; and the tokens fed."""
    logits, tokens = [], []
    token = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    for step in range(steps):
        token = token if forced is None else forced[step]
        tokens.append(token)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        position = (mask.sum(1) - 1)[:, None]
        out = model(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        logits.append(out.logits[:, -1].float())
        token = out.logits[:, -1:].argmax(-1)
    return torch.stack(logits), tokens


@pytest.mark.parametrize("granule", ["token", "block"])
@pytest.mark.parametrize("kind", ["elastic", "full", "dynamic"])
def test_decode_kernel_equals_pytorch(granule, kind, monkeypatch):
    model = gpu_model(granule, "full" if kind == "full" else "elastic")
    ids, mask = (x.cuda() for x in left_padded(random_ids(3, 600), [0, 100, 480]))

    def cache():
        return DynamicCache(config=model.config) if kind == "dynamic" else new_cache(model, step=16)

    used = cache()
    found, tokens = decode(model, used, ids, mask, 40)
    assert 0 < route_of(used).route.float().mean() < 1
    with monkeypatch.context() as patched:
        patched.setattr(decode_attention, "unsupported_reason", lambda *_: "the test asks for PyTorch")
        expected, _ = decode(model, cache(), ids, mask, 40, tokens)
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_graph_equals_its_steps_launched_one_by_one():
    """Those of the model alone are not fused, and so rounded otherwise."""
    model = gpu_model()
    ids, mask = (x.cuda() for x in left_padded(random_ids(2, 300), [0, 90]))
    alone, tokens = decode(model, new_cache(model, step=16), ids, mask, 40)

    def steps(name):
        cache = new_cache(model, step=16)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        take = getattr(DecodeGraph(model, cache), name)
        with torch.no_grad():
            found = torch.stack([take(token)[:, -1].float() for token in tokens])
        assert cache.seen == 340 and cache.counts == [340, 250] and cache.count_B.tolist() == [340, 250]
        return found

    found = steps("step")
    assert torch.equal(found, steps("run"))
    assert (found - alone).norm() < 0.02 * alone.norm()


@torch.no_grad()
def test_a_graph_follows_rows_that_join_and_leave():
    """Every token is forced, so that rounding cannot send two answers different ways."""
    model = gpu_model()
    prompts, fed = [random_ids(1, length, length).cuda() for length in (500, 90, 300)], random_ids(3, 60).cuda()

    def logits(steps, stepped):
        """[2 + 3 + 2 rows' steps, V]: two rows, then three, then two again, 15 steps each."""
        caches = [new_cache(model, step=8) for _ in prompts]
        for ids, one in zip(prompts, caches, strict=True):
            model(ids, past_key_values=one, use_cache=True)
        cache, found = caches[0], []
        take = getattr(steps(model, cache), stepped)
        for turn, rows in enumerate(([0, 1], [0, 1, 2], [0, 2])):
            if turn < 2:
                cache.join(caches[turn + 1])
            else:
                cache.batch_select_indices(torch.tensor([0, 2]))
            found += [take(fed[rows, at : at + 1])[:, -1].float().clone() for at in range(15 * turn, 15 * turn + 15)]
        return torch.cat(found)

    expected = logits(DecodeGraph, "run")
    assert expected.isfinite().all() and torch.equal(logits(DecodeGraph, "step"), expected)
    found = logits(RowGraphs, "step")  # three rows run as four, whose sums may be rounded otherwise
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_generate_over_a_graph_equals_generate_without():
    model = gpu_model()
    ids, mask = (x.cuda() for x in left_padded(random_ids(2, 300), [0, 90]))
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    cache = new_cache(model, reserve=40)
    with always_fused():  # as the graph's steps are: otherwise rounded, a random model's tokens soon differ
        plain = model.generate(ids, past_key_values=new_cache(model, reserve=40), **options)
        with graphed(model, cache):
            assert torch.equal(model.generate(ids, past_key_values=cache, **options), plain)
    assert "forward" not in vars(model) and cache.seen == 339


@pytest.mark.parametrize("kind", ["elastic", "full"])
def test_compiled_layers_change_no_more_than_rounding(kind):
    """`compile_layers` with its own compiler: the prompt, decode steps, and those steps as a CUDA graph."""
    model = gpu_model(kind=kind)
    ids, mask = (x.cuda() for x in left_padded(random_ids(2, 300), [0, 90]))
    with override_routes(model, torch.tensor([[0, 1], [1, 0], [1, 1]], device="cuda")):
        expected, tokens = decode(model, new_cache(model, step=16), ids, mask, 20)
        torch.compiler.reset()
        compile_layers(model)
        found, _ = decode(model, new_cache(model, step=16), ids, mask, 20, tokens)
        cache = new_cache(model, step=16)
        with torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        graph = DecodeGraph(model, cache)
        replayed = torch.stack([graph.step(token)[:, -1].float() for token in tokens])
    assert 0 < (found - expected).norm() < 0.02 * expected.norm()
    assert (replayed - found).norm() < 1e-3 * found.norm()


def test_neither_prefill_nor_decode_waits_for_the_gpu():
    model, ids = gpu_model(), random_ids(1, 700).cuda()
    decode(model, new_cache(model), ids, torch.ones_like(ids), 2)  # kernels compiled
    cache, token = new_cache(model), ids[:, :1].clone()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True)
            for _ in range(3):
                model(token, past_key_values=cache, use_cache=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert cache.seen == 703


def test_all_heads_full_give_the_stock_models_tokens():
    """fp16 has the mantissa to tell the best token from the next where sums are ordered differently. A row may part
    from the stock model only where that model's two best tokens are as good as equal.
    """
    settings = {"hidden_size": 512, "head_dim": 128, "initializer_range": 0.05, "eos_token_id": None}
    model = tiny_model(**settings).to("cuda", torch.float16)
    ids, mask = (x.cuda() for x in left_padded(random_ids(8, 300), [0, 90, 10, 200, 5, 250, 0, 1]))
    options = {"attention_mask": mask, "max_new_tokens": 32, "do_sample": False}
    stock = model.generate(ids, **options, return_dict_in_generate=True, output_logits=True)
    attach(model, replace(CONFIG, kv_cache="elastic"))
    with override_routes(model, 0):
        found = model.generate(ids, past_key_values=new_cache(model), **options)
    best = torch.stack(stock.logits, 1).float().topk(2).values
    differ = found[:, 300:] != stock.sequences[:, 300:]
    rows = differ.any(1)
    first = differ.int().argmax(1)[rows]
    margin = (best[..., 0] - best[..., 1])[rows, first]
    assert rows.sum() <= 4 and (margin < 0.01).all(), margin


def test_memory_falls_with_the_routes():
    model, ids = gpu_model(), random_ids(1, 20_000).cuda()
    set_config(model, replace(elastic_config(model), sparsity_bias=1e6))
    with torch.no_grad():
        model(ids, past_key_values=new_cache(model), use_cache=True, logits_to_keep=1)  # workspaces allocated
    held = {}
    for kind in ("full", "elastic"):
        set_config(model, replace(elastic_config(model), kv_cache=kind))
        cache = new_cache(model)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        nbytes = cache.nbytes
        held[kind] = torch.cuda.memory_allocated() - before
        assert nbytes <= held[kind] <= nbytes + 2**20
        del cache
    assert held["elastic"] < 0.05 * held["full"]
