"""Which waiting requests begin, and which are read in one pass; answers are those of the prompt alone."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.cache.elastic_cache import STEP
from elastic.data.prompts import EncodedPrompt
from elastic.inference.generate import generate
from elastic.inference.serving import admission, engine
from elastic.inference.serving.admission import TOGETHER, Admission
from elastic.inference.serving.app import ServerLimits
from elastic.inference.serving.jobs import Job, Sampling
from elastic.inference.serving.metrics import Metrics
from elastic.inference.serving.rows import Row
from tests.helpers.models import varied_routers
from tests.helpers.replay import replayed
from tests.helpers.server import ask, body_of, figure, serving, tiny_model, until

__all__ = ["replayed"]


@pytest.fixture(scope="module")
def model():
    model, tokenizer = tiny_model()
    varied_routers(model)
    return model, tokenizer


def job(tokens, limit=8, **sampling):
    return Job(EncodedPrompt.whole([3] * tokens), limit, Sampling(**sampling), (), time.monotonic() + 60, print)


def lengths(chosen):
    return [len(one.prompt) for one in chosen]


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        ([job(100), job(90), job(110)], [100, 90, 110]),
        ([job(100), job(10), job(110)], [100, 110]),  # the second would be padding for the most part
        ([job(100), job(100, seed=1), job(100)], [100, 100]),
        ([job(100, seed=1), job(100)], [100]),
        ([job(100), job(100, sparsity_bias=1.0)], [100]),
        ([job(100, sparsity_bias=1.0), job(99, sparsity_bias=1.0)], [100, 99]),
        ([job(100, temperature=0.5), job(100)], [100, 100]),
        ([job(TOGETHER // 2), job(TOGETHER // 2), job(TOGETHER // 2)], [TOGETHER // 2] * 2),
        ([job(TOGETHER + 1), job(TOGETHER + 1)], [TOGETHER + 1]),
    ],
)
def test_prompts_that_are_alike_are_read_together(model, waiting, expected):
    assert lengths(Admission(model[0], 8, 10**15).choose(waiting, 0, 0, math.inf)) == expected


def test_others_begin_within_a_pause_only_if_they_are_short(model):
    chosen = Admission(model[0], 8, 10**15).choose([job(100), job(40), job(41), job(50)], 0, 0, 40)
    assert lengths(chosen) == [40]


def test_nobody_begins_within_a_pass_that_a_gpu_hides(model):
    """Launching a pass of their own would take as long as the one that they wait for."""
    layers, own = len(model[0].get_decoder().layers), Admission(model[0], 8, 10**15)
    reading = [job(100), job(40)]
    assert own.meanwhile(reading) == 100 / layers
    for own.hidden, expected in ((199, 100 / layers), (200, 0)):
        assert own.meanwhile(reading) == expected
        assert len(own.choose([job(1)], 2, 0, own.meanwhile(reading))) == (expected > 0)
    own.hidden = 10**9  # but attention alone takes its time where prompts are long
    assert (own.meanwhile([job(TOGETHER)]), own.meanwhile([job(TOGETHER + 1)])) == (0, (TOGETHER + 1) / layers)


def test_prompts_on_both_sides_of_a_change_of_rope_are_read_apart(model, monkeypatch):
    monkeypatch.setattr(admission, "switch_lengths", lambda _: (95,))
    chosen = Admission(model[0], 8, 10**15).choose([job(90), job(100), job(94)], 0, 0, math.inf)
    assert lengths(chosen) == [90, 94]


def test_prompts_longer_than_a_piece_are_read_alone(model):
    """Read in pieces together, which of a prompt's tokens attend in full would depend on the others."""
    waiting = [job(100), job(100), job(90)]
    assert len(Admission(model[0], 8, 10**15, piece=100).choose(waiting, 0, 0, math.inf)) == 3
    assert len(Admission(model[0], 8, 10**15, piece=99).choose(waiting, 0, 0, math.inf)) == 1


def test_as_many_begin_as_there_are_places_and_room(model):
    waiting, each = [job(100) for _ in range(5)], Admission(model[0], 1, 0).bytes_of(job(100))
    assert each == STEP * 2 * 3 * 2 * 32 * 4  # keys and values, layers, heads, numbers, bytes
    for places, room, running, held, expected in (
        (8, 3 * each, 0, 0, 3), (2, 3 * each, 0, 0, 2), (8, 3 * each, 2, 2 * each, 1), (8, 3 * each, 1, each + 1, 1),
        (8, 0, 0, 0, 1), (8, 0, 1, 0, 0), (4, 9 * each, 4, 0, 0), (8, 3 * each, 3, 3 * each, 0),
    ):  # fmt: skip
        assert len(Admission(model[0], places, room).choose(waiting, running, held, math.inf)) == expected
    large = job(3 * STEP)  # is not overtaken by one that would fit
    assert Admission(model[0], 8, 3 * each).choose([large, job(100)], 1, each, math.inf) == []


def test_padding_that_a_gpu_hides_is_allowed(model):
    chooser = Admission(model[0], 8, 10**15)
    assert chooser.hidden == 0
    waiting = [job(100), job(10), job(1000)]  # 2000 with the second's padding
    ways = ((0, [100]), (89, [100]), (90, [100, 10]), (900, [100, 10]), (1890, [100, 10, 1000]))
    for chooser.hidden, expected in ways:
        assert lengths(chooser.choose(waiting, 0, 0, math.inf)) == expected


def test_running_answers_get_as_much_time_as_prompts_and_what_comes_meanwhile_is_read_at_once(model, monkeypatch):
    passes, reading = Passes(monkeypatch), 0.8
    passes.go.set()
    begin, take = engine.begin, Row.take
    monkeypatch.setattr(engine, "begin", lambda *asked: (time.sleep(reading), begin(*asked))[1])
    monkeypatch.setattr(Row, "take", lambda *row: (time.sleep(0.02), take(*row))[1])  # so that one outlasts the rest
    with serving(model, ServerLimits(max_new_tokens=2000)) as address, ThreadPoolExecutor(4) as pool:
        long = pool.submit(ask, address, body_of(PROMPTS[0], max_tokens=220))
        assert until(lambda: figure(address, "elastic_running_requests") == 1)
        time.sleep(reading)  # what the first prompt took is given back
        begun = time.monotonic()
        answers = [pool.submit(ask, address, body_of(PROMPTS[1], max_tokens=2))]
        assert until(lambda: len(passes.sizes) == 2)
        answers.append(pool.submit(ask, address, body_of(PROMPTS[2], max_tokens=2)))
        answers.append(pool.submit(ask, address, body_of(PROMPTS[3], max_tokens=2)))
        assert [answer.result()[0] for answer in answers] == [200] * 3
        assert time.monotonic() - begun >= 3 * reading
        assert long.result()[0] == 200
    assert passes.sizes == [1, 1, 2]


def test_nobody_rests_from_a_prompt_that_no_answer_waited_for(model, monkeypatch):
    reading, begin, take = 2.0, engine.begin, Row.take

    def slow(model, asked, *how):
        time.sleep(reading * (len(asked[0].prompt) > 100))
        return begin(model, asked, *how)

    monkeypatch.setattr(engine, "begin", slow)
    monkeypatch.setattr(Row, "take", lambda *row: (time.sleep(0.01), take(*row))[1])
    with serving(model, ServerLimits(max_new_tokens=2000)) as address, ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, address, body_of("f1 f3 " * 100 + "find k1", max_tokens=300))
        assert until(lambda: figure(address, "elastic_batch_size_count") > 3)
        begun = time.monotonic()
        assert ask(address, body_of(PROMPTS[0], max_tokens=1))[0] == 200
        assert time.monotonic() - begun < reading / 2 and not long.done()
        assert long.result()[0] == 200


def test_every_answer_holds_the_memory_of_its_own_limit(model):
    """Also where prompts are read together, one of which may be answered at length."""
    own = engine.Engine(*model, max_batch=8, max_queue=8, metrics=Metrics())
    jobs = [job(100, limit) for limit in (8, 3 * STEP, 8)]
    batch = own._read(jobs)
    assert [row.held for row in batch.rows] == [own._admission.bytes_of(one) for one in jobs]
    assert batch.rows[1].held == 4 * batch.rows[0].held and own.close(10)


def test_free_memory_is_that_of_the_device(monkeypatch):
    assert 0 < admission.free_bytes(SimpleNamespace(type="cpu")) < 2**50
    monkeypatch.setattr(admission.torch.cuda, "mem_get_info", lambda device: (7, 9))
    assert admission.free_bytes(SimpleNamespace(type="cuda")) == 7


class Passes:
    """How many prompts each pass has read. The first is held until `go`; where `fails`, no pass reads several."""

    def __init__(self, monkeypatch, fails=False):
        self.sizes, self.go, begin = [], threading.Event(), engine.begin

        def watched(model, asked, *how):
            self.sizes.append(len(asked))
            assert self.go.wait(30)
            if fails and len(asked) > 1:
                raise MemoryError("too many")
            return begin(model, asked, *how)

        monkeypatch.setattr(engine, "begin", watched)


PROMPTS = [f"key k{n % 4} 1 2 {n % 6} 4 " + "f1 f2 " * n + f"find k{n % 4}" for n in range(8, 14)]


def answers_of(model, address, passes, waiting, **more):
    """Those of one prompt, and of others that wait while it is read."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        first = pool.submit(ask, address, body_of(PROMPTS[0], max_tokens=9, **more))
        assert until(lambda: passes.sizes == [1])
        others = [pool.submit(ask, address, body_of(prompt, max_tokens=9, **more)) for prompt in PROMPTS[1:]]
        assert until(lambda: figure(address, "elastic_waiting_requests") == waiting)
        passes.go.set()
        return [(prompt, *asked.result()) for prompt, asked in zip(PROMPTS, [first, *others], strict=True)]


@pytest.mark.parametrize("fails", [False, True])
def test_what_waits_is_read_in_one_pass_or_one_by_one_where_that_fails(model, monkeypatch, fails):
    passes = Passes(monkeypatch, fails)
    with serving(model, max_batch=8) as address:
        for prompt, status, answer in answers_of(model, address, passes, len(PROMPTS) - 1):
            expected = generate(*model, prompt, max_new_tokens=9)[0]
            assert status == 200 and answer["choices"][0]["message"]["content"].split() == expected.text.split()
            assert answer["elastic"]["msr"] == pytest.approx(expected.report.msr)
        assert figure(address, "elastic_running_requests") == 0
    assert passes.sizes == ([1, 5, 1, 1, 1, 1, 1] if fails else [1, 5])


def test_no_more_begin_than_memory_holds(model, monkeypatch):
    each, passes = Admission(model[0], 1, 0).bytes_of(job(100)), Passes(monkeypatch)
    monkeypatch.setattr(admission, "free_bytes", lambda _: 4 * each)  # half of which is for keys and values
    with serving(model, max_batch=8) as address:
        found = answers_of(model, address, passes, len(PROMPTS) - 1)
        assert [status for _, status, _ in found] == [200] * len(PROMPTS)
        assert figure(address, 'elastic_batch_size_bucket{le="2.0"}') == figure(address, "elastic_batch_size_count") > 0
    assert max(passes.sizes) <= 2


def test_answers_over_graphs_are_those_of_each_prompt_alone(model, replayed):
    lengths = [30, 3, 17, 24, 9, 40] * 2
    questions = [(prompt, length) for prompt, length in zip([*PROMPTS, *PROMPTS], lengths, strict=True)]
    more = [{}, {}, {"sparsity_bias": 2.0}] * 4
    expected = [
        generate(*model, prompt, max_new_tokens=length, **one)[0].text.split()
        for (prompt, length), one in zip(questions, more, strict=True)
    ]
    bodies = [body_of(prompt, max_tokens=n, **one) for (prompt, n), one in zip(questions, more, strict=True)]
    with serving(model, max_batch=3) as address, ThreadPoolExecutor(5) as pool:
        for _ in range(2):
            answers = [answer for _, answer in pool.map(lambda body: ask(address, body), bodies)]
            assert [answer["choices"][0]["message"]["content"].split() for answer in answers] == expected
        assert figure(address, "elastic_batch_size_count") > 60  # steps
    assert 0 < replayed.captured <= len(questions)  # half of the answers that came and went
