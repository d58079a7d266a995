"""Any body of a chat request is answered as it asks, or refused in one line of the protocol's shape."""

import asyncio
import json
import math

import pytest
from hypothesis import given

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.inference.serving.app import CHAT, build_app
from elastic.inference.serving.limits import ServerLimits
from elastic.inference.serving.mail import Mail
from elastic.inference.serving.reading import PromptReader
from elastic.model.loading import load_backbone
from tests.helpers.damage import examples, files_of

BODY = {
    "model": "tiny",
    "messages": [{"role": "system", "content": "f1"}, {"role": "user", "content": [{"type": "text", "text": "f2"}]}],
    "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ["x", "yy"], "stream": False, "n": 1,
    "stream_options": {"include_usage": True}, "sparsity_bias": 0.25, "user": "me", "metadata": {"a": "b"},
    "chat_template_kwargs": {"enable_thinking": True},
}  # fmt: skip


class Queue:
    """An engine that takes every job and answers at once."""

    alive, waiting = True, 0

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.job = model, tokenizer, None

    def submit(self, *jobs):
        self.job = jobs[0]
        for job in jobs:
            job.say("text", "v1")
            job.say("end", "stop", msr=0.5)


@pytest.fixture(scope="module")
def door():
    """Sends a body to the application in this process; status, answer and the job that the engine was given."""
    queue = Queue(*load_backbone("tiny"))
    app = build_app("tiny", ServerLimits(max_new_tokens=64), lambda metrics: queue)
    app.state.engine, app.state.reader = queue, PromptReader(queue.model, queue.tokenizer)

    def send(data):
        queue.job = None
        scope = {
            "type": "http", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")], "scheme": "http",
            "http_version": "1.1", "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
        }  # fmt: skip
        sent, heard = iter([{"type": "http.request", "body": data, "more_body": False}]), []

        async def receive():
            message = next(sent, None)
            return message if message is not None else await asyncio.Event().wait()

        async def tell(message):
            heard.append(message)

        async def answer():
            app.state.mail = Mail()  # of this loop
            await app(scope, receive, tell)

        asyncio.run(answer())
        return heard[0]["status"], b"".join(message.get("body", b"") for message in heard[1:]), queue.job

    yield send
    app.state.reader.close()


def number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


def test_a_chat_request(door):
    @examples(250)
    @given(files_of(BODY))
    def holds(data):
        status, answer, job = door(data)
        if status != 200:
            error = json.loads(answer)["error"]
            assert status in (400, 404) and job is None, (status, error)
            assert error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]
            return
        body = {name: value for name, value in json.loads(data.decode("utf-8-sig")).items() if value is not None}
        limit, temperature = body.get("max_completion_tokens", body.get("max_tokens", 64)), body.get("temperature", 1.0)
        if number(limit):
            assert job.limit == limit
        if number(temperature) and temperature >= 1e-5:
            sampling = job.sampling
            assert sampling.temperature == temperature and 0 < sampling.top_p <= 1
            assert not number(body.get("top_p")) or sampling.top_p == body["top_p"]
            assert not number(body.get("seed")) or sampling.seed == body["seed"]
        if number(body.get("sparsity_bias")):
            assert job.sampling.sparsity_bias == body["sparsity_bias"]
        assert not isinstance(body.get("stop"), list) or job.stops == tuple(text for text in body["stop"] if text)
        assert len(job.prompt) > 0 and math.isfinite(job.deadline)
        assert b"v1" in answer

    holds()
    status, _, job = door(json.dumps(BODY).encode())
    assert status == 200 and job.limit == 5
    assert tuple(job.sampling) == (0.5, 0.9, 7, 0.25) and job.stops == ("x", "yy")
