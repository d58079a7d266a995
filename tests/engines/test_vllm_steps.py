"""A step of the vLLM plugin without vLLM: spans and modes, attention by either path, decisions, what a graph keeps."""

import contextlib
import dataclasses
import itertools
import random

import pytest
import torch

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.engines.vllm import paged
from elastic.engines.vllm import step as steps
from elastic.engines.vllm.decide import LayerRouter, Rotation
from elastic.engines.vllm.modes import ModeTable
from elastic.engines.vllm.paged import PagedStep, Pages, attend_launches, attend_spans, attend_step
from elastic.engines.vllm.shards import Shard
from elastic.engines.vllm.step import MOST_SPANS, Batch, Step, run_layer
from elastic.engines.vllm.table import RouteTable
from elastic.kernels import Pattern, paged_forward
from elastic.routing.kinds import build_router
from elastic.visibility import visible
from tests.helpers.models import small_config

HEADS, KV, DIM, PAGE = 4, 2, 16, 16


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def paged_step(table, lengths, news, kv_heads=KV):
    bounds = [0, *itertools.accumulate(news)]
    return PagedStep.of(table, int32(*bounds), lengths, bounds, lengths.tolist(), kv_heads)


@pytest.mark.parametrize("most", [(4096, 512), (2, 1)])
@pytest.mark.parametrize("singles", [0, 2, 4])
def test_a_step_is_its_spans_one_by_one_and_what_the_kernels_compute(monkeypatch, singles, most):
    """Both paths of a batch with different routes, against the operators' twin; also cut into the smallest launches."""
    monkeypatch.setattr(paged, "MAX_HEADS", most[0])
    monkeypatch.setattr(paged, "MAX_SAMPLES", most[1])
    sparse, modes = SparseConfig(sink=4, window=8, block=4), torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]]).int()
    cache, table = torch.randn(11, 2, 16, 16), torch.tensor([[7, 2, 5], [1, 8, 0], [4, 3, 6], [9, 10, 0]]).int()
    news, lengths = [1] * singles + [45, 0, 13, 20][singles:], int32(45, 20, 31, 25)
    q, pools = torch.randn(sum(news) + 3, 4, 8), cache.transpose(1, 2).chunk(2, dim=-1)
    starts = int32(0, *itertools.accumulate(news))
    want = paged_forward(q[:-3], *pools, table, starts, lengths, modes, Pattern(4, 8, sparse.granule, 4, 0.3))[0]
    step = paged_step(table, lengths, news)
    assert len(step.launches) == (bool(singles) + (singles < 4) if most[0] > 2 else 4)
    for attend in (attend_step, attend_spans, attend_launches):
        found = torch.full_like(q, 7.0)
        attend(q, cache, step, modes, sparse, 0.3, found)
        torch.testing.assert_close(found[:-3], want, atol=1e-5, rtol=1e-5)
        assert (found[-3:] == 7).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("singles", [0, 1, 2])
def test_a_step_on_a_gpu_equals_that_on_the_cpu(singles):
    sparse, modes = SparseConfig(sink=64, window=64, block=64), torch.tensor([[1, 0], [0, 1]]).int()
    cache, table = torch.randn(20, 2, 16, 128), torch.randperm(20).view(2, 10).int()
    news, lengths = [1] * singles + [150, 13][singles:], int32(150, 97)
    q = torch.randn(sum(news), 4, 64)
    want, found = torch.empty_like(q), torch.empty_like(q).half().cuda()
    step = paged_step(table, lengths, news)
    attend_step(q, cache, step, modes, sparse, 0.125, want)
    bounds = [0, *itertools.accumulate(news)]
    there = PagedStep.of(table.cuda(), int32(*bounds).cuda(), lengths.cuda(), bounds, lengths.tolist(), KV)
    attend_step(q.half().cuda(), cache.half().cuda(), there, modes.cuda(), sparse, 0.125, found)
    torch.testing.assert_close(found.float().cpu(), want, atol=5e-3, rtol=5e-3)


def table_of(config, fixed=False):
    return RouteTable(lambda ids: (0, len(ids)), config, fixed)


def modes_of(config, layers=2, most=8, device="cpu"):
    return ModeTable(layers, MOST_SPANS * most, KV, config, torch.device(device))


def stepped(table, rows, modes=None, batch=None):
    """The step of rows (name, prompt tokens, first token, end)."""
    modes = modes or modes_of(table.config)
    table.begin_step((name, [1] * prompt) for name, prompt, _, _ in rows)
    bounds, lengths = [0, *itertools.accumulate(end - first for _, _, first, end in rows)], [end for *_, end in rows]
    pages = torch.arange(4 * len(rows)).view(len(rows), 4).int()
    return Step.of(table, modes, bounds, lengths, batch or Batch(pages, int32(*bounds), int32(*lengths)))


def test_tokens_of_chunks_before_the_prompts_end_are_dense_for_good():
    table = table_of(small_config())
    stepped(table, [("a", 50, 0, 20)])
    request = table.requests["a"]
    assert (request.dense_until, request.dense_tokens) == (20, 20)
    stepped(table, [("a", 50, 20, 45)])
    assert request.dense_until == 45
    stepped(table, [("a", 50, 16, 30)])  # preempted; a page came from the prefix cache
    assert (request.dense_until, request.cached) == (30, 16)
    ((_, span),) = stepped(table, [("a", 50, 30, 50)]).reading
    assert (request.dense_until, span.first, span.stop, span.end, span.routed) == (30, 0, 20, 50, True)
    request.layers += [torch.tensor([1.0, 0.0])] * 2
    step = stepped(table, [("a", 50, 0, 52)])  # preempted while decoding
    assert request.dense_until == 30 and not step.reading
    assert (step.paged.bounds, step.paged.ends, step.paged.lengths.tolist()) == ([0, 30, 52], [30, 52], [30, 52])
    assert step.mode_LBK.tolist() == [[[0, 0], [1, 0]]] * 2 and step.paged.table.tolist() == [[0, 1, 2, 3]] * 2


def test_a_prompt_after_cached_pages_is_whole_and_static_routes_know_no_chunks():
    table = table_of(small_config())
    stepped(table, [("a", 50, 16, 50)])
    assert table.requests["a"].dense_tokens == 0
    table = table_of(small_config(), fixed=True)
    stepped(table, [("a", 50, 0, 20)])
    assert table.requests["a"].dense_until == 0


@pytest.mark.parametrize("dense_decode", [False, True])
def test_modes_change_with_the_batch_alone(dense_decode):
    table = table_of(dataclasses.replace(small_config(), dense_decode=dense_decode))
    modes = modes_of(table.config)
    assert [n for n, _ in stepped(table, [("a", 5, 0, 5), ("b", 3, 0, 3)], modes).reading] == [0, 1]
    for name, route in (("a", [1.0, 0.0]), ("b", [0.0, 0.0])):
        table.requests[name].layers += [torch.tensor(route), torch.tensor([0.0, 1.0])]
    first = stepped(table, [("a", 5, 5, 6), ("b", 3, 3, 4)], modes)
    sparse = [[[1, 0], [0, 0]], [[0, 1], [0, 1]]]
    expected = [[[0] * 2] * 2] * 2 if dense_decode else sparse
    assert not first.reading and first.mode_LBK.tolist() == expected and first.paged.launches[0].starts is None
    first.mode_LBK[:] = 9  # what is not written again stays
    assert stepped(table, [("a", 5, 6, 7), ("b", 3, 4, 5)], modes).mode_LBK.unique().tolist() == [9]
    mixed = stepped(table, [("a", 5, 7, 8), ("b", 3, 5, 6), ("c", 9, 0, 9)], modes)
    assert [span.request.name for _, span in mixed.reading] == ["c"]
    assert mixed.mode_LBK[:, :2].tolist() == expected and not mixed.mode_LBK[:, 2].any()
    assert [launch.starts is None for launch in mixed.paged.launches] == [True, False]
    left = stepped(table, [("b", 3, 6, 7)], modes)
    assert left.mode_LBK.tolist() == [of[1:] for of in expected]


def test_what_a_captured_graph_reads_stays_where_it_is():
    """Capture with no requests, then steps of other requests: the same addresses, other modes."""
    table = table_of(small_config())
    modes, batch = modes_of(table.config), Batch(torch.zeros(4, 4).int(), torch.arange(5).int(), torch.ones(4).int())

    def addresses(step):
        (launch,) = step.paged.launches
        tensors = step.paged.table, step.paged.lengths, *step.mode_LBK
        return [x[launch.spans].data_ptr() for x in tensors], launch.starts

    captured = Step.of(table, modes, list(range(5)), [1] * 4, batch)
    assert not captured.reading and not captured.mode_LBK.any()
    for names in ("abcd", "efgh"):
        stepped(table, [(name, 2, 0, 2) for name in names])
        assert not table.undecided()
        for name in names:
            table.requests[name].layers += [torch.tensor([1.0, float(name < "e")])] * 2
        step = stepped(table, [(name, 2, 2, 3) for name in names], modes, batch)
        assert addresses(step) == addresses(captured)
        assert captured.mode_LBK.tolist() == [[[1, int(names < "e")]] * 4] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_graph_of_a_step_follows_its_requests():
    """Captured without requests, replayed with two whose routes differ."""
    config = small_config(sink=16, window=16, block=16)
    table, modes, layer = table_of(config), modes_of(config, layers=1, device="cuda"), layer_router(config, "paper")
    cache, q = torch.randn(8, KV, PAGE, 128).half().cuda(), torch.randn(2, HEADS, 64).half().cuda()
    batch = Batch(torch.randperm(8).view(2, 4).int().cuda(), int32(0, 1, 2).cuda(), int32(1, 1).cuda())
    captured, output, graph = (
        Step.of(table, modes, [0, 1, 2], [1, 1], batch),
        torch.empty_like(q),
        torch.cuda.CUDAGraph(),
    )
    run_layer(layer, captured, q, cache, output)
    with torch.cuda.graph(graph):
        run_layer(layer, captured, q, cache, output)
    stepped(table, [("a", 55, 0, 55), ("b", 60, 0, 60)])
    for name, route in (("a", [1.0, 0.0]), ("b", [0.0, 1.0])):
        table.requests[name].layers.append(torch.tensor(route).cuda())
    batch.length_R.copy_(int32(56, 61))
    step = stepped(table, [("a", 55, 55, 56), ("b", 60, 60, 61)], modes, batch)
    graph.replay()
    want, here = torch.empty(q.shape), dataclasses.replace(step.paged, table=step.paged.table.cpu())
    attend_spans(q.cpu().float(), cache.cpu().float(), here, step.mode_LBK[0].cpu(), config.sparse, layer.scale, want)
    torch.testing.assert_close(output.cpu().float(), want, atol=5e-3, rtol=5e-3)


def test_a_step_that_must_decide_is_known_before_it_begins():
    """A prompt of one token, and the last token of a prompt in chunks, look like decoding to the engine."""
    table = table_of(small_config())
    table.begin_step([("a", [1])])
    assert table.undecided()
    table.take_step()
    assert not table.undecided()
    table.requests["a"].layers.append(torch.zeros(2))
    table.begin_step([("a", [1])])
    assert not table.undecided()


def layer_router(config, kind, layer=0):
    torch.manual_seed(layer)
    router = build_router(KV, DIM, dataclasses.replace(config.router, kind=kind), layer).eval()
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    angle = torch.arange(256)[:, None] * torch.logspace(0, -3, DIM // 2)
    rotation = Rotation(torch.cat([angle.cos(), angle.sin()], 1))
    return LayerRouter(layer, router, rotation, config, KV, 0.25, Shard())


def attend_by_token(request, config, layer, q_QHD, k_SKD, v_SKD, past):
    """The definition: every token under the mode that its place gives it."""
    token, sparse = torch.arange(len(k_SKD)), config.sparse
    sizes = {"sink": sparse.sink, "window": sparse.window, "granule": sparse.granule, "block": sparse.block}
    outputs = []
    for n, q_HD in enumerate(q_QHD):
        place = past + n
        known = len(request.layers) > layer and place >= request.dense_until
        plain = config.dense_decode and place >= request.prompt_tokens
        for head in range(HEADS):
            route = int(request.layers[layer][head // 2]) if known and not plain else 0
            mode = (sparse.route0, sparse.route1)[route] if known else "full"
            seen = visible(torch.tensor([[place]]), token, **sizes)[0] if mode == "streaming" else token <= place
            weight = (0.25 * k_SKD[:, head // 2] @ q_HD[head]).masked_fill(~seen, -torch.inf).softmax(0)
            outputs.append(weight @ v_SKD[:, head // 2])
    return torch.stack(outputs).view(len(q_QHD), HEADS, DIM)


@pytest.mark.parametrize("attend", [attend_spans, attend_launches])
@pytest.mark.parametrize("kind", ["paper", "reach", "static"])
@pytest.mark.parametrize("dense_decode", [False, True])
def test_random_steps_are_what_each_token_sees(monkeypatch, attend, kind, dense_decode):
    """Requests that join, come in chunks, are preempted and decode, over two layers, token by token."""
    monkeypatch.setattr(steps, "attend_step", attend)
    sparse = SparseConfig(sink=4, window=12, block=4)
    config = ElasticConfig(RouterConfig(pool_tokens=4, kind=kind), sparse, dense_decode=dense_decode)
    table, rng = table_of(config, kind == "static"), random.Random(5)
    modes, layers = modes_of(config), [layer_router(config, kind, n) for n in range(2)]
    prompts = {name: rng.randrange(1, 50) for name in "abcdef"}
    keys = {name: torch.randn(2, 2, 64, KV, DIM) for name in prompts}  # layer, key or value, token
    pages, done = torch.randperm(24).view(6, 4).int(), dict.fromkeys(prompts, 0)
    caches, checked = torch.full((2, 24, KV, PAGE, 2 * DIM), torch.nan), 0
    while any(done[name] < prompts[name] + 3 for name in prompts):
        asked = rng.sample(sorted(name for name in prompts if done[name] < prompts[name] + 3), 1)
        asked += [
            name for name in prompts if rng.random() < 0.6 and name not in asked and done[name] < prompts[name] + 3
        ]
        ends = {name: done[name] + 1 if done[name] >= prompts[name] else rng.randrange(done[name], prompts[name]) + 1
                for name in asked}  # fmt: skip
        asked.sort(key=lambda name: ends[name] - done[name])
        rows = [(name, prompts[name], done[name], ends[name]) for name in asked]
        table_pages = pages[["abcdef".index(name) for name in asked]]
        bounds = [0, *itertools.accumulate(ends[name] - done[name] for name in asked)]
        batch = Batch(table_pages, int32(*bounds), int32(*(ends[name] for name in asked)))
        step = stepped(table, rows, modes, batch)
        for number, layer in enumerate(layers):
            for name, row in zip(asked, table_pages, strict=True):
                at = torch.arange(done[name], ends[name])
                both = torch.cat([x[at] for x in keys[name][number]], dim=-1)
                caches[number][row[at // PAGE].long(), :, at % PAGE] = both
            q, output = torch.randn(bounds[-1], HEADS, DIM), torch.full((bounds[-1], HEADS, DIM), torch.nan)
            run_layer(layer, step, q, caches[number], output)
            for name, begin, end in zip(asked, bounds, bounds[1:], strict=False):
                k, v = keys[name][number][:, : ends[name]]
                request = table.requests[name]
                want = attend_by_token(request, config, number, q[begin:end], k, v, done[name])
                torch.testing.assert_close(output[begin:end], want, atol=1e-4, rtol=1e-4)
                checked += end - begin
        done |= ends
        if rng.random() < 0.1:
            done[rng.choice(asked)] = 0  # preempted
    assert checked > 200 and all(len(request.layers) == 2 for request in table.requests.values())


@pytest.mark.parametrize("kind", ["paper", "level", "reach", "static"])
def test_a_device_decides_and_attends_without_the_host(monkeypatch, kind):
    """On tensors that have a device and no values: an operand elsewhere, or a value that the host asks for, fails."""
    monkeypatch.setattr(steps, "attend_step", attend_launches)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # knows no such device
    config = ElasticConfig(RouterConfig(pool_tokens=4, kind=kind), SparseConfig(sink=4, window=12, block=4))
    with torch.device("meta"):
        layer, cache = layer_router(config, kind), torch.empty(24, KV, PAGE, 2 * DIM, dtype=torch.bfloat16)
        q = torch.empty(64, HEADS, DIM, dtype=torch.bfloat16)
    table, modes = table_of(config, kind == "static"), modes_of(config, layers=1, device="meta")
    for rows in ([("a", 60, 0, 40)], [("a", 60, 40, 60), ("b", 9, 0, 9)], [("a", 60, 60, 61), ("b", 9, 9, 10)]):
        batch = Batch(*(torch.zeros(size, dtype=torch.int32, device="meta") for size in ((len(rows), 4), 3, len(rows))))
        step = stepped(table, rows, modes, batch)
        decided = run_layer(layer, step, q, cache, torch.empty_like(q))
        assert all(route.is_meta for request in decided for route in request.layers)
    assert not step.reading and step.mode_LBK.is_meta
    with pytest.raises(NotImplementedError, match="meta"):
        attend_spans(q, cache, step.paged, step.mode_LBK[0], config.sparse, 0.25, torch.empty_like(q))


def test_pages_read_all_heads_or_some():
    cache, page = torch.randn(9, 3, PAGE, 2 * DIM), int32(7, 2, 5)
    pages, heads, at = Pages(cache, page, 40), torch.tensor([2, 0]), torch.tensor([0, 39, 16])
    for whole, some in ((pages.read(), pages.read(heads)), (pages.read_at(at), pages.read_at(at, heads))):
        for x, y in zip(whole, some, strict=True):
            assert torch.equal(x[heads], y)
    k, v = pages.read(length=20)
    assert torch.equal(torch.cat([k, v], -1)[:, 17], cache[2, :, 1]) and k.shape == (3, 20, DIM)
