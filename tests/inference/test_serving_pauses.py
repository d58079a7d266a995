"""A long prompt is read in one pass, but not at a stretch: others are answered meanwhile, and it can be given up."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from elastic.inference.generate import generate
from elastic.inference.serving.app import ServerLimits
from tests.helpers.models import varied_routers
from tests.helpers.server import ask, body_of, figure, send, serving, tiny_model, until

LAYER = 0.8  # seconds that a layer takes for a long prompt
LONG = "f1 f3 " * 300 + "find k1"


@pytest.fixture(scope="module")
def model():
    model, tokenizer = tiny_model()
    varied_routers(model)
    return model, tokenizer


@pytest.fixture
def read(model):
    """Layers that a long prompt has been read by; each takes its time."""
    layers = []

    def slow(_module, args):
        if args[0].shape[1] > 300:
            time.sleep(LAYER)
            layers.append(1)

    hooks = [layer.register_forward_pre_hook(slow) for layer in model[0].get_decoder().layers]
    yield layers
    for hook in hooks:
        hook.remove()


def compare(answer, one):
    assert answer["choices"][0]["message"]["content"].split() == one.text.split()
    assert answer["elastic"]["msr"] == pytest.approx(one.report.msr)


def test_short_requests_are_answered_while_a_long_prompt_is_read(model, read):
    short, long = (generate(*model, text, max_new_tokens=6)[0] for text in ("find k1", LONG))
    whole = generate(*model, LONG, max_new_tokens=6, sparsity_bias=-1e4)[0]
    assert whole.report.msr == 0 < short.report.msr
    for bias, expected in ((-1e4, whole), (None, long)):
        read.clear()
        with serving(model) as address, ThreadPoolExecutor(1) as pool:
            more = {} if bias is None else {"sparsity_bias": bias}
            asked = pool.submit(ask, address, body_of(LONG, max_tokens=6, **more))
            assert until(lambda: len(read) == 1)
            answer = ask(address, body_of("find k1", max_tokens=6))[1]
            assert not asked.done()
            compare(answer, short)  # whatever is forced on the long prompt's pass
            compare(asked.result()[1], expected)


def test_running_answers_go_on_while_a_long_prompt_is_read(model, read):
    with serving(model, ServerLimits(max_new_tokens=150)) as address, ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, address, body_of("find k2", max_tokens=150))
        assert until(lambda: figure(address, "elastic_running_requests") == 1)
        asked = pool.submit(ask, address, body_of(LONG, max_tokens=2))
        assert until(lambda: len(read) == 1)
        before = figure(address, "elastic_batch_size_count")
        assert until(lambda: len(read) == 2) and not asked.done()  # the last layer is still to come
        assert figure(address, "elastic_batch_size_count") > before + 5
        compare(running.result()[1], generate(*model, "find k2", max_new_tokens=150)[0])
        assert asked.result()[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_whose_client_has_left_is_read_no_further(model, read, stream):
    with serving(model) as address:
        client = send(address, body_of(LONG, max_tokens=2, stream=stream))
        assert until(lambda: len(read) == 1)
        client.close()
        assert until(lambda: figure(address, "elastic_running_requests") == 0, 5)
        assert len(read) < 3
        assert ask(address, body_of("find k1", max_tokens=2))[0] == 200


def test_time_that_is_up_ends_the_reading(model, read):
    with serving(model, ServerLimits(timeout=LAYER * 1.2)) as address:
        status, answer = ask(address, body_of(LONG, max_tokens=2))
        assert status == 504 and "while its prompt was read" in json.dumps(answer)
        assert len(read) < 3


def test_no_more_are_answered_at_a_time_than_there_are_places(model, read):
    with serving(model, max_batch=1) as address, ThreadPoolExecutor(2) as pool:
        asked = pool.submit(ask, address, body_of(LONG, max_tokens=2))
        assert until(lambda: len(read) == 1)
        assert ask(address, body_of("find k1", max_tokens=2))[0] == 200
        assert asked.done() and len(read) == 3
