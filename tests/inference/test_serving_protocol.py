"""Bodies as clients of the protocol send them: nulls, roles, the dump of an answer as a turn, one model by its name.

Also the words that a prompt gets which is too long.
"""

import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.inference.serving.protocol import ChatRequest
from tests.helpers.server import ask, body_of, get

# `completion.choices[0].message.model_dump()` of the openai package, versions 1 and 2
DUMP = {
    "content": "v1",
    "refusal": None,
    "role": "assistant",
    "annotations": None,
    "audio": None,
    "function_call": None,
    "tool_calls": None,
}
USER = {"role": "user", "content": "find k1"}


def text_of(server, **change):
    status, answer = ask(server, {**body_of("find k1", max_tokens=6), **change})
    assert status == 200, answer
    return answer["choices"][0]["message"]["content"]


OPTIONAL = [*sorted(set(ChatRequest.model_fields) - {"model", "messages"}), "n", "tools", "logprobs"]


@pytest.mark.parametrize("name", OPTIONAL)
def test_null_is_a_setting_left_out(server, name):
    given = {"temperature": 0, "max_tokens": 6}
    body = {"model": "tiny", "messages": [USER], **given, name: None}
    status, answer = ask(server, body)
    assert status == 200
    if name not in given:
        assert answer["choices"][0]["message"]["content"] == text_of(server)


def test_a_temperature_of_null_is_the_protocols_default():
    assert ChatRequest(model="m", messages=[USER], temperature=None, top_p=None).sampling.temperature == 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"store": False},
        {"service_tier": "auto"},
        {"parallel_tool_calls": True},
        {"safety_identifier": "me"},
        {"modalities": ["text"]},
        {"stream_options": {"include_usage": None}},
        {"messages": [{**USER, "name": None}]},
    ],
)
def test_settings_that_change_nothing_are_accepted(server, change):
    assert text_of(server, **change) == text_of(server)


@pytest.mark.parametrize("change", [{"store": True}, {"service_tier": "flex"}, {"functions": [{}]}])
def test_settings_that_would_are_refused_by_name(server, change):
    status, answer = ask(server, {**body_of("find k1"), **change})
    assert status == 400 and f"{next(iter(change))}=" in answer["error"]["message"]


def test_developer_is_system(server):
    texts = [
        text_of(server, messages=[{"role": role, "content": "f1 f2"}, USER], max_tokens=8)
        for role in ("developer", "system")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("more", [{}, {"annotations": []}, {"tool_calls": []}])
def test_the_dump_of_an_answer_is_a_turn(server, more):
    plain = [USER, {"role": "assistant", "content": "v1"}, USER]
    assert text_of(server, messages=[USER, {**DUMP, **more}, USER]) == text_of(server, messages=plain)


def test_an_answer_of_this_server_is_a_turn(server):
    message = ask(server, body_of("find k1", max_tokens=3))[1]["choices"][0]["message"]
    assert text_of(server, messages=[USER, message, USER])


@pytest.mark.parametrize(
    "change",
    [{"tool_calls": [{"id": "1"}]}, {"refusal": "no"}, {"audio": {"id": "a"}}, {"function_call": {"name": "f"}}],
)
def test_turns_that_hold_more_than_text_are_refused_by_name(server, change):
    status, answer = ask(server, {**body_of("x"), "messages": [USER, {**DUMP, **change}, USER]})
    assert status == 400 and f"{next(iter(change))}=" in answer["error"]["message"]


def test_one_model_by_its_name(server):
    status, answer = get(server, "/v1/models/tiny")
    card = json.loads(answer)
    assert status == 200 and card == json.loads(get(server, "/v1/models")[1])["data"][0]
    assert card["id"] == "tiny" and isinstance(card["created"], int)
    for name in ("other", "tiny/more"):
        status, answer = get(server, f"/v1/models/{name}")
        assert status == 404 and f"'{name}' is not served here; use 'tiny'" in json.loads(answer)["error"]["message"]


def test_a_prompt_that_is_too_long_hears_by_how_much(server):
    fitting = ask(server, body_of("f1 " * 900, max_tokens=1))[1]["usage"]["prompt_tokens"]
    long = 900 + 1024 - fitting  # words of a prompt as long as the model reads
    status, answer = ask(server, body_of("f1 " * (long + 99), max_tokens=1))
    assert status == 400 and "shorten them by 100 tokens or more" in answer["error"]["message"]
    assert ask(server, body_of("f1 " * (long - 1)))[1]["usage"]["completion_tokens"] == 1
    status, answer = ask(server, body_of("f1 " * (long - 5), max_tokens=9))
    assert status == 400 and "set max_tokens to 5 or less" in answer["error"]["message"]
    assert ask(server, body_of("f1 " * (long - 5), max_tokens=5))[0] == 200
