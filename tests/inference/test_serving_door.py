"""Who is let in: API keys, and the names that the server answers to."""

import functools
import http.client
import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.commands.serve import build_parser, door_of
from elastic.inference.serving.app import build_app
from elastic.inference.serving.door import Door
from tests.helpers import server as helper
from tests.helpers.server import body_of, serving


def call(address, path="/v1/models", method="GET", body=None, **headers):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=30)
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture
def guarded(model, monkeypatch):
    door = Door(("first-key", "second-key"), ("localhost", "127.0.0.1", "my.example"))
    monkeypatch.setattr(helper, "build_app", functools.partial(build_app, door=door))
    with serving(model) as address:
        yield address


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Bearer first-key2", "Basic first-key", "first-key"],
)
def test_without_a_known_key_nothing_under_v1_is_served(guarded, given):
    headers = {} if given is None else {"Authorization": given}
    for path, method, body in (
        ("/v1/models", "GET", None),
        ("/v1/models/tiny", "GET", None),
        ("/v1/chat/completions", "POST", body_of("find k1", max_tokens=2)),
    ):
        status, answer = call(guarded, path, method, body, **headers)
        assert status == 401 and json.loads(answer)["error"]["type"] == "authentication_error"
        assert "first-key" not in answer


def test_each_key_is_let_in_and_health_needs_none(guarded):
    for key in ("Bearer first-key", "bearer second-key"):
        headers = {"Authorization": key, "content-type": "application/json"}
        status, answer = call(guarded, "/v1/chat/completions", "POST", body_of("find k1", max_tokens=2), **headers)
        assert status == 200 and json.loads(answer)["usage"]["completion_tokens"] == 2
    assert call(guarded, "/health")[0] == call(guarded, "/metrics")[0] == 200
    assert 'elastic_requests_total{status="200"} 2.0' in call(guarded, "/metrics")[1]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]:80", "", "10.1.1.1"]
)
def test_foreign_names_are_refused(server, host):
    for path in ("/v1/models", "/health", "/metrics", "/docs"):
        status, answer = call(server, path, Host=host)
        assert status == 403 and "--allowed-hosts" in json.loads(answer)["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:8000", "localhost."])
def test_loopback_names_are_answered(server, host):
    assert call(server, Host=host)[0] == 200


def test_named_hosts_are_answered(guarded):
    assert call(guarded, Host="my.example:80", Authorization="Bearer first-key")[0] == 200


def test_options_and_the_environment_say_who_is_let_in(monkeypatch):
    def door(*more):
        return door_of(build_parser().parse_args(["--checkpoint", "x", *more]))

    monkeypatch.delenv("ELASTIC_API_KEY", raising=False)
    assert door() == Door((), ("localhost", "127.0.0.1", "::1", "127.0.0.1"))
    assert door("--host", "10.1.2.3", "--allowed-hosts", "a.b", "*").allowed_hosts[-3:] == ("10.1.2.3", "a.b", "*")
    monkeypatch.setenv("ELASTIC_API_KEY", "one two")
    assert door().api_keys == ("one", "two")
    assert door("--api-key", "three").api_keys == ("three",)
    with pytest.raises(ValueError, match="API key is empty"):
        door("--api-key", "")
