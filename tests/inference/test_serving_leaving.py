"""A client that leaves is cancelled and leaves the queue, streaming or not, running or waiting."""

import json
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.inference.serving.app import ServerLimits
from tests.helpers.server import ask, body_of, get, serving, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def send(address, body):
    """A request whose connection stays open; close it to leave."""
    host, port = address.removeprefix("http://").split(":")
    client, data = socket.create_connection((host, int(port))), json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    client.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return client


def until(condition, seconds=15.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def figure(address, name):
    lines = get(address, "/metrics")[1].splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_stops_when_its_client_leaves(model, monkeypatch, stream):
    from elastic.inference.serving.rows import Rows

    put, steps = Rows.put, []

    def slow(self, value):
        steps.append(1)
        time.sleep(0.02)
        put(self, value)

    monkeypatch.setattr(Rows, "put", slow)
    with serving(model) as address:
        client = send(address, body_of("find k1", max_tokens=400, stream=stream))
        assert until(lambda: len(steps) > 5)
        client.close()
        assert until(lambda: figure(address, "elastic_running_requests") == 0, 5)
        assert len(steps) < 300
        assert ask(address, body_of("find k1", max_tokens=2))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_left_make_room_in_the_queue(model, monkeypatch, stream):
    from elastic.inference.serving import engine

    original, gate, calls = engine.answer_tokens, threading.Event(), []

    def held(*args, **options):
        calls.append(len(args[2]))
        gate.wait(60)
        return original(*args, **options)

    monkeypatch.setattr(engine, "answer_tokens", held)
    with serving(model, ServerLimits(timeout=60), max_batch=1, max_queue=4, batch_seconds=0) as address:
        try:
            clients = [send(address, body_of("find k1", max_tokens=2))]
            assert until(lambda: len(calls) == 1)
            clients += [send(address, body_of("find k2", max_tokens=2, stream=stream)) for _ in range(4)]
            assert until(lambda: figure(address, "elastic_waiting_requests") == 4)
            assert ask(address, body_of("find k3", max_tokens=2))[0] == 429
            for client in clients:
                client.close()
            assert until(lambda: figure(address, "elastic_waiting_requests") == 0, 5)
            honest = []
            asking = threading.Thread(target=lambda: honest.append(ask(address, body_of("find k3", max_tokens=2))))
            asking.start()
            assert until(lambda: figure(address, "elastic_waiting_requests") == 1, 5)
        finally:
            gate.set()
        asking.join(60)
        assert honest[0][0] == 200
        assert calls == [1, 1]  # nothing was computed for those who left while they waited
        assert figure(address, 'elastic_requests_total{status="499"}') == 5
