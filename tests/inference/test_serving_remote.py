"""HTTP and engine in two processes: what goes between them, and what either does when the other ends."""

import asyncio
import os
import signal
import socket
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.data.prompts import EncodedPrompt
from elastic.inference.serving.app import ServerLimits
from elastic.inference.serving.front import front_of
from elastic.inference.serving.jobs import Event, Job, QueueFullError, Sampling
from elastic.inference.serving.metrics import Metrics
from elastic.inference.serving.remote import Cancel, Close, News, Ready, RemoteEngine
from tests.helpers.forked import forked_program
from tests.helpers.server import ask, body_of, figure, get, hosted, listening, send, serving, until

LIMITS = ServerLimits(timeout=30, grace=20)


def engine_of(connection, lost=pytest.fail, max_queue=2):
    return RemoteEngine(connection, Ready(SimpleNamespace(), None), Metrics(), max_queue, lost)


def job(told=None, seconds=60.0):
    tell = (lambda event: None) if told is None else told.append
    return Job(EncodedPrompt.whole([1, 2]), 4, Sampling(), (), time.monotonic() + seconds, tell)


def news(received=0, waiting=(), events=(), figures=(), closed=None):
    return News(received, waiting, list(events), list(figures), closed)


async def heard(condition):
    for _ in range(500):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False


def test_requests_wait_from_the_moment_they_are_sent_until_their_turn():
    async def ask_three():
        ours, theirs = Pipe()
        engine, jobs = engine_of(ours), [job() for _ in range(4)]
        engine.submit(jobs[0], jobs[1])
        assert engine.waiting == 2
        with pytest.raises(QueueFullError, match="2 requests are waiting; this server lets 2 wait"):
            engine.submit(jobs[2])
        assert [request.number for request in theirs.recv()] == [1, 2]
        theirs.send(news(received=2, waiting=(2,)))  # the first has its turn
        assert await heard(lambda: engine.waiting == 1)
        engine.submit(jobs[2])
        assert [request.number for request in theirs.recv()] == [3] and engine.waiting == 2
        jobs[1].cancelled.set()  # nobody waits for it any more
        assert theirs.recv() == Cancel(2) and engine.waiting == 1
        engine.submit(jobs[3])
        with pytest.raises(QueueFullError, match="2 requests are waiting, and 2 more came at once"):
            engine.submit(job(), job())

    asyncio.run(ask_three())


def test_a_request_that_is_late_does_not_count_as_one_that_waits():
    async def ask_late():
        ours, _theirs = Pipe()
        engine = engine_of(ours, max_queue=1)
        engine.submit(job(seconds=-1.0))
        assert engine.waiting == 0
        engine.submit(job())

    asyncio.run(ask_late())


def test_events_arrive_in_order_and_once():
    async def listen():
        ours, theirs = Pipe()
        engine, told = engine_of(ours), []
        asked = job(told)
        engine.submit(asked)
        theirs.recv()
        theirs.send(news(1, events=[(1, 1, Event("text", "a")), (1, 2, Event("text", "b"))]))
        theirs.send(news(1, events=[(1, 3, Event("end", "stop", {"msr": 0.5}))], figures=[("stepped", (3,))]))
        assert await heard(lambda: asked.ended)
        asked.cancelled.set()  # as everybody does at the end: not worth a message
        engine.submit(job())
        assert [request.number for request in theirs.recv()] == [2]
        return told, asked.new_tokens

    told, new_tokens = asyncio.run(listen())
    assert told == [Event("text", "a"), Event("text", "b"), Event("end", "stop", {"msr": 0.5})] and new_tokens == 3


def test_a_figure_that_cannot_be_counted_costs_no_answer(caplog):
    async def listen():
        ours, theirs = Pipe()
        engine, told = engine_of(ours), []
        engine.submit(job(told))
        theirs.send(news(1, events=[(1, 1, Event("end", "stop"))], figures=[("stepped", ("many",))]))
        assert await heard(lambda: told)
        return told

    assert asyncio.run(listen())[0].kind == "end"
    assert "a figure was not counted" in caplog.text


def test_the_end_of_the_other_side_fails_what_it_was_asked():
    async def lose():
        ours, theirs = Pipe()
        lost, told = [], []
        engine = engine_of(ours, lambda: lost.append(1))
        engine.submit(job(told))
        theirs.close()
        assert await heard(lambda: lost) and not engine.alive
        with pytest.raises(QueueFullError, match="shutting down"):
            engine.submit(job())
        return told, engine.close(0.1)

    (error,), answered = asyncio.run(lose())
    assert error.kind == "error" and error.details == {"status": 500} and "has ended" in error.text
    assert not answered


@pytest.mark.parametrize("answered", [True, False])
def test_closing_waits_for_the_last_message(answered):
    async def close():
        ours, theirs = Pipe()
        engine = engine_of(ours)
        closing = asyncio.create_task(asyncio.to_thread(engine.close, 20.0))
        assert await asyncio.to_thread(theirs.recv) == Close(20.0) and not engine.alive
        theirs.send(news(closed=answered))
        return await closing

    assert asyncio.run(close()) is answered


def test_what_the_engine_refuses_after_all_is_told_as_a_full_queue(model):
    with hosted(model, {"max_batch": 1, "max_queue": 1}) as make, listening(lambda m: roomy(make(m)), LIMITS) as url:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: ask(url, body_of("find k1", max_tokens=40)), range(8)))
        statuses = [status for status, _ in answers]
        assert {200, 429} == set(statuses)
        assert all("try again later" in answer["error"]["message"] for status, answer in answers if status == 429)


def roomy(engine):
    """An HTTP side that lets more wait than the engine."""
    engine.max_queue = 64
    return engine


def test_leaving_reaches_the_engine(model):
    with serving(model, LIMITS, remote=True) as address:
        client = send(address, body_of("find k1", max_tokens=500, stream=True))
        assert until(lambda: figure(address, "elastic_running_requests") == 1)
        client.close()
        assert until(lambda: figure(address, "elastic_running_requests") == 0)


@pytest.fixture
def command(endless, tmp_path):
    """A process that is `elastic serve`, and its address; its log is `log`."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    words = ["serve", *endless, "--name", "tiny", "--port", str(port), "--max-new-tokens", "900"]
    process = forked_program(words, tmp_path, tmp_path / "log")
    process.start()
    address = f"http://127.0.0.1:{port}"
    try:
        assert until(lambda: reached(address), 90), (tmp_path / "log").read_text()
        yield process, address
    finally:
        process.kill()


def reached(address):
    try:
        return get(address, "/health")[0] == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def child_of(process):
    (number,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(number)


def gone(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_streams_are_told_when_the_model_dies_and_nothing_listens_any_more(command):
    process, address = command
    http = child_of(process)
    client = send(address, body_of("find k1", max_tokens=900, stream=True))
    client.settimeout(20)
    answer = client.recv(1 << 16)
    process.kill()  # as by a system that is out of memory
    while more := client.recv(1 << 16):
        answer += more
    assert b"has ended" in answer
    assert until(lambda: gone(http), 20)
    assert not reached(address)


def test_the_end_of_the_http_side_ends_the_command_with_an_error(command, tmp_path):
    process, address = command
    os.kill(child_of(process), signal.SIGKILL)
    process.join(30)
    assert process.exitcode == 2
    said = (tmp_path / "log").read_text()
    assert "ended with exit code -9" in said and "Traceback" not in said
    assert not reached(address)


def test_a_model_that_is_not_loaded_leaves_no_process_behind():
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="no such model"), front_of(chosen, "tiny", LIMITS, None, 1) as (http, _):
            raise ValueError("no such model")
    assert gone(http)
