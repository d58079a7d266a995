"""Several choices of one request, and variables of the chat template."""

import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.inference.generate import generate
from elastic.inference.serving import text
from elastic.inference.serving.app import ServerLimits
from elastic.inference.serving.protocol import ChatRequest
from tests.helpers.server import ask, body_of, events_of, figure, post, send, serving, slow_tokens, until

BODY = body_of("find k1", max_tokens=7)


def texts_of(answer):
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(choices)))
    return [choice["message"]["content"] for choice in choices]


def test_greedy_choices_are_alike_and_the_prompt_is_counted_once(server):
    one, three = (ask(server, {**BODY, "n": n})[1] for n in (1, 3))
    assert texts_of(three) == texts_of(one) * 3 and one["elastic"] == three["elastic"]
    prompt = one["usage"]["prompt_tokens"]
    assert three["usage"] == {"prompt_tokens": prompt, "completion_tokens": 21, "total_tokens": prompt + 21}


def test_seeded_choices_are_those_of_seeds_that_count_up(server):
    asked = {**BODY, "temperature": 1.5}
    choices = texts_of(ask(server, {**asked, "n": 3, "seed": 5})[1])
    assert choices == [texts_of(ask(server, {**asked, "seed": seed})[1])[0] for seed in (5, 6, 7)]
    assert len(set(choices)) > 1


def test_seeds_that_count_up_stay_seeds():
    body = ChatRequest(model="m", messages=[{"role": "user", "content": "a"}], n=3, seed=2**63 - 2)
    assert [sampling.seed for sampling in body.samplings] == [2**63 - 2, 2**63 - 1, -(2**63)]


def test_a_stream_tells_which_choice_each_piece_is_of(server):
    asked = {**BODY, "temperature": 1.5, "n": 3, "seed": 5}
    whole = ask(server, asked)[1]
    *events, done = events_of(post(server, {**asked, "stream": True, "stream_options": {"include_usage": True}})[1])
    *chunks, last = [json.loads(event) for event in events]
    assert done == "[DONE]" and last["usage"] == whole["usage"] and last["choices"] == []
    texts, ends = ["", "", ""], []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        if choice["finish_reason"]:
            ends.append(choice["index"])
            assert choice["finish_reason"] == "length" and chunk["elastic"] == whole["elastic"]
    assert texts == texts_of(whole) and sorted(ends) == [0, 1, 2]
    assert sum("role" in chunk["choices"][0]["delta"] for chunk in chunks) == 3


def test_choices_wait_together_or_not_at_all(model):
    with serving(model, max_queue=2) as address:
        status, answer = ask(address, {**BODY, "n": 3})
        assert status == 429 and "3 more came at once; this server lets 2 wait" in answer["error"]["message"]
        assert figure(address, "elastic_waiting_requests") == 0 and ask(address, {**BODY, "n": 2})[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_all_choices_end_when_their_client_leaves(model, monkeypatch, stream):
    slow_tokens(monkeypatch, 0.02)
    with serving(model, ServerLimits(max_new_tokens=900)) as address:
        client = send(address, {**BODY, "max_tokens": 900, "n": 3, "stream": stream})
        assert until(lambda: figure(address, "elastic_running_requests") == 3)
        client.close()
        assert until(lambda: figure(address, "elastic_running_requests") == 0, 10)


def test_an_error_of_one_choice_is_that_of_the_request(model, monkeypatch):
    add, calls = text.TextCutter.add, []

    def broken(self, token):
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("bytes of no character")
        return add(self, token)

    monkeypatch.setattr(text.TextCutter, "add", broken)
    with serving(model, ServerLimits(max_new_tokens=900)) as address:
        status, answer = ask(address, {**BODY, "max_tokens": 900, "n": 2})
        assert status == 500 and "bytes of no character" in answer["error"]["message"]
        assert until(lambda: figure(address, "elastic_running_requests") == 0, 10)


@pytest.fixture
def with_variable(model, monkeypatch):
    template = (
        "{% if deep %}f1 f2 f3 {{ deep + 'f4' }} {% endif %}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    )
    monkeypatch.setattr(model[1], "chat_template", template)
    return model


def test_variables_reach_the_chat_template(with_variable):
    given = {"deep": "p1 "}
    with serving(with_variable) as address:
        plain, deep, unknown = (
            ask(address, {**BODY, "chat_template_kwargs": kwargs})[1] for kwargs in ({}, given, {"other": [1]})
        )
    expected = generate(*with_variable, "find k1", max_new_tokens=7, chat_template_kwargs=given)[0]
    assert texts_of(deep)[0].split() == expected.text.split()
    assert deep["usage"]["prompt_tokens"] == expected.report.prompt_tokens == plain["usage"]["prompt_tokens"] + 5
    assert texts_of(plain) == texts_of(unknown)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"deep": 3}, "the chat template fails with these variables: TypeError"),
        ({"messages": []}, "chat_template_kwargs name messages, which are not variables of a template"),
        ([1], "chat_template_kwargs: "),
        ({str(n): n for n in range(65)}, "chat_template_kwargs: "),
    ],
    ids=["fails", "not its own", "no object", "too many"],
)
def test_variables_that_do_not_fit_are_refused(with_variable, kwargs, words):
    with serving(with_variable) as address:
        status, answer = ask(address, {**BODY, "chat_template_kwargs": kwargs})
        assert status == 400 and words in answer["error"]["message"]
        assert ask(address, BODY)[0] == 200
