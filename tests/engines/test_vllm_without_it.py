"""What the vLLM plugin decides without vLLM: options, versions, routers, and which tokens the user wrote."""

import sys

import pytest
import torch
from transformers import DynamicCache

from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.data.prompts import encode
from elastic.engines.vllm import plugin
from elastic.engines.vllm.decide import Rotation
from elastic.engines.vllm.options import Options
from elastic.engines.vllm.paged import Pages, attend_pages, write_pages
from elastic.engines.vllm.routers import load_routing
from elastic.engines.vllm.shards import Shard, check_heads
from elastic.engines.vllm.spans import ChatMarks, user_span
from elastic.engines.vllm.table import RoutedRequest, RouteTable
from elastic.engines.vllm.versions import check_version, untested_on_gpu
from elastic.kernels import Pattern
from elastic.kernels.reach_oracle import hidden_mass
from elastic.model.attach import attach, override_routes, routers
from elastic.model.checkpoint import save_elastic
from elastic.model.loading import load_tokenizer
from elastic.routing.kinds import build_router
from elastic.routing.sparsity import causal_pairs, esr, visited_pairs
from elastic.visibility import visible
from tests.helpers.models import KV_HEADS, LAYERS, random_ids, small_bpe, small_config, tiny_model, varied_routers

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_without_vllm_the_plugin_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"runs inside vLLM.*pip install 'elastic-attention\[vllm\]'"):
        plugin.register()


@pytest.mark.parametrize("version", ["0.23.1", "0.25.0", "0.31.9", "0.33.0", "1.0.0", "0.320.0", "0.2", "dev"])
def test_other_versions_are_refused_by_name(version):
    with pytest.raises(RuntimeError, match=f"vLLM {version} is installed.*tested with vLLM 0.24 and 0.32 only"):
        check_version(version)


@pytest.mark.parametrize("version", ["0.24.0", "0.24.1+cpu", "0.32.0", "0.32.4+cpu"])
def test_the_tested_versions_are_not(version):
    check_version(version)


@pytest.mark.parametrize(
    ("version", "gpus", "found"),
    [
        ("0.24.0", 1, None),
        ("0.32.0", 1, "vLLM 0.32.0"),
        ("0.24.0", 2, "several processes"),
        ("0.240.0", 2, "vLLM 0.240.0, several processes"),
    ],
)
def test_what_no_gpu_has_run_is_named(version, gpus, found):
    said = untested_on_gpu(version, gpus)
    assert said == found or said.startswith(f"tested on the CPU only: {found}; on a GPU it was vLLM 0.24 in one")


def test_no_option_means_no_routing():
    assert Options.of({}) is None and Options.of(None) is None and Options.of({"other": 1}) is None
    assert Options.of({"elastic": {"checkpoint": "x", "sparsity_bias": 1}}) == Options("x", 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("folder", "not a mapping"),
        (
            {"checkpoint": "x", "bias": 1},
            r"unknown key elastic\.bias; known keys are checkpoint, sparsity_bias, budget",
        ),
        ({}, r"elastic\.checkpoint=None"),
        ({"checkpoint": "x", "sparsity_bias": "1"}, r"elastic\.sparsity_bias='1' is not a finite number"),
        ({"checkpoint": "x", "budget": float("nan")}, r"elastic\.budget=nan is not a finite number"),
        ({"checkpoint": "x", "budget": 0.1, "sparsity_bias": 0.0}, "give one of them"),
    ],
)
def test_wrong_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Options.of({"elastic": given})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with routers, and their checkpoint."""
    model = attach(tiny_model(), small_config())
    varied_routers(model)
    return model, save_elastic(tmp_path_factory.mktemp("saved") / "routers", model, "tiny")


def test_routers_load_without_a_model(saved):
    model, path = saved
    found = load_routing(Options(str(path), sparsity_bias=0.25), model.config)
    assert found.config.sparsity_bias == 0.25 and found.config.router == small_config().router
    pooled = torch.randn(4, KV_HEADS, 16)
    for own, other in zip(routers(model), found.routers, strict=True):
        assert torch.equal(own(pooled), other(pooled)) and not other.training
    assert not found.fixed and found.shared_prefix == 20


def test_what_does_not_fit_is_refused(saved, tmp_path):
    model, path = saved
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_routing(Options(str(tmp_path / "none")), model.config)
    with pytest.raises(ValueError, match="num_layers=3, but this backbone has num_layers=2"):
        load_routing(Options(str(path)), tiny_model(num_hidden_layers=2).config)
    with pytest.raises(ValueError, match="model family 'olmo2' is not supported"):
        load_routing(Options(str(path)), tiny_model("olmo2").config)
    with pytest.raises(ValueError, match="runs FA-XA, but the plugin serves heads that are full or streaming"):
        load_routing(Options("xattention"), model.config)
    with pytest.raises(ValueError, match="names no checkpoint"):
        load_routing(Options("elastic@1"), model.config)
    with pytest.raises(ValueError, match="routers of kind paper, which know nothing of divergences"):
        load_routing(Options(str(path), budget=0.1), model.config)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in path.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        load_routing(Options(str(damaged)), model.config)


def test_methods_are_static_routers(saved, tmp_path):
    model, _ = saved
    pattern = tmp_path / "heads.tsv"
    pattern.write_text("0.1 0.9\n0.2 0.8\n0.3 0.7\n")
    expected = {"dense": 0, "streaming": LAYERS * KV_HEADS, f"static:{pattern}@0.5": 3, "random:0.5:1": 3}
    for name, sparse in expected.items():
        found = load_routing(Options(name), model.config)
        logits = torch.stack([router(torch.zeros(1, KV_HEADS, 16))[0] for router in found.routers])
        assert int((logits[..., 1] > logits[..., 0]).sum()) == sparse
        assert found.fixed and found.shared_prefix is None


def chatml():
    tokenizer = small_bpe()
    tokenizer.chat_template = CHATML
    return tokenizer


CHATS = [
    [("user", "Where is the red house?")],
    [("system", "Be brief."), ("user", "Why? "), ("assistant", "Because."), ("user", "user\nIs that all <|im_end|>?")],
    [("user", "one\n\n"), ("assistant", "<|im_start|>"), ("user", "two"), ("assistant", "ok"), ("user", " three")],
]


@pytest.mark.parametrize("chat", CHATS)
def test_users_words_are_found_in_token_ids(chat):
    tokenizer = chatml()
    prompt = encode([{"role": role, "content": text} for role, text in chat], tokenizer, chat_template=True)
    assert user_span(prompt.ids, tokenizer, ChatMarks.of(tokenizer)) == prompt.user != (0, len(prompt))


def test_a_chat_that_does_not_wait_for_an_answer():
    tokenizer = chatml()
    text = "<|im_start|>user\nred house<|im_end|>\n<|im_start|>tool\nopen<|im_end|>\n"
    begin, end = user_span(tokenizer(text)["input_ids"], tokenizer, ChatMarks.of(tokenizer))
    assert tokenizer.decode(tokenizer(text)["input_ids"][begin:end]).strip() == "red house"


def test_users_words_in_the_tiny_template():
    tokenizer = load_tokenizer("tiny")
    for turns in (1, 2):
        chat = [{"role": role, "content": "on the box"} for role in ("user", "assistant") * turns][:-1]
        prompt = encode(chat, tokenizer, chat_template=True)
        assert user_span(prompt.ids, tokenizer, ChatMarks.of(tokenizer)) == prompt.user != (0, len(prompt))


def test_raw_completions_are_all_the_users():
    tokenizer = chatml()
    ids = tokenizer("Once upon a time")["input_ids"]
    assert user_span(ids, tokenizer, ChatMarks.of(tokenizer)) == (0, len(ids))
    assert user_span(ids, tokenizer, None) == (0, len(ids))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # no marks
    assert ChatMarks.of(tokenizer) is None


def test_tokens_that_do_not_read_back_are_all_the_users():
    tokenizer = chatml()
    marks = ChatMarks.of(tokenizer)
    ids = [tokenizer.convert_tokens_to_ids(letter) for letter in "<|im_start|>user"]  # letter by letter
    ids += tokenizer("\nred<|im_end|>\n")["input_ids"]
    with pytest.warns(UserWarning, match="does not read a prompt's text as the tokens"):
        assert user_span(ids, tokenizer, marks) == (0, len(ids))


@pytest.mark.parametrize("halves", [True, False])
def test_rotation_is_undone(halves):
    """Against the definition, pair by pair, with a scaled rotation of the first 8 of 12 dimensions."""
    key, position, scale = torch.randn(5, 2, 12), torch.tensor([0, 3, 1, 7, 7]), 1.3
    angle = torch.arange(8)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
    turned = key.clone()
    for pair in range(4):
        one, two = (pair, pair + 4) if halves else (2 * pair, 2 * pair + 1)
        cos, sin = (scale * f(angle[position, pair])[:, None] for f in (torch.cos, torch.sin))
        turned[..., one] = key[..., one] * cos - key[..., two] * sin
        turned[..., two] = key[..., two] * cos + key[..., one] * sin
    table = scale * torch.cat([angle.cos(), angle.sin()], dim=1)
    torch.testing.assert_close(Rotation(table, halves).undo(turned, position), key, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 7, 45])
@pytest.mark.parametrize("granule", ["token", "block"])
def test_attention_over_pages_is_masked_attention(queries, granule):
    sparse = SparseConfig(sink=4, window=8, block=4, granule=granule)
    length, size, dim = 45, 16, 8
    k, v = torch.randn(2, length, 2, dim)
    cache, pages = torch.full((9, 2, size, 2 * dim), float("nan")), torch.tensor([7, 2, 5, 0])
    position = torch.arange(length)
    slot = pages[position // size] * size + position % size
    write_pages(cache, torch.cat([k, k[:1]]), torch.cat([v, v[:1]]), torch.cat([slot, torch.tensor([-1])]))
    q = torch.randn(queries, 4, dim)
    found = attend_pages(q, Pages(cache, pages, length), [True, False], sparse, 0.3)
    at = torch.arange(length - queries, length)[:, None]
    for head in range(4):
        mask = position <= at
        if head < 2:
            mask = visible(at, position, sink=4, window=8, granule=granule, block=4)
        weight = (0.3 * q[:, head] @ k[:, head // 2].T).masked_fill(~mask, float("-inf")).softmax(-1)
        torch.testing.assert_close(found[:, head], weight @ v[:, head // 2], atol=1e-5, rtol=1e-5)


def test_the_table_lives_as_long_as_its_requests():
    table = RouteTable(lambda ids: (0, len(ids)), small_config())
    table.begin_step([("a", [1, 2]), ("b", [3])])
    first = table.take_step()
    assert [request.name for request in first] == ["a", "b"] and not table.take_step()
    first[0].layers += [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])]
    table.forget(["b", "never seen"])
    table.begin_step([("a", [1, 2])])
    assert table.take_step()[0] is first[0] and set(table.requests) == {"a"}
    table.forget(["a"])  # aborted, and its name used again
    table.begin_step([("a", [9, 9, 9])])
    assert table.take_step()[0].prompt_tokens == 3


def test_esr_counts_dense_chunks_as_computed():
    sparse, route = small_config().sparse, torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    request = RoutedRequest("a", 60, (0, 60))
    whole = request.esr(sparse, route)
    torch.testing.assert_close(whole, float(esr(route[:, None], torch.tensor([60]), sparse)[1]))
    request.begin_chunk(0, 40)
    request.begin_chunk(40, 60)
    skipped = [causal_pairs(end) - visited_pairs(end, "streaming", sparse) for end in (40, 60)]
    share = 0.75 * (skipped[1] - skipped[0]) / causal_pairs(60)  # three of four heads
    assert 0 < request.esr(sparse, route) < whole
    assert request.esr(sparse, route) == pytest.approx(share)


@pytest.mark.parametrize("kind", ["paper", "static", "reach"])
def test_a_slice_of_a_router_decides_as_the_whole_one(kind):
    config = RouterConfig(pool_tokens=8, kind=kind, head_offset=kind == "paper")
    whole = build_router(4, 16, config, 0)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
        features = torch.rand(3, 4) if kind == "reach" else torch.randn(3, 4, 16)
        if kind == "paper":
            whole.update_statistics(torch.randn(12, 4, 16))
        halves = [Shard(rank, 2).router(whole)(part) for rank, part in enumerate(features.chunk(2, dim=1))]
        torch.testing.assert_close(torch.cat(halves, dim=1), whole(features))
    assert whole.kv_heads == 4 and Shard(1, 2).router(whole).kv_heads == 2


def test_processes_that_do_not_divide_the_heads_are_refused():
    check_heads(6, 3)
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4 does not divide the model's 6 KV heads.*1, 2, 3, 6"):
        check_heads(6, 4)


@pytest.mark.parametrize("granule", ["token", "block"])
@torch.no_grad()
def test_keys_up_to_sink_and_window_are_the_same_under_all_routes(granule):
    """Why requests may share so long a prefix (`Routing.shared_prefix`) and no longer a one: after it, keys and values
    of every layer but the first depend on the routes of who computed them.
    """
    model, ids, shared = attach(tiny_model(), small_config(granule=granule)), random_ids(1, 60), 20
    found = []
    for route in (0, 1, torch.randint(0, 2, (LAYERS, KV_HEADS), generator=torch.Generator().manual_seed(1))):
        cache = DynamicCache(config=model.config)
        with override_routes(model, route):
            model(ids, past_key_values=cache)
        found.append(torch.stack([torch.cat([layer.keys, layer.values], -1)[0] for layer in cache.layers]))
    dense, *others = found
    for other in others:
        torch.testing.assert_close(other[:, :, :shared], dense[:, :, :shared], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other[0], dense[0])
    apart = (others[0] - dense).abs().amax((1, 3))
    assert float(apart[1:, -1].min()) > 1e-4


@pytest.mark.parametrize("granule", ["token", "block"])
def test_nothing_is_hidden_from_queries_up_to_sink_and_window(granule):
    """Why queries that came from the prefix cache do not count for reach."""
    q, k = torch.randn(2, 2, 24, 16), torch.randn(2, 24, 16)
    mass = hidden_mass(q, k, Pattern(4, 16, granule, 4))
    assert not mass[..., :20].any() and mass[..., 20:].all()


def test_static_routes_with_dense_decoding_are_shared_up_to_sink_and_window():
    config = ElasticConfig(RouterConfig(kind="static"), SparseConfig(sink=4, window=16, block=4), dense_decode=True)
    found = load_routing(Options("dense"), tiny_model().config)
    assert type(found)(config, found.routers).shared_prefix == 20
