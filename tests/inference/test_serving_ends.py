"""Requests that do not come whole, and the end of the server: whoever is cut off is told, and no traceback is left."""

import json
import os
import signal
import socket
import threading
import time
import urllib.error

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")


from elastic.inference.serving.app import ServerLimits
from elastic.inference.serving.rows import Row
from tests.helpers.forked import forked_program
from tests.helpers.server import body_of, events_of, figure, get, post, send, serving, slow_tokens, until

HEAD = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"


def connected(address, sent):
    host, port = address.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    client.sendall(sent.encode())
    client.settimeout(30)
    return client


def rest_of(client):
    parts = []
    while part := client.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        ("", b""),
        (HEAD[:50], b""),
        (HEAD + "content-length: 900\r\n\r\n" + '{"model"', b"408"),
        (HEAD + "transfer-encoding: chunked\r\n\r\n400\r\n{", b"408"),
    ],
    ids=["nothing", "half a head", "half a body", "half a chunk"],
)
def test_half_a_request_holds_its_connection_for_a_while_only(model, sent, told):
    with serving(model, ServerLimits(timeout=1.0)) as address:
        client, started = connected(address, sent), time.monotonic()
        answer = rest_of(client)
        assert time.monotonic() - started < 10
        assert told in answer[:20] and bool(answer) == bool(told)
        if told == b"408":
            assert b"did not come within 1 seconds" in answer


def test_half_a_request_after_a_whole_one_holds_it_no_longer(model):
    with serving(model, ServerLimits(timeout=1.0)) as address:
        client = connected(address, "GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n")
        assert b"200" in client.recv(1 << 16)[:20]
        client.sendall(HEAD[:50].encode())
        started = time.monotonic()
        assert b"200" not in rest_of(client)[:20] and time.monotonic() - started < 10


def test_a_request_that_came_in_time_may_take_longer(model, monkeypatch):
    slow_tokens(monkeypatch, 0.1)
    monkeypatch.setattr(ServerLimits, "arrival", 0.5)
    with serving(model) as address:
        assert post(address, body_of("find k1", max_tokens=12))[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_whoever_is_cut_off_when_the_server_stops_is_told(model, monkeypatch, caplog, stream):
    take, answers = Row.take, []

    def slow(self, token):
        time.sleep(0.05)
        take(self, token)

    monkeypatch.setattr(Row, "take", slow)
    with serving(model, ServerLimits(grace=1.0), max_batch=1) as address:
        threads = [
            threading.Thread(target=lambda: answers.append(post(address, body_of("a", max_tokens=500, stream=stream))))
            for _ in "12"
        ]
        threads[0].start()
        assert until(lambda: figure(address, "elastic_first_text_seconds_count") == 1)  # a stream's status is out
        threads[1].start()
        assert until(lambda: figure(address, "elastic_waiting_requests") == 1)
        half = connected(address, HEAD + "content-length: 900\r\n\r\n{")
    for thread in threads:
        thread.join(30)
    assert sorted(status for status, _ in answers) == [200 if stream else 503, 503]
    for status, answer in answers:
        error = json.loads(events_of(answer)[-1] if status == 200 else answer)["error"]
        assert "the server was stopped" in error["message"] and error["type"] == "server_error"
    assert b"503" in half.recv(1 << 16)[:20]  # what closes the connection then is the end of the process
    assert not any(record.exc_info for record in caplog.records)


BUSY = """
import sys, torch
from elastic import cli
from elastic.inference.serving import engine
def begin(*_, **__):
    x = torch.zeros(3000, 3000)
    while True:
        x = x @ x
engine.begin = begin
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("script", [None, BUSY], ids=["between steps", "within a step"])
def test_a_second_signal_ends_the_server_at_once(endless, script, tmp_path):
    file = None
    if script:
        file = tmp_path / "busy.py"
        file.write_text(script)
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    words = ["serve", *endless, "--name", "tiny", "--port", str(port), "--max-new-tokens", "900"]
    process = forked_program(words, tmp_path, log, file)
    process.start()

    def healthy():
        try:
            return get(address, "/health")[0] == 200
        except urllib.error.URLError:
            return False

    try:
        assert until(healthy, 90)
        client = send(address, body_of("find k1", max_tokens=900))
        assert until(lambda: figure(address, "elastic_running_requests") == 1)
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        client.settimeout(20)
        assert b"503" in client.recv(1 << 16)[:20]
        process.join(20)
        assert process.exitcode == 0
        said = log.read_text()
        assert "Traceback" not in said and "terminate" not in said
    finally:
        process.kill()
