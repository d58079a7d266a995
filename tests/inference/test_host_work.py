"""What serving has a GPU's host do: operations by layer of a pass over prompts, and those of rows that come and go."""

from dataclasses import replace

import pytest
import torch

from elastic.attention import routed
from elastic.cache.frame import Frame
from elastic.config import RouterConfig
from elastic.data.prompts import EncodedPrompt
from elastic.inference.generate import route_report
from elastic.inference.stepwise import Asked, begin
from elastic.model.attach import attach
from tests.helpers.models import random_ids, small_config, tiny_model
from tests.helpers.operations import Operations

LENGTHS = (30, 9, 41)


@pytest.fixture(params=[2, 5])
def served(request):
    model = tiny_model(num_hidden_layers=request.param)
    attach(model, replace(small_config(), router=RouterConfig(kind="level"), kv_cache="elastic"))
    return model.eval()


def read(model):
    prompts = [EncodedPrompt.whole(random_ids(1, n, n)[0].tolist()) for n in LENGTHS]
    return begin(model, [Asked(prompt, 20, None, {"do_sample": False}) for prompt in prompts])[2]


def launched(work, *args):
    with Operations() as counted:
        work(*args)
    return counted.launched


@torch.no_grad()
def test_a_layer_costs_a_pass_of_prompts_few_operations(monkeypatch):
    monkeypatch.setattr(routed, "attend", lambda q, *_: torch.zeros_like(q.transpose(1, 2)))  # a kernel's launch
    found = []
    for layers in (4, 8):
        model = tiny_model(num_hidden_layers=layers)
        bare = launched(lambda: model(random_ids(3, 41), use_cache=False))  # noqa: B023
        attach(model, replace(small_config(), router=RouterConfig(kind="level"), kv_cache="elastic"))
        read(model)
        found.append(launched(read, model) - bare)
    assert (found[1] - found[0]) / 4 <= 62  # attention without its kernel among them


@torch.no_grad()
def test_rows_that_leave_or_are_shown_cost_what_one_layer_costs(served):
    cache = read(served)
    cache.settle()
    frame = Frame(cache, [0, 1, 2, 0])
    assert launched(frame.show, cache, [2, 1, 0, 0]) <= 24
    assert launched(cache.keep, [0, 2]) <= 16
    assert launched(frame.show, cache, [0, 1, 0, 0]) <= 24


@torch.no_grad()
def test_rows_that_join_cost_a_layer_the_moves_of_its_keys_and_values(served):
    cache, other = read(served), read(served)
    cache.keep([0])
    other.keep([1])
    assert launched(cache.join, other) <= 32 + 13 * len(cache.routed)  # and to make room for them


@torch.no_grad()
def test_a_report_reads_few_tensors_back(served):
    cache = read(served)
    cache.settle()
    with Operations() as counted:
        route_report(served, cache)
    assert counted.launched <= 60
