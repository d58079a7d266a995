"""Answers begin and end while others run: none waits for the end of a longer one."""

import http.client
import json
import select
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.inference.generate import generate
from elastic.inference.serving.app import ServerLimits
from tests.helpers.models import varied_routers
from tests.helpers.server import ask, body_of, figure, post, send, serving, slow_tokens, tiny_model, until

LONG = 900  # tokens, seconds of work


@pytest.fixture(scope="module")
def model():
    model, tokenizer = tiny_model()
    varied_routers(model)
    return model, tokenizer


@contextmanager
def long_one(address, **more):
    """A long answer that is being made; its client leaves at the end."""
    client = send(address, body_of("find k2", max_tokens=LONG, **more))
    assert until(lambda: figure(address, "elastic_running_requests") == 1)
    try:
        yield client
    finally:
        client.close()


def answered(client):
    """Whether anything has come."""
    return bool(select.select([client], [], [], 0)[0])


def until_answered(client):
    """Status and body, once they come."""
    client.settimeout(60)
    response = http.client.HTTPResponse(client)
    response.begin()
    return response.status, json.loads(response.read())


def seconds(address, **more):
    started = time.perf_counter()
    assert ask(address, body_of("find k1", **more))[0] == 200
    return time.perf_counter() - started


@pytest.mark.parametrize("tokens", [1, 16])
def test_a_short_request_beside_a_long_one_takes_three_times_its_time_alone_at_most(model, tokens):
    with serving(model, ServerLimits(max_new_tokens=LONG)) as address:
        seconds(address, max_tokens=tokens)
        alone = statistics.median(seconds(address, max_tokens=tokens) for _ in range(7))
        with long_one(address) as client:
            beside = statistics.median(seconds(address, max_tokens=tokens) for _ in range(7))
            assert not answered(client)
            assert beside < 3 * alone + 0.05  # the last is for the clock of a busy machine
            assert until_answered(client)[1]["usage"]["completion_tokens"] == LONG


KINDS = [{"seed": 5, "temperature": 1.0}, {"temperature": 1.0}, {"temperature": 0.7}, {"sparsity_bias": 4.0}]


@pytest.mark.parametrize("of_short", KINDS, ids=str)
@pytest.mark.parametrize("of_long", [{}, {"seed": 3, "temperature": 1.0}], ids=["greedy", "seeded"])
def test_settings_of_its_own_make_no_request_wait(model, of_short, of_long):
    with serving(model, ServerLimits(max_new_tokens=LONG)) as address, long_one(address, **of_long) as client:
        assert ask(address, body_of("find k1", max_tokens=2, **of_short))[1]["usage"]["completion_tokens"] == 2
        assert not answered(client)


def test_whoever_waits_for_a_place_gets_the_first_that_is_free(model):
    limits, body = ServerLimits(max_new_tokens=LONG), body_of("find k1", max_tokens=3)
    with serving(model, limits, max_batch=2) as address, long_one(address) as client, ThreadPoolExecutor(4) as pool:
        assert [status for status, _ in pool.map(lambda _: ask(address, body), range(4))] == [200] * 4
        assert not answered(client)


def test_time_is_up_for_the_long_one_alone(model, monkeypatch):
    slow_tokens(monkeypatch, 0.01)
    limits = ServerLimits(max_new_tokens=LONG, timeout=3)
    with serving(model, limits) as address, long_one(address) as client:
        assert ask(address, body_of("find k1", max_tokens=2))[0] == 200
        assert not answered(client)
        assert until_answered(client)[0] == 504


def test_answers_are_their_own_while_others_come_and_go(model):
    lengths = [1, 40, 3, 25, 2, 60, 7, 12, 5, 30]
    prompts = [f"key k{n % 4} 1 2 {n % 6} 4 " + "f1 f2 " * (3 + 7 * n) + f"find k{n % 4}" for n in range(10)]
    expected = [
        generate(*model, prompt, max_new_tokens=length)[0] for prompt, length in zip(prompts, lengths, strict=True)
    ]
    with serving(model, max_batch=3) as address, ThreadPoolExecutor(len(prompts)) as pool:
        bodies = [body_of(prompt, max_tokens=length) for prompt, length in zip(prompts, lengths, strict=True)]
        answers = [answer for _, answer in pool.map(lambda body: ask(address, body), bodies)]
    for one, answer in zip(expected, answers, strict=True):
        assert answer["choices"][0]["message"]["content"].split() == one.text.split()
        assert answer["elastic"]["msr"] == pytest.approx(one.report.msr)


def test_stop_texts_of_the_model_end_an_answer(model, monkeypatch):
    words = generate(*model, "find k1", max_new_tokens=12)[0].text.split()
    later = next(n for n in range(1, 12) if words[n] not in words[:n])
    monkeypatch.setattr(model[0].generation_config, "stop_strings", [words[later]])
    with serving(model) as address:
        status, answer = post(address, body_of("find k1", max_tokens=12))
    choice = json.loads(answer)["choices"][0]
    assert status == 200 and choice["finish_reason"] == "stop" and choice["message"]["content"].split() == words[:later]
