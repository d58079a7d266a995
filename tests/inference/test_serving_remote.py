"""HTTP and engine in two processes: what goes between them, and what either does when the other ends."""

import asyncio
import os
import signal
import socket
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.data.prompts import EncodedPrompt
from elastic.inference.serving.admission import Admission
from elastic.inference.serving.app import ServerLimits
from elastic.inference.serving.front import front_of
from elastic.inference.serving.host import Host
from elastic.inference.serving.jobs import Event, Job, QueueFullError, Sampling
from elastic.inference.serving.metrics import Metrics
from elastic.inference.serving.remote import Cancel, Close, Listening, News, Ready, RemoteEngine
from tests.helpers.forked import forked_program
from tests.helpers.server import ask, body_of, figure, get, hang_up, hosted, listening, send, serving, until

LIMITS = ServerLimits(timeout=30, grace=20)


def engine_of(connection, lost=pytest.fail, max_queue=2):
    return RemoteEngine(connection, Ready(SimpleNamespace(), None), Metrics(), max_queue, lost)


def job(told=None, seconds=60.0):
    tell = (lambda event: None) if told is None else told.append
    return Job(EncodedPrompt.whole([1, 2]), 4, Sampling(), (), time.monotonic() + seconds, tell)


def asked_of(connection):
    """The next message but the first, which says that the HTTP side is there."""
    message = connection.recv()
    return connection.recv() if message == Listening() else message


def news(received=0, waiting=(), events=(), figures=(), closed=False):
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
        assert [request.number for request in asked_of(theirs)] == [1, 2]
        theirs.send(news(received=2, waiting=(2,)))  # the first has its turn
        assert await heard(lambda: engine.waiting == 1)
        engine.submit(jobs[2])
        assert [request.number for request in asked_of(theirs)] == [3] and engine.waiting == 2
        jobs[1].cancelled.set()  # nobody waits for it any more
        assert asked_of(theirs) == Cancel(2) and engine.waiting == 1
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
        asked_of(theirs)
        theirs.send(news(1, events=[(1, 1, Event("text", "a")), (1, 2, Event("text", "b"))]))
        theirs.send(news(1, events=[(1, 3, Event("end", "stop", {"msr": 0.5}))], figures=[("stepped", (3,))]))
        assert await heard(lambda: asked.ended)
        asked.cancelled.set()  # as everybody does at the end: not worth a message
        engine.submit(job())
        assert [request.number for request in asked_of(theirs)] == [2]
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
        with pytest.raises(QueueFullError, match="the engine has stopped"):
            engine.submit(job())
        return told, engine.close(0.1)

    (error,), answered = asyncio.run(lose())
    assert error.kind == "error" and error.details == {"status": 500} and "has ended" in error.text
    assert not answered


def test_closing_waits_for_the_last_message():
    async def close(answer):
        ours, theirs = Pipe()
        engine = engine_of(ours)
        closing = asyncio.create_task(asyncio.to_thread(engine.close, 20.0 if answer else 0.2))
        assert await asyncio.to_thread(asked_of, theirs) == Close() and not engine.alive
        if answer:
            theirs.send(news(closed=True))
        return await closing

    assert asyncio.run(close(True)) and not asyncio.run(close(False))


class Talker:
    """An engine that gives every job a hundred long texts at once."""

    model, tokenizer, queue = SimpleNamespace(config=None), None, ()

    def __init__(self, told):
        self.told, self.over = told, threading.Event()

    def submit(self, *jobs):
        for one in jobs:
            threading.Thread(target=self.talk, args=(one,), daemon=True).start()

    def talk(self, one):
        for _ in range(100):
            one.say("text", "x" * 50_000)
            self.told(self)
        one.say("end", "stop")
        self.told(self)

    def close(self, seconds):
        self.over.set()

    def join(self):
        self.over.wait()


def test_neither_side_waits_for_the_other_to_listen_before_it_listens_itself():
    async def talk(connection, ready):
        told = [[], [], []]
        engine = RemoteEngine(connection, ready, Metrics(), 9, pytest.fail)
        jobs = [job(of) for of in told]
        jobs[1].prompt = jobs[2].prompt = EncodedPrompt.whole([*range(10_000, 210_000)])  # more than a pipe holds
        engine.submit(jobs[0])
        time.sleep(0.5)  # the loop is busy, and the engine's news more than a pipe holds
        engine.submit(jobs[1])
        engine.submit(jobs[2])
        assert await heard(lambda: all(one.ended for one in jobs))
        return [len(of) for of in told]

    ours, theirs = Pipe()
    host = Host(ours, lambda figures, told: Talker(told))
    threading.Thread(target=host.run, daemon=True).start()
    assert asyncio.run(talk(theirs, theirs.recv())) == [101] * 3
    hang_up(theirs)


def test_an_engine_that_stops_by_itself_is_told(model, monkeypatch):
    def broken(self, *_):
        raise MemoryError("no more of it")

    monkeypatch.setattr(Admission, "choose", broken)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # pytest's warns of the thread
    with serving(model, LIMITS, remote=True) as address:
        status, answer = ask(address, body_of("find k1", max_tokens=2))
        assert status == 500 and "the engine has stopped" in answer["error"]["message"]
        assert get(address, "/health") == (503, '{"status":"stopping"}')
        assert ask(address, body_of("find k1", max_tokens=2))[0] == 429


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


def start(endless, folder):
    """A process that is `elastic serve`, whose log is `log`, and its address."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    words = ["serve", *endless, "--name", "tiny", "--port", str(port), "--max-new-tokens", "900"]
    process = forked_program(words, folder, folder / "log")
    process.start()
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture
def command(endless, tmp_path):
    """As `start`, once it answers."""
    process, address = start(endless, tmp_path)
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


def test_a_signal_that_both_processes_get_at_once_counts_once(command):
    process, address = command
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, address, body_of("find k1", max_tokens=300))
        assert until(lambda: figure(address, "elastic_running_requests") == 1)
        for number in (child_of(process), process.pid):
            os.kill(number, signal.SIGINT)
        assert asked.result()[0] == 200
    process.join(30)
    assert process.exitcode == 0


def test_whoever_reads_the_address_may_use_it_and_stop_the_server(endless, tmp_path):
    process, address = start(endless, tmp_path)
    try:
        assert until(lambda: (tmp_path / "log").exists() and address in (tmp_path / "log").read_text(), 90)
        os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 0 and "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.kill()


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
