"""Routers that follow an order: same routes as `override_routes`, a bias that moves along the order, checkpoints."""

import pytest
import torch

import elastic
from elastic.config import ElasticConfig, RouterConfig
from elastic.model.attach import attach, biased, last_routes, override_routes, routers
from elastic.model.ordered_routers import attach_static, begin_in_order
from elastic.routing.calibration import first_heads
from elastic.training.module import ElasticModule
from tests.helpers.models import KV_HEADS, LAYERS, random_ids, small_config, tiny_model

HEADS = LAYERS * KV_HEADS
ORDER = [4, 1, 0, 5, 3, 2]
KINDS = {
    "static": RouterConfig(kind="static"),
    "level": RouterConfig(kind="level"),
    "paper": RouterConfig(pool_tokens=8, head_offset=True),
}
STATIC = ElasticConfig(KINDS["static"], small_config().sparse)


@torch.no_grad()
def routes_of(model):
    model(random_ids(2, 40))
    return last_routes(model).route


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("msr", [0, 1 / 6, 0.5, 0.8, 1])
def test_the_first_heads_of_the_order_run_sparse(msr, kind):
    model = begin_in_order(attach(tiny_model(), ElasticConfig(KINDS[kind], small_config().sparse)), ORDER, msr)
    wanted = first_heads(ORDER, msr, LAYERS, KV_HEADS)
    assert torch.equal(routes_of(model), wanted[:, None].expand(-1, 2, -1))
    with torch.no_grad():
        own = model(random_ids(2, 40)).logits
        with override_routes(model, wanted):
            assert torch.equal(own, model(random_ids(2, 40)).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bias_moves_the_level_along_the_order(kind):
    model = begin_in_order(attach(tiny_model(), ElasticConfig(KINDS[kind], small_config().sparse)), ORDER, 0.5)
    for bias, heads in ((-100, 0), (-10 / 6, 2), (0, 3), (10 / 6, 4), (20 / 6, 5), (100, 6)):
        with biased(model, bias):
            expected = first_heads(ORDER, heads / HEADS, LAYERS, KV_HEADS)
            assert torch.equal(routes_of(model)[:, 0], expected)


def test_what_does_not_fit_is_refused():
    model = attach(tiny_model(), STATIC)
    with pytest.raises(ValueError, match="has 5 entries; expected each of the 6 heads"):
        begin_in_order(model, ORDER[:5], 0.5)
    with pytest.raises(ValueError, match=r"msr=1.5 is not a share"):
        begin_in_order(model, ORDER, 1.5)
    with pytest.raises(ValueError, match=r"by offsets of their heads; set router.head_offset"):
        begin_in_order(attach(tiny_model(), small_config()), ORDER, 0.5)


def test_a_pattern_file_becomes_routers(tmp_path):
    file = tmp_path / "heads.tsv"
    file.write_text("0.9 0.1\n0.2 0.6\n0.3 0.8\n")
    model = attach_static(tiny_model(), file, None, small_config().sparse)
    assert routes_of(model)[:, 0].tolist() == [[0, 1], [1, 0], [1, 0]]
    model = attach_static(tiny_model(), file, 1 / 3, small_config().sparse)
    assert routes_of(model)[:, 0].tolist() == [[0, 1], [1, 0], [0, 0]]
    stock = tiny_model(num_hidden_layers=2)
    with pytest.raises(ValueError, match="needs 2 lines"):
        attach_static(stock, file, 0.5, small_config().sparse)
    attach(stock)  # it was left as it was


def test_static_routers_are_saved_and_loaded(tmp_path):
    model, _ = elastic.model.loading.load_backbone("tiny")
    begin_in_order(attach(model, STATIC), ORDER, 0.5)
    path = elastic.save_elastic(tmp_path / "made", model, "tiny")
    again, tokenizer = elastic.load(path)
    for one, two in zip(routers(model), routers(again), strict=True):
        assert torch.equal(one.logits, two.logits)
    for kind in ("full", "elastic"):
        (answer,) = elastic.generate(again, tokenizer, "f1 " * 60, max_new_tokens=3, kv_cache=kind)
        assert answer.report.msr == 0.5 and answer.report.kv_cache == kind


@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_in_the_order(kind, tmp_path):
    """`model.routers: static:<file>@<msr>` of `elastic fit`."""
    file = tmp_path / "heads.tsv"
    file.write_text("0.9 0.1\n0.2 0.6\n0.3 0.8\n")
    module = ElasticModule("tiny", ElasticConfig(KINDS[kind], small_config().sparse), routers=f"static:{file}@0.5")
    module.configure_model()
    module.model.eval()
    with torch.no_grad():
        module.model(random_ids(1, 40) % 40)
    assert last_routes(module.model).route[:, 0].tolist() == [[0, 1], [1, 0], [1, 0]]


def test_training_from_an_order_that_is_not_there(tmp_path):
    module = ElasticModule("tiny", STATIC, routers=f"static:{tmp_path}/none.json@0.5")
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        module.configure_model()
