"""Random uses of tiny models against a reference in fp64: equal, or refused by name, never silently different.

These are the first cases of every family; `python -m tests.robustness.run_case all 500` runs more.
"""

from collections import Counter
from dataclasses import replace

import pytest

from elastic.attention import torch_path
from elastic.model import layer_hooks
from elastic.routing.pooling import Pooling
from elastic.visibility import visible
from tests.helpers.models import FAMILIES
from tests.robustness.run_case import outcome

CASES = 25


@pytest.mark.filterwarnings("ignore")  # of transformers, about right padding
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_or_refused(family):
    found = {number: outcome(family, number) for number in range(CASES)}
    assert not {number: what for number, what in found.items() if what.startswith("DIFFERENT")}
    assert Counter(found.values())["equal"] > CASES / 2


def narrow(position, key, **sizes):
    return visible(position, key, **{**sizes, "window": sizes["window"] - 1})


def shifted(layout, *arguments):
    pooling = Pooling.of(layout, *arguments)
    return replace(pooling, token_M=pooling.token_M.roll(1))


FAULTS = {
    "a key too few": (torch_path, "visible", narrow),
    "pooling one token off": (Pooling, "shared", shifted),
    "no padding": (layer_hooks, "plain_mask", lambda _mask: None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_seen(fault, monkeypatch):
    where, name, replacement = FAULTS[fault]
    monkeypatch.setattr(where, name, replacement)
    assert any(outcome("llama", number).startswith("DIFFERENT") for number in range(CASES))
