"""No request makes the server work without a limit: stops, messages, tokens, names, what errors quote; and reading a
prompt does not keep others waiting.
"""

import json
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.inference.serving import reading
from tests.helpers.server import ask, body_of, get, post, serving

LONG = "x" * 100_000
USER = {"role": "user", "content": "find k1"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stop": ["f1"] * 700_000}, "at most 16 items"),
        ({"stop": LONG}, "at most 256 characters"),
        ({"stop": [LONG]}, "at most 256 characters"),
        ({"messages": [USER] * 3000}, "at most 2048 items"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 3000}]}, "at most 2048 items"),
        ({"messages": [{"role": "user", "content": "a " * 3_000_000}]}, "shorten them"),
        ({"messages": [{"role": "user", "content": "f1 " * 3000}]}, "shorten them by"),
        ({"messages": [{"role": "user", "content": " " * 9000}]}, "not empty"),
        ({"messages": [{**USER, **{f"k{n}": 1 for n in range(100_000)}}]}, "at most 64"),
        ({f"k{n}": 1 for n in range(300_000)}, "at most 64"),
        ({"metadata": {f"k{n}": "v" for n in range(1000)}}, "metadata"),
        ({"model": LONG}, "is not served here"),
        ({"tools": [LONG]}, "not supported"),
        ({"logit_bias": {LONG: 1}}, "not supported"),
        ({LONG: 1}, "Extra inputs"),
        ({"messages": [{**USER, LONG: 1}]}, "Extra inputs"),
        ({"messages": [{"role": LONG, "content": "a"}]}, "role"),
        ({"messages": [{"role": "user", "content": "a\ud800b"}]}, "half a surrogate pair"),
        ({"model": "a\ud800"}, "is not served here"),
    ],
    ids=range(19),
)
def test_what_is_too_much_is_refused_at_once_in_few_words(server, change, words):
    started = time.monotonic()
    status, answer = post(server, {**body_of("find k1", max_tokens=2), **change})
    assert status in (400, 404)
    assert words in json.loads(answer)["error"]["message"]
    assert len(answer) < 2000 and time.monotonic() - started < 4


def test_as_many_stops_as_may_be_are_heeded(server):
    stops = [f"never {n}" + "y" * 200 for n in range(16)]
    assert ask(server, body_of("find k1", max_tokens=4, stop=stops))[1]["usage"]["completion_tokens"] == 4


@pytest.fixture
def held_reading(monkeypatch):
    """Prompts wait to be read: an event that the first has begun, and one that lets all continue."""
    original, begun, gate = reading.encode_messages, threading.Event(), threading.Event()

    def slow(*args):
        begun.set()
        assert gate.wait(30)
        return original(*args)

    monkeypatch.setattr(reading, "encode_messages", slow)
    return begun, gate


def test_health_answers_while_a_long_prompt_is_read(model, held_reading):
    begun, gate = held_reading
    with serving(model) as address:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(ask(address, body_of("find k1", max_tokens=2))))
        asking.start()
        assert begun.wait(30)
        started = time.monotonic()
        assert get(address, "/health")[0] == 200 and time.monotonic() - started < 2
        gate.set()
        asking.join(30)
        assert answers[0][0] == 200


def test_prompts_that_wait_to_be_read_are_counted(model, held_reading, monkeypatch):
    begun, gate = held_reading
    monkeypatch.setattr(reading, "_MOST_WAITING", 1)
    with serving(model) as address:
        answers = []
        asking = threading.Thread(target=lambda: answers.append(ask(address, body_of("find k1", max_tokens=2))))
        asking.start()
        assert begun.wait(30)
        status, answer = ask(address, body_of("find k2", max_tokens=2))
        assert status == 429 and "prompts wait to be read" in answer["error"]["message"]
        gate.set()
        asking.join(30)
        assert answers[0][0] == 200


def test_words_of_a_template_that_refuses_reach_the_client(model, monkeypatch):
    template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr(model[1], "chat_template", template)
    with serving(model) as address:
        status, answer = ask(address, body_of("find k1", max_tokens=2))
        assert status == 400 and "roles must alternate" in answer["error"]["message"]
