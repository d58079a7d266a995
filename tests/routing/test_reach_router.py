"""Routers by reach alone: the equation, decisions in a model alone and packed, later turns, and what is refused."""

import pytest
import torch

from elastic.config import ElasticConfig, RouterConfig
from elastic.model.attach import at_level, attach, biased, last_features, last_routes, routers
from elastic.model.checkpoint import load_into, save_elastic
from elastic.routing.kinds import build_router
from elastic.routing.reach_router import ReachRouter
from elastic.routing.router import STEEPNESS
from elastic.training.module import ElasticModule
from tests.helpers.models import FAMILIES, left_padded, random_ids, small_config, tiny_model


def by_reach(family="llama"):
    model = attach(tiny_model(family), ElasticConfig(RouterConfig(kind="reach"), small_config().sparse))
    return model.eval()


def test_a_head_runs_sparse_below_half_and_a_bias_moves_the_threshold():
    router = build_router(3, 16, RouterConfig(kind="reach"))
    assert isinstance(router, ReachRouter) and not list(router.parameters())
    reach = torch.tensor([[0.0, 0.5, 0.9], [0.2, 0.45, 1.0]])
    logits = router(router.features(router.with_earlier(reach, reach, None, None), torch.tensor([9, 9]), None))
    torch.testing.assert_close(logits[..., 1], STEEPNESS * (0.5 - reach))
    assert not logits[..., 0].any()


def test_heads_whose_keys_are_dropped_reach_nothing():
    router, reach = build_router(2, 16, RouterConfig(kind="reach")), torch.tensor([[0.9, 0.9]])
    found = router.with_earlier(reach, reach, None, torch.tensor([[True, False]]))
    torch.testing.assert_close(found, torch.tensor([[0.0, 0.9]]))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_decision(family):
    model = by_reach(family)
    ids, mask = left_padded(random_ids(2, 90), [37, 0])
    with torch.no_grad():
        model(ids, attention_mask=mask)
        reach = torch.stack(last_features(model))
        bias = STEEPNESS * (float(reach.min() + reach.max()) / 2 - 0.5)
    with torch.no_grad(), biased(model, bias):
        model(ids, attention_mask=mask)
        together = last_routes(model).route
        for row, padding in enumerate((37, 0)):
            model(ids[row : row + 1, padding:])
            assert torch.equal(last_routes(model).route[:, 0], together[:, row])
    assert 0 < together.mean() < 1


def test_checkpoints_hold_them(tmp_path):
    model = by_reach()
    save_elastic(tmp_path / "reach", model, "tiny")
    again = tiny_model("llama")
    load_into(again, tmp_path / "reach")
    assert all(isinstance(router, ReachRouter) for router in routers(again))


def test_there_is_nothing_to_train_no_order_and_no_level():
    module = ElasticModule(elastic=ElasticConfig(RouterConfig(kind="reach")))
    module.configure_model()
    with pytest.raises(ValueError, match="nothing to learn"):
        module.configure_optimizers()
    with pytest.raises(ValueError, match="no order"):
        routers(module.model)[0].begin_in_order(torch.zeros(2), 0.5)
    with pytest.raises(ValueError, match="kind level"), at_level(module.model, 0.5):
        pass
