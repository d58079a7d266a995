"""`elastic bench serve` at a tiny size: the load that is drawn, a real server, its records, and what is refused."""

import json
import socket
import threading
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic import cli
from elastic.bench import load as loads
from elastic.bench import records, serving, tables
from elastic.bench.load import Answered, Load, RequestFailedError, ask, body_of, run_load
from elastic.model.checkpoint import save_elastic
from tests.helpers import server
from tests.helpers.models import varied_routers


@pytest.fixture(scope="module")
def model():
    model, tokenizer = server.tiny_model()
    varied_routers(model)
    return model, tokenizer


def port_of(address):
    return int(address.rsplit(":", 1)[1])


def test_lengths_are_log_uniform_and_repeat_with_their_seed():
    load = Load(4, 2000, 1.0, (16, 4096), (8, 128), seed=3)
    bodies = load.bodies()
    assert bodies == load.bodies() != Load(4, 2000, 1.0, (16, 4096), (8, 128), seed=4).bodies()
    words = [len(body["messages"][0]["content"].partition("\n")[0].split()) for body in bodies]
    assert 16 <= min(words) < 20 and 3500 < max(words) <= 4096
    for most, share in ((64, 1 / 4), (256, 1 / 2), (1024, 3 / 4)):  # two of the eight octaves each
        assert sum(count <= most for count in words) / 2000 == pytest.approx(share, abs=0.04)
    assert {body["max_tokens"] for body in bodies} <= set(range(8, 129))
    assert len({body["messages"][0]["content"] for body in bodies}) == 2000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": 0}, "clients=0 is not above 0"),
        ({"seconds": float("nan")}, "seconds=nan is not above 0"),
        ({"words": (9, 8)}, "words from 9 to 8; expected 1 or more, the fewest first"),
        ({"new_tokens": (0, 8)}, "new_tokens from 0 to 8"),
    ],
)
def test_loads_that_are_none_are_refused(change, message):
    usual = {"clients": 1, "requests": 1, "seconds": 1.0, "words": (1, 2), "new_tokens": (1, 2), "seed": 0}
    with pytest.raises(ValueError, match=message):
        Load(**{**usual, **change})


def test_a_server_is_measured_and_the_record_holds_what_was_asked(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serving, "TURNS", 2)
    save_elastic(tmp_path / "checkpoint", model[0], "tiny")
    options = ["--clients", "3", "--requests", "7", "--words", "4", "90", "--new-tokens", "2", "6", "--max-batch", "2"]
    argv = ["bench", "serve", "--checkpoint", str(tmp_path / "checkpoint"), *options, "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    found = records.load(tmp_path / "out" / "serve.json")
    figures = {(record["case"], record["metric"]): record["value"] for record in found}
    assert figures["3 clients", "answers"] == 7 and figures["3 clients", serving.RATE] > 0
    assert 0 < figures["3 clients", serving.FIRST] <= figures["3 clients", "whole answer, median"]
    assert 1 <= figures["3 clients", "answer, mean"] <= 6
    for company in ("answer", "prompt"):
        assert figures["8 new tokens", f"beside a long {company}, {serving.BESIDE}"] > 0
    assert all(record["words"] == [4, 90] and record["clients"] == 3 and record["gpu"] == "cpu" for record in found)
    assert "Written:" in (told := capsys.readouterr().out) and f"3 clients, elastic, {serving.RATE}:" in told
    assert f"- 3 clients, elastic, {serving.RATE}:" in tables.markdown({"serve": found})


def test_a_server_that_does_not_start_says_why(tmp_path, capsys):
    assert cli.main(["bench", "serve", "--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "the server did not start: elastic serve: error:" in told and str(tmp_path / "none") in told


def test_times_are_those_of_the_stream(model):
    with server.serving(model) as address:
        one = ask(port_of(address), {**body_of(5, 7, 1), "model": "tiny"})
    assert 0 < one.first_s < one.whole_s and one.new_tokens == 7 and one.prompt_tokens > 5


def test_clients_send_no_more_when_the_time_is_up(monkeypatch):
    monkeypatch.setattr(loads, "ask", lambda port, body: threading.Event().wait(0.2) or Answered(0.1, 0.2, 1, 1))
    answers, seconds = run_load(1, Load(2, 1000, 0.5, (1, 2), (1, 2), 0))
    assert 4 <= len(answers) <= 8 and seconds < 5


def test_a_refused_request_ends_the_run(model):
    with server.serving(model) as address, pytest.raises(RequestFailedError, match=r"status 404: .*not served here"):
        run_load(port_of(address), Load(2, 4, 60.0, (1, 2), (1, 2), 0))


@contextmanager
def replying(*events):
    """The port of a server that sends these events as its stream, once."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def reply():
            client, _ = listening.accept()
            with client, client.makefile("rb") as request:
                head = b"".join(iter(request.readline, b"\r\n")).lower()
                request.read(int(head.partition(b"content-length:")[2].split()[0]))  # unread, it resets the connection
                client.sendall(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n")
                client.sendall("".join(f"data: {json.dumps(event)}\n\n" for event in events).encode())

        thread = threading.Thread(target=reply)
        thread.start()
        yield listening.getsockname()[1]
        thread.join(30)


def test_streams_without_their_end_are_no_answers():
    piece = {"choices": [{"delta": {"content": "a"}, "finish_reason": None}]}
    with replying(piece) as port, pytest.raises(RequestFailedError, match="ended before the answer did"):
        ask(port, body_of(1, 1, 0))
    with replying(piece, {"error": {"message": "too late"}}) as port, pytest.raises(RequestFailedError, match="late"):
        ask(port, body_of(1, 1, 0))


def test_of_the_times_95_percent_stay_below():
    answers = [Answered(float(n), 0.0, 1, 1) for n in range(1, 41)]
    assert serving._late(answers, lambda one: one.first_s) == 38.0
    assert serving._median(answers, lambda one: one.first_s) == 20.5
