"""`elastic serve`: answers equal those of `elastic.generate` under concurrency; limits, errors, streams, shutdown.

Talks to a real server on the loopback address.
"""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic import cli
from elastic.inference.generate import generate
from elastic.inference.serving.app import ServerLimits
from elastic.inference.serving.engine import Engine
from elastic.inference.serving.text import TextCutter
from elastic.model import loading
from elastic.model.attach import attach
from elastic.model.checkpoint import save_elastic
from tests.helpers.models import small_config, varied_routers
from tests.helpers.server import ask, body_of, events_of, get, post, serving

PROMPTS = [f"key k{n % 4} 1 2 {n % 6} 4 " + f"f{n % 5} f2 " * (3 + 5 * n) + f"find k{n % 4}" for n in range(12)]


@pytest.fixture(scope="module")
def model():
    model, tokenizer = loading.load_backbone("tiny")
    model.generation_config.eos_token_id = None  # answers of full length
    torch.manual_seed(0)
    attach(model, small_config())
    varied_routers(model)
    return model, tokenizer


@pytest.fixture(scope="module", params=[False, True], ids=["one process", "as two"])
def remote(request):
    """Whether HTTP and engine talk as if they were two processes."""
    return request.param


@pytest.fixture(scope="module")
def server(model, remote):
    with serving(model, remote=remote) as address:
        yield address


def test_concurrent_answers_are_those_of_generate(model, server):
    expected = [generate(*model, prompt, max_new_tokens=8 + n % 3)[0] for n, prompt in enumerate(PROMPTS)]
    bodies = [body_of(prompt, max_tokens=8 + n % 3, stream=n % 2 == 1) for n, prompt in enumerate(PROMPTS)]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda body: post(server, body), bodies * 2))
    assert len({one.report.msr for one in expected}) > 1  # routes differ between the prompts
    for n, (status, answer) in enumerate(answers):
        one, body = expected[n % len(PROMPTS)], bodies[n % len(PROMPTS)]
        assert status == 200
        if body["stream"]:
            chunks = [json.loads(event) for event in events_of(answer)[:-1]]
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            last = chunks[-1]
            assert events_of(answer)[-1] == "[DONE]"
        else:
            last = json.loads(answer)
            text = last["choices"][0]["message"]["content"]
            assert last["usage"]["completion_tokens"] == body["max_tokens"]
            assert last["usage"]["prompt_tokens"] == one.report.prompt_tokens
        assert text.split() == one.text.split()
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["elastic"]["msr"] == pytest.approx(one.report.msr)
    figures = dict(line.rsplit(" ", 1) for line in get(server, "/metrics")[1].splitlines() if line[0] != "#")
    assert float(figures["elastic_batch_size_sum"]) > float(figures["elastic_batch_size_count"])  # some shared steps


def test_prompts_in_pieces_are_answered_as_by_generate(model):
    asked = PROMPTS[:6]
    expected = [generate(*model, prompt, max_new_tokens=6, prefill_chunk_size=8)[0] for prompt in asked]
    with serving(model, prefill_chunk_size=8) as address, ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda prompt: ask(address, body_of(prompt, max_tokens=6)), asked))
    for (status, answer), one in zip(answers, expected, strict=True):
        assert status == 200 and answer["choices"][0]["message"]["content"].split() == one.text.split()
        assert answer["elastic"]["esr"] == pytest.approx(one.report.esr_all)


@pytest.mark.slow
def test_load_on_a_real_model():
    """SmolLM2: 24 requests from 12 clients, each question once as a stream and once whole, get the answers to them."""
    model, tokenizer = loading.load_backbone("smollm2-135m")
    attach(model, small_config(sink=16, window=64, block=16))
    varied_routers(model)
    names = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn")
    prompts = [f"Repeat the word {name} {n + 2} times, nothing else." for n in range(2) for name in names]
    expected = [generate(model, tokenizer, prompt, max_new_tokens=8)[0].text for prompt in prompts]
    with serving((model, tokenizer), max_batch=8) as address, ThreadPoolExecutor(12) as pool:
        bodies = [body_of(p, max_tokens=8, stream=(n + m) % 2 == 1) for n in range(2) for m, p in enumerate(prompts)]
        answers = list(pool.map(lambda body: post(address, body), bodies))
    assert len(set(expected)) >= len(names)
    for body, (status, answer), text in zip(bodies, answers, expected * 2, strict=True):
        assert status == 200
        if body["stream"]:
            chunks = [json.loads(event) for event in events_of(answer)[:-1]]
            got = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        else:
            got = json.loads(answer)["choices"][0]["message"]["content"]
        assert got == text


def test_stream_with_usage_and_stop(model, server):
    full = generate(*model, PROMPTS[0], max_new_tokens=8)[0].text.split()
    status, answer = post(
        server, body_of(PROMPTS[0], max_tokens=8, stream=True, stream_options={"include_usage": True})
    )
    chunks = [json.loads(event) for event in events_of(answer)[:-1]]
    assert status == 200
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 8
    later = next(i for i in range(1, 8) if full[i] not in full[:i])
    status, stopped = ask(server, body_of(PROMPTS[0], max_tokens=8, stop=full[later]))
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["choices"][0]["message"]["content"].split() == full[:later]


def test_seeded_sampling_repeats_whoever_else_asks(server):
    body = body_of(PROMPTS[1], temperature=1.0, seed=7, max_tokens=8)
    alone = ask(server, body)[1]["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(ask, server, body_of(p, temperature=1.0, max_tokens=8)) for p in PROMPTS[2:6]]
        again = pool.submit(ask, server, body)
        assert again.result()[1]["choices"][0]["message"]["content"] == alone
        assert all(future.result()[0] == 200 for future in futures)


def test_sparsity_bias_reaches_the_routers(server):
    msr = [ask(server, body_of(PROMPTS[3], max_tokens=1, sparsity_bias=b))[1]["elastic"]["msr"] for b in (-1e4, 1e4)]
    assert msr == [0.0, 1.0]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "other"}, 404, "'other' is not served here; use 'tiny'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, 400, "not empty"),
        ({"messages": [{"role": "robot", "content": "a"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": "f1 " * 2000}]}, 400, "shorten"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 10**6}, 400, "this server makes 512"),
        ({"temperature": -1}, 400, "temperature"),
        ({"tools": [{"type": "function"}]}, 400, "tools="),
        ({"n": 17}, 400, "n: "),
        ({"n": 0}, 400, "n: "),
        ({"colour": "red"}, 400, "colour"),
    ],
)
def test_bad_requests_get_4xx_and_a_reason(server, change, status, words):
    got, answer = ask(server, {**body_of("find k1"), **change})
    assert got == status
    assert words in answer["error"]["message"]


def test_bodies_that_are_no_json_or_too_large(model, server):
    assert post(server, None, raw=b"{not json")[0] == 400
    assert post(server, None, raw=b"\xff\xfe")[0] == 400
    with serving(model, ServerLimits(max_body=200)) as address:
        status, answer = post(address, body_of("f1 " * 400))
        assert status == 413 and b"larger than 200 bytes" in answer
    assert get(server, "/v1/nothing")[0] == 404


def test_health_models_and_metrics(server):
    assert get(server, "/health") == (200, '{"status":"ok"}')
    assert json.loads(get(server, "/v1/models")[1])["data"][0]["id"] == "tiny"
    ask(server, body_of("find k1", max_tokens=2))
    page = get(server, "/metrics")[1]
    assert 'elastic_requests_total{status="200"}' in page
    assert "elastic_first_text_seconds_count" in page and "elastic_msr_bucket" in page


def test_full_queue_and_timeouts(model, remote, monkeypatch):
    gate = threading.Event()

    def slow(*args, **options):
        gate.wait(30)
        return original(*args, **options)

    from elastic.inference.serving import engine

    original = engine.begin
    monkeypatch.setattr(engine, "begin", slow)
    limits = ServerLimits(timeout=1.5, grace=30)
    with serving(model, limits, remote, max_batch=1, max_queue=1) as address, ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, address, body_of("find k1", max_tokens=2))
        time.sleep(0.4)
        waiting = pool.submit(ask, address, body_of("find k2", max_tokens=2))
        time.sleep(0.4)
        status, answer = ask(address, body_of("find k3", max_tokens=2))
        assert status == 429 and "1 requests are waiting" in answer["error"]["message"]
        assert running.result()[0] == waiting.result()[0] == 504
        gate.set()
        status, answer = ask(address, body_of("find k1", max_tokens=2))
        assert status == 200 and answer["usage"]["completion_tokens"] == 2


def test_a_failing_model_is_told_and_the_queue_goes_on(model, remote, monkeypatch):
    from elastic.inference.serving import engine

    original, calls = engine.begin, []

    def broken(*args, **options):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return original(*args, **options)

    monkeypatch.setattr(engine, "begin", broken)
    with serving(model, remote=remote) as address:
        status, answer = ask(address, body_of("find k1", max_tokens=2))
        assert status == 500 and "out of memory" in answer["error"]["message"]
        assert ask(address, body_of("find k1", max_tokens=2))[0] == 200


def test_shutdown_answers_what_was_taken(model, remote):
    with ThreadPoolExecutor(6) as pool:
        with serving(model, remote=remote, max_batch=2) as address:
            futures = [pool.submit(ask, address, body_of(prompt, max_tokens=16)) for prompt in PROMPTS[:6]]
            deadline = time.monotonic() + 30
            while "elastic_batch_size_count 0.0" in get(address, "/metrics")[1] and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.3)
        assert [future.result()[0] for future in futures] == [200] * 6


def test_command_serves_and_ends_on_sigterm(model, tmp_path):
    path = save_elastic(tmp_path / "mine", model[0], "tiny")
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    command = [sys.executable, "-m", "elastic", "serve", "--checkpoint", str(path), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert f"http://127.0.0.1:{port}/v1" in process.stdout.readline()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if get(f"http://127.0.0.1:{port}", "/health")[0] == 200:
                    break
            except urllib.error.URLError:
                time.sleep(0.1)
        status, answer = ask(f"http://127.0.0.1:{port}", {**body_of("find k1", max_tokens=3), "model": "mine"})
        assert status == 200 and answer["model"] == "mine"
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert process.returncode in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()


def test_settings_out_of_range(model, capsys):
    with pytest.raises(ValueError, match="timeout=0 is not above 0"):
        ServerLimits(timeout=0)
    with pytest.raises(ValueError, match="max_queue=0 is below 1"):
        Engine(*model, max_batch=1, max_queue=0, metrics=None)
    assert cli.main(["serve", "--checkpoint", "/nowhere/at/all"]) == 2
    assert "elastic serve: error:" in capsys.readouterr().err


def test_text_cutter_holds_back_stops_and_broken_characters():
    tokenizer = loading.load_tokenizer("smollm2-135m")
    text = "naïve 日本語 🙂 END of it"
    cutter, out = TextCutter(tokenizer, ("ENDING", "of")), []
    for token in tokenizer(text)["input_ids"]:
        out.append(cutter.add(token))
        if cutter.stopped:
            break
    assert "".join(out) == "naïve 日本語 🙂 END "
    assert not any("\ufffd" in piece for piece in out)
    cutter = TextCutter(tokenizer, ("ENDING",))
    pieces = [cutter.add(token) for token in tokenizer("the END")["input_ids"]]
    assert "".join(pieces) + cutter.rest() == "the END"
