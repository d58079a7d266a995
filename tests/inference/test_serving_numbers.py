"""Numbers at the edge of floats are answered as their limit is, or refused by name; none reaches the sampler."""

import json

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from tests.helpers.server import ask, body_of, post


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-45, 1e-38, 1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("top_p", [5e-324, 1.0])
def test_next_to_no_temperature_is_greedy(server, temperature, top_p):
    expected = ask(server, body_of("find k1", max_tokens=6))[1]["choices"][0]["message"]["content"]
    status, answer = ask(server, body_of("find k1", max_tokens=6, temperature=temperature, top_p=top_p, seed=3))
    assert status == 200 and answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("change", [{"top_p": 5e-324}, {"temperature": 2.0, "top_p": 1e-45}, {"top_p": 1 - 1e-16}])
def test_shares_at_their_edges_are_served(server, change):
    body = body_of("find k1", **{"max_tokens": 3, "temperature": 1.0, "sparsity_bias": 1e6, **change})
    status, answer = ask(server, body)
    assert status == 200 and answer["elastic"]["msr"] == 1.0


@pytest.mark.parametrize("name", ["temperature", "top_p", "sparsity_bias"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1e999", "1" + "0" * 400])
def test_numbers_that_are_none_are_refused_by_name(server, name, number):
    body = json.dumps(body_of("find k1", max_tokens=2, **{name: 12345})).replace("12345", number)
    status, answer = post(server, None, raw=body.encode())
    assert status == 400 and name in json.loads(answer)["error"]["message"]
