"""`elastic serve` holds its address before it loads a model."""

import socket

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from elastic.commands.serve import leave_at_once, listen_on, main


@pytest.fixture
def never_loaded(monkeypatch):
    from elastic.inference import generate

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(generate, "load", load)


@pytest.mark.parametrize("listens", [True, False])
def test_a_used_port_is_told_before_the_model_is_loaded(never_loaded, capsys, listens):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if listens:
            other.listen()
        port = str(other.getsockname()[1])
        assert main(["--checkpoint", "any", "--port", port]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port" in error


@pytest.mark.parametrize(("option", "value"), [("--port", "70000"), ("--port", "-1"), ("--host", "203.0.113.7")])
def test_addresses_that_are_none_are_told_too(never_loaded, capsys, option, value):
    assert main(["--checkpoint", "any", option, value]) == 2
    error = capsys.readouterr().err
    assert value in error and "--port" in error


def test_a_server_may_follow_one_that_has_just_ended():
    with listen_on("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        leave_at_once(first)
        first.listen()
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = first.accept()
        accepted.close()  # the server's side closes first and is remembered for a minute
        client.recv(1)
        client.close()
    with listen_on("127.0.0.1", port) as second:
        assert second.getsockname()[1] == port
