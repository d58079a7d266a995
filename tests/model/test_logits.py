"""Logits of final hidden states, which losses and scores make by themselves, are the model's own in every family."""

import pytest
import torch
from torch.nn import functional as F

from elastic.model.logits import logit_head
from elastic.training.losses import chunked_cross_entropy
from tests.helpers.models import FAMILIES, random_ids, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_logit_head_makes_the_models_logits(family):
    model, ids = tiny_model(family), random_ids(2, 30)
    hidden = model.get_decoder()(ids).last_hidden_state
    assert torch.equal(logit_head(model)(hidden), model(ids).logits)


@pytest.mark.parametrize("changes", [{}, {"logits_scaling": 8.0}])
@torch.no_grad()
def test_a_loss_is_that_of_the_models_logits(changes):
    model, ids = tiny_model("granite", **changes), random_ids(1, 30)
    hidden = model.get_decoder()(ids).last_hidden_state
    expected = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(chunked_cross_entropy(hidden, logit_head(model), ids, 7), expected)
