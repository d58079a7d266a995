"""A soak of `elastic serve`: mixed requests from many clients at a time against a real process with the tiny backbone.

    python -m tests.robustness.soak --requests 1000

Every answer is compared with `elastic.generate` for its prompt alone. In between come bad bodies, over-long prompts,
clients that leave, before an answer or within it, and clients that read slowly. The figures are printed as JSON.
"""

import argparse
import http.client
import json
import os
import random
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch

from elastic.console import say
from elastic.inference.generate import generate, load
from elastic.model import loading
from elastic.model.attach import attach
from elastic.model.checkpoint import save_elastic
from tests.helpers.models import small_config, varied_routers
from tests.helpers.server import body_of, events_of, figure, send, until

CLIENTS, LONG = 12, 400
END = "f2"  # the word that ends an answer
BAD = [
    b"",
    b"{",
    b"[]",
    b"\xff\xfe",
    b"null",
    b'{"model": "tiny"}',
    *(
        json.dumps({**body_of("find k1"), **change}).encode()
        for change in (
            {"messages": []},
            {"messages": [{"role": "robot", "content": "a"}]},
            {"messages": [{"role": "user", "content": " "}]},
            {"messages": [{"role": "user", "content": "f1 " * 3000}]},
            {"messages": [{"role": "user", "content": "a\ud800"}]},
            {"temperature": float("nan")},
            {"seed": 2**64},
            {"max_tokens": 0},
            {"max_tokens": 10**9},
            {"stop": ["a"] * 99},
            {"tools": [{}]},
            {"colour": "red"},
        )
    ),
]
KINDS = {  # and how many of a hundred requests
    "whole": 30,
    "stream": 25,
    "slow": 6,
    "unseeded": 5,
    "bad": 16,
    "leaves at once": 6,
    "leaves within": 8,
    "half": 4,
}


@dataclass
class Figures:
    """What a soak found.

    Attributes:
        lost: requests without the answer that they should have had, each with why.
        mixed_up: answers that differ from those of `elastic.generate`, each with both.
        kinds, ends: how often each kind of request and each finish reason came.
        growth_mb: the largest rise of the server's memory within the last half of the requests; it may fall, as batches
            end.
        alone_s, beside_s: a short request's time, alone and beside a long one; medians.
        waited_for_the_long_one: it was answered before they were.
        tracebacks: in the server's log.
        code: exit code after SIGTERM.
    """

    requests: int
    lost: list[str] = field(default_factory=list)
    mixed_up: list[str] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)
    ends: Counter = field(default_factory=Counter)
    seconds: float = 0.0
    rss_mb: list[float] = field(default_factory=list)
    growth_mb: float = 0.0
    alone_s: float = 0.0
    beside_s: float = 0.0
    waited_for_the_long_one: bool = False
    left_running: float = 0.0
    tracebacks: int = 0
    code: int = 0


@dataclass(frozen=True)
class Question:
    """A request whose answer is known."""

    body: dict
    words: list[str]
    reason: str
    msr: float
    prompt_tokens: int
    new_tokens: int

    @classmethod
    def drawn(cls, model, tokenizer, draw):
        words = ("f1", "f3", "f4", "p1", "p2", "3", "5", "8")
        filler = " ".join(draw.choice(words) for _ in range(int(2 ** draw.uniform(1, 9.7))))
        prompt = f"key k{draw.randrange(6)} 1 2 3 {filler} find k{draw.randrange(6)}"
        tokens = draw.choice((1, 2, 8, 30, 80))
        asked = {"max_tokens": tokens}
        if draw.random() < 0.3:
            asked["sparsity_bias"] = draw.choice((-1e4, -1.0, 1.0, 1e4))
        options = {"sparsity_bias": asked.get("sparsity_bias")}
        if draw.random() < 0.4:
            seed = draw.randrange(2**62)
            sampling = {"temperature": draw.choice((0.7, 1.0, 2.0)), "top_p": draw.choice((0.9, 1.0))}
            asked |= {"seed": seed, **sampling}
            torch.manual_seed(seed)
            options |= {"do_sample": True, "top_k": 0, **sampling}
        one = generate(model, tokenizer, prompt, max_new_tokens=tokens, **options)[0]
        ids, text, reason = one.token_ids, one.text, "length"
        new = len(ids)
        if ids[-1] == model.generation_config.eos_token_id:
            text, reason = tokenizer.decode(ids[:-1], skip_special_tokens=True), "stop"
        elif draw.random() < 0.3 and len(text.split()) > 1:
            asked["stop"], reason = draw.choice(text.split()[1:]), "stop"
            begun = (tokenizer.decode(ids[:n], skip_special_tokens=True) for n in range(1, new + 1))
            new, text = next((n, part) for n, part in enumerate(begun, 1) if asked["stop"] in part)
            text = text[: text.find(asked["stop"])]
        return cls(body_of(prompt, **asked), text.split(), reason, one.report.msr, one.report.prompt_tokens, new)

    def differs(self, text, reason, msr, usage):
        """What is not as it should be, or None."""
        found = (text.split(), reason, round(msr, 6), usage)
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.new_tokens}
        counts["total_tokens"] = sum(counts.values())
        expected = (self.words, self.reason, round(self.msr, 6), counts)
        return None if found == expected else f"{self.body}: {found} instead of {expected}"


def backbone(folder):
    """The tiny backbone, whose answers end at one word, and routers that differ between prompts."""
    for file in (loading.ASSETS / "tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    end = loading.load_tokenizer("tiny").convert_tokens_to_ids(END)
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": end}))
    model, _ = loading.load_backbone(str(folder))
    torch.manual_seed(0)
    attach(model, small_config())
    varied_routers(model)
    return save_elastic(folder / "checkpoint", model, str(folder))


@contextmanager
def served(checkpoint, log):
    """Address and process of a server, which ends with the context."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    command = [sys.executable, "-m", "elastic", "serve", "--checkpoint", str(checkpoint), "--port", str(port)]
    command += ["--name", "tiny", "--max-new-tokens", str(LONG)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert until(lambda: _healthy(port), 120), log.read_text()
        yield f"http://127.0.0.1:{port}", process
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()


def _healthy(port):
    try:
        socket.create_connection(("127.0.0.1", port)).close()
        return True
    except OSError:
        return False


class Clients:
    """What the clients of a soak send, and whether the answers are right.

    Args:
        address: of the server.
        questions: whose answers are known.
        figures: where it is written down.
    """

    def __init__(self, address, questions, figures):
        self.address, self.questions, self.figures, self._lock = address, questions, figures, threading.Lock()

    def one(self, number, kind, seed):
        """One request of a kind."""
        draw = random.Random(seed)
        question = draw.choice(self.questions)
        try:
            getattr(self, "_" + kind.replace(" ", "_"))(question, draw)
        except Exception as error:  # noqa: BLE001 - one of the figures
            self._note("lost", f"request {number}, {kind}: {type(error).__name__}: {error}; {question.body}")
        with self._lock:
            self.figures.kinds[kind] += 1

    def _note(self, where, what):
        with self._lock:
            getattr(self.figures, where).append(what)

    def _compare(self, question, *found):
        with self._lock:
            self.figures.ends[found[1]] += 1
        if what := question.differs(*found):
            self._note("mixed_up", what)

    def _call(self, body):
        connection = http.client.HTTPConnection(self.address.removeprefix("http://"), timeout=120)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", "/v1/chat/completions", data, {"content-type": "application/json"})
        return connection.getresponse()

    def _whole(self, question, _draw):
        response = self._call(question.body)
        answer = json.loads(response.read())
        assert response.status == 200, answer
        choice = answer["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        self._compare(question, text, reason, answer["elastic"]["msr"], answer["usage"])

    def _stream(self, question, _draw, pause=0.0):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response, parts = self._call({**question.body, **options}), []
        assert response.status == 200, response.read()
        while part := response.read1(64 if pause else 1 << 16):
            parts.append(part)
            time.sleep(pause)
        *events, done = events_of(b"".join(parts))
        chunks = [json.loads(event) for event in events]
        assert done == "[DONE]", events[-1]
        assert len({chunk["id"] for chunk in chunks}) == 1
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1])
        end = chunks[-2]
        self._compare(question, text, end["choices"][0]["finish_reason"], end["elastic"]["msr"], chunks[-1]["usage"])

    def _slow(self, question, draw):
        self._stream(question, draw, pause=0.01)

    def _unseeded(self, question, _draw):
        body = {**body_of("find k1"), "max_tokens": question.body["max_tokens"], "temperature": 1.0}
        response = self._call(body)
        answer = json.loads(response.read())
        assert response.status == 200 and 1 <= answer["usage"]["completion_tokens"] <= body["max_tokens"], answer

    def _bad(self, _question, draw):
        response = self._call(draw.choice(BAD))
        answer = json.loads(response.read())
        assert response.status == 400 and answer["error"]["message"], answer

    def _leaves_at_once(self, question, draw):
        send(self.address, {**question.body, "stream": draw.random() < 0.5}).close()

    def _leaves_within(self, question, _draw):
        response = self._call({**question.body, "stream": True})
        assert response.status == 200, response.read()
        response.read1(200)
        response.close()

    def _half(self, question, _draw):
        host, port = self.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            head = "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 999\r\n\r\n"
            client.sendall(head.encode() + json.dumps(question.body).encode()[:40])
            time.sleep(0.05)

    def short_ones(self):
        """Seconds of a short request, median of some."""
        took = []
        for _ in range(7):
            started = time.perf_counter()
            self._call(body_of("find k1", max_tokens=1)).read()
            took.append(time.perf_counter() - started)
        return statistics.median(took)


def memory_mb(process):
    """Memory in MB of a server's two processes, without what they share: the second is a fork of the first."""
    (http,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    parts = (Path(f"/proc/{number}/smaps_rollup").read_text() for number in (process.pid, http))
    return sum(int(part.partition("\nPss:")[2].split()[0]) for part in parts) / 1000


def soak(requests, seed=0, different=150):
    """Send so many requests; returns the `Figures`."""
    draw, figures = random.Random(seed), Figures(requests)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        checkpoint, log = backbone(folder), folder / "log"
        model, tokenizer = load(checkpoint)
        questions = [Question.drawn(model, tokenizer, draw) for _ in range(different)]
        prompts = (f"find k{n}" + " f1" * n for n in range(100))
        endless = next(p for p in prompts if len(generate(model, tokenizer, p, LONG)[0].token_ids) == LONG)
        with served(checkpoint, log) as (address, process), ThreadPoolExecutor(CLIENTS) as pool:
            clients, started = Clients(address, questions, figures), time.monotonic()
            kinds = draw.choices(list(KINDS), KINDS.values(), k=requests)
            sent = pool.map(clients.one, range(requests), kinds, [draw.random() for _ in kinds])
            figures.rss_mb = [memory_mb(process) for _ in sent]
            assert until(lambda: figure(address, "elastic_running_requests") == 0, 60)
            figures.seconds = time.monotonic() - started
            figures.left_running = figure(address, "elastic_waiting_requests")
            figures.alone_s = clients.short_ones()
            long_one = send(address, body_of(endless, max_tokens=LONG))
            assert until(lambda: figure(address, "elastic_running_requests") == 1)
            figures.beside_s = clients.short_ones()
            figures.waited_for_the_long_one = bool(select.select([long_one], [], [], 0)[0])
            long_one.close()
        figures.tracebacks, figures.code = log.read_text().count("Traceback"), process.returncode
    last = figures.rss_mb[requests // 2 :]
    figures.growth_mb = max(after - before for before, after in zip(accumulate(last, min), last, strict=True))
    return figures


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    found = vars(soak(**vars(parser.parse_args(argv))))
    found["rss_mb"] = found["rss_mb"][:: max(1, len(found["rss_mb"]) // 20)]
    say(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
