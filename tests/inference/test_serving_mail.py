"""News on their way from the engine's thread to the stream of an answer."""

import asyncio
import json
import threading
import time

import pytest

from elastic.data.prompts import EncodedPrompt
from elastic.inference.serving.answer import Answer
from elastic.inference.serving.errors import RefusedError
from elastic.inference.serving.jobs import Event, Job, Sampling
from elastic.inference.serving.mail import Mail
from elastic.inference.serving.metrics import Metrics
from elastic.inference.serving.protocol import ChatRequest


def test_the_loop_is_woken_once_for_all_that_is_sent_before_it_comes_round(monkeypatch):
    async def receive():
        mail, queues, loop = Mail(), [asyncio.Queue(), asyncio.Queue()], asyncio.get_running_loop()
        called, call = [], loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *to: (called.append(to), call(*to))[1])
        for _ in range(2):
            sender = threading.Thread(target=lambda: [mail.send(queues[n % 2], n) for n in range(100)])
            sender.start()
            sender.join()  # the loop waits meanwhile
            assert [[await queue.get() for _ in range(50)] for queue in queues] == [
                [*range(0, 100, 2)],
                [*range(1, 100, 2)],
            ]
        return len(called)

    assert asyncio.run(receive()) == 2


def test_nothing_is_lost_or_changes_places_between_threads():
    async def receive():
        mail, queue = Mail(), asyncio.Queue()
        senders = [
            threading.Thread(target=lambda who=who: [mail.send(queue, (who, n)) for n in range(2000)])
            for who in range(4)
        ]
        for sender in senders:
            sender.start()
        got = [await asyncio.wait_for(queue.get(), 30) for _ in range(4 * 2000)]
        return [[n for who, n in got if who == sender] for sender in range(4)]

    assert asyncio.run(receive()) == [[*range(2000)]] * 4


def test_a_loop_that_has_ended_no_longer_listens():
    async def make():
        return Mail(), asyncio.Queue()

    mail, queue = asyncio.run(make())
    mail.send(queue, 1)
    assert queue.empty()


def answered(events, wait=60.0, n=1):
    """An answer whose engine has said these events, and its jobs."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True, "n": n}
    prompt, deadline = EncodedPrompt.whole([1, 2]), time.monotonic() + wait
    jobs = [Job(prompt, 4, Sampling(), (), deadline, lambda event: None) for _ in range(n)]
    queue = asyncio.Queue()
    for event in events:
        queue.put_nowait(event)
    return Answer(jobs, queue, ChatRequest(**asked), "m", Metrics())


async def streamed(answer):
    return [piece async for piece in answer.stream(await answer.next_event())]


def told(piece):
    """Of every event in a piece: (choice, text or finish reason), or the message of an error."""
    found = []
    for line in piece.split("\n\n"):
        if line and "[DONE]" not in line:
            event = json.loads(line.removeprefix("data: "))
            found += [event["error"]["message"]] if "error" in event else map(of_choice, event["choices"])
    return found


def of_choice(choice):
    return choice["index"], choice["finish_reason"] or choice["delta"]["content"]


def test_what_has_come_goes_out_in_one_piece():
    end = Event("end", "stop", {"msr": 0.5})

    async def run():
        return await streamed(answered([(0, Event("text", "a")), (1, Event("text", "b")), (0, end), (1, end)], n=2))

    (piece,) = asyncio.run(run())
    assert told(piece) == [(0, ""), (0, "a"), (1, ""), (1, "b"), (0, "stop"), (1, "stop")]
    assert piece.endswith("data: [DONE]\n\n")


def test_text_before_an_error_is_told_before_it():
    events = [(0, Event("text", "a")), (0, Event("text", "b")), (0, Event("error", "no memory", {"status": 500}))]

    async def run():
        answer = answered(events)
        return await streamed(answer), answer.jobs[0].cancelled.is_set()

    (text, error), cancelled = asyncio.run(run())
    assert told(text) == [(0, ""), (0, "a"), (0, "b")] and told(error) == ["no memory"] and cancelled


@pytest.mark.parametrize("wait", [-5.0, -0.8])
def test_an_engine_that_does_not_come_round_to_a_request_keeps_nobody_waiting(wait):
    async def run():
        answer = answered([], wait)
        with pytest.raises(RefusedError, match="the request timed out") as refused:
            await asyncio.wait_for(answer.next_event(), 10)
        return refused.value.status, answer.jobs[0].cancelled.is_set()

    assert asyncio.run(run()) == (504, True)


def test_an_answer_in_one_piece_leaves_no_timer():
    async def run():
        answer = answered([(0, Event("text", "a")), (0, Event("end", "stop", {"msr": 0.5}))])
        return (await answer.whole())["choices"][0]["message"]["content"], answer._late.cancelled()

    assert asyncio.run(run()) == ("a", True)
