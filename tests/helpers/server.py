"""A real `elastic serve` on the loopback address, and requests to it."""

import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, nullcontext
from multiprocessing import Pipe

import pytest

from elastic.inference.serving.app import ServerLimits, build_app
from elastic.inference.serving.engine import Engine
from elastic.inference.serving.host import Host
from elastic.inference.serving.listening import Listener
from elastic.inference.serving.remote import RemoteEngine
from elastic.inference.serving.rows import Row
from elastic.model import loading
from elastic.model.attach import attach
from tests.helpers.models import small_config


def tiny_model():
    """The tiny backbone with fresh routers, whose answers have no end but their limit, and its tokenizer."""
    model, tokenizer = loading.load_backbone("tiny")
    model.generation_config.eos_token_id = None
    attach(model, small_config())
    return model, tokenizer


def slow_tokens(monkeypatch, seconds):
    """Let every token of every answer take so much longer."""
    take = Row.take

    def slow(self, token):
        time.sleep(seconds)
        take(self, token)

    monkeypatch.setattr(Row, "take", slow)


@contextmanager
def serving(model, limits=None, remote=False, **engine):
    """Address of a server in this process; `remote`: HTTP and engine talk as if they were two."""
    settings = {"max_batch": 4, "max_queue": 64, **engine}
    limits = limits or ServerLimits(grace=60)

    def make(metrics):
        return Engine(*model, metrics=metrics, **settings)

    with hosted(model, settings) if remote else nullcontext(make) as make_engine, listening(make_engine, limits) as url:
        yield url


@contextmanager
def hosted(model, settings, lost=None):
    """What makes a `RemoteEngine` for an engine that a thread hosts."""
    ours, theirs = Pipe()
    host = Host(ours, lambda metrics, told: Engine(*model, metrics=metrics, told=told, **settings))
    thread = threading.Thread(target=host.run)
    thread.start()
    ready = theirs.recv()
    try:
        yield lambda metrics: RemoteEngine(theirs, ready, metrics, settings["max_queue"], lost or pytest.fail)
    finally:
        hang_up(theirs)
        thread.join(60)
        assert not thread.is_alive()


def hang_up(connection):
    """End a connection as the end of a process does, whoever still reads from it."""
    with socket.socket(fileno=os.dup(connection.fileno())) as end:
        end.shutdown(socket.SHUT_RDWR)


@contextmanager
def listening(make_engine, limits):
    """Address of the application over such an engine."""
    app = build_app("tiny", limits, make_engine)
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    server = Listener(app, limits, host="127.0.0.1", port=port, log_level="error")
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def body_of(prompt, **more):
    return {"model": "tiny", "messages": [{"role": "user", "content": prompt}], "temperature": 0, **more}


def post(address, body, raw=None):
    data = json.dumps(body).encode() if raw is None else raw
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", data=data, headers={"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def ask(address, body):
    status, answer = post(address, body)
    return status, json.loads(answer)


def get(address, path):
    try:
        with urllib.request.urlopen(address + path, timeout=30) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def events_of(answer):
    return [line.removeprefix("data: ") for line in answer.decode().split("\n\n") if line]


def send(address, body):
    """A request whose connection stays open; close it to leave."""
    host, port = address.removeprefix("http://").split(":")
    client, data = socket.create_connection((host, int(port))), json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    client.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    return client


def until(condition, seconds=15.0):
    """Wait for a condition; whether it was seen to hold."""
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return held


def figure(address, name):
    """One line of /metrics; 0 where there is none yet."""
    lines = get(address, "/metrics")[1].splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name + " ")), 0.0)
