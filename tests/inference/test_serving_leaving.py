"""A client that leaves is cancelled and leaves the queue, streaming or not, running or waiting."""

import threading
import time

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.inference.serving.app import ServerLimits
from tests.helpers.server import ask, body_of, figure, send, serving, until


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_stops_when_its_client_leaves(model, monkeypatch, stream):
    from elastic.inference.serving.rows import Row

    take, steps = Row.take, []

    def slow(self, value):
        steps.append(1)
        time.sleep(0.02)
        take(self, value)

    monkeypatch.setattr(Row, "take", slow)
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

    original, gate, calls = engine.begin, threading.Event(), []

    def held(*args, **options):
        calls.append(1)
        gate.wait(60)
        return original(*args, **options)

    monkeypatch.setattr(engine, "begin", held)
    with serving(model, ServerLimits(timeout=60), max_batch=1, max_queue=4) as address:
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
