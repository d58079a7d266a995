"""Level routers are fitted to measured outcomes: the level at which answers break, the regression, the whole way on the
tiny backbone.
"""

from dataclasses import replace

import pytest
import torch

import elastic
from elastic.commands.calibration_data import build
from elastic.config import RouterConfig, SparseConfig
from elastic.model.attach import routers
from elastic.routing.calibration import LEVELS as LEVELS_OF_FILES
from elastic.routing.level import LevelRouter
from elastic.training.calibration import HeadNeed
from elastic.training.calibration_run import measure
from elastic.training.head_need import OutcomeRound
from elastic.training.level_fit import Outcomes, breaking_level, fit_levels
from elastic.training.partial_results import partial_file
from tests.training.test_calibration import GRADIENT, SPARSE, wanted

LEVELS = (0.0, 0.5, 0.8, 1.0)
SIZES = SparseConfig(sink=128, window=512)
LAYERS, KV_HEADS, SAMPLES = 3, 2, 600


@pytest.mark.parametrize(
    ("kl", "level"),
    [
        ((0.0, 0.001, 0.01, 0.09), 1.0),  # never
        ((0.0, 0.1, 0.2, 0.3), 0.5),
        ((0.0, 0.01, 0.1, 1.0), 0.8),
        ((0.0, 0.01, 1.0, 2.0), 0.65),  # half way in the log
        ((0.0, 0.01, 1.0, 0.02), 0.65),  # what falls again has broken all the same
        ((0.0, 1.0, 1.0, 1.0), 0.375),  # log(0.1 / 1e-4) is 3/4 of the way
    ],
)
def test_an_answer_breaks_where_its_divergence_passes_the_budget(kl, level):
    assert breaking_level(torch.tensor([kl]), LEVELS, 0.1).item() == pytest.approx(level)


def outcomes(noise=0.0, seed=0):
    """Answers that break at 0.9 - 0.5 * (mean reach of the second layer), whatever else their inputs are."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.rand(SAMPLES, LAYERS, 2, KV_HEADS, generator=generator)
    wants = 0.9 - 0.5 * reach[:, 1].mean((1, 2)) + noise * torch.randn(SAMPLES, generator=generator)
    fine = torch.linspace(0, 1, 101)
    kl = 0.1 * torch.exp(20 * (fine - wants[:, None]))
    length = torch.randint(640, 8000, (SAMPLES,), generator=generator)
    return Outcomes(reach, length, kl, fine.tolist(), ["a" if n % 3 else "b" for n in range(SAMPLES)]), wants


def fitted(of, contrast=1.0, order=(4, 0, 2, 5, 1, 3)):
    made = [LevelRouter(KV_HEADS, layer, RouterConfig(kind="level", caution=0.0)) for layer in range(LAYERS)]
    explained = fit_levels(made, order, of, SIZES, contrast)
    return made, explained


def levels_of(router, layer, of):
    features = router.features(of.reach_MLR[:, : layer + 1].flatten(1), of.length_M, SIZES)
    return router.level(features).detach()


def test_the_fit_finds_what_levels_depend_on_once_it_is_seen():
    of, wants = outcomes()
    made, explained = fitted(of)
    assert explained[0] < 0.1 and explained[1] > 0.9 and explained[2] > 0.9
    correlation = torch.corrcoef(torch.stack([levels_of(made[2], 2, of), wants]))[0, 1]
    assert correlation > 0.99
    new, wanted_there = outcomes(seed=1)
    assert torch.corrcoef(torch.stack([levels_of(made[2], 2, new), wanted_there]))[0, 1] > 0.98


def test_contrast_stretches_levels_about_their_mean():
    of, _ = outcomes()
    (plain, _), (stretched, _) = fitted(of), fitted(of, contrast=2.0)
    one, two = (levels_of(made[2], 2, of) for made in (plain, stretched))
    weight = of.weights().float()
    torch.testing.assert_close((one * weight).sum(), (two * weight).sum(), atol=1e-4, rtol=0)
    torch.testing.assert_close(two - (two * weight).sum(), 2 * (one - (one * weight).sum()), atol=1e-4, rtol=0)


def test_order_slope_and_statistics_come_with_it():
    of, _ = outcomes()
    made, _ = fitted(of)
    ranks = torch.cat([router.rank for router in made])
    torch.testing.assert_close(ranks, (torch.tensor([1.0, 4, 2, 5, 0, 3]) + 0.5) / 6)
    for router in made:
        assert router.count.item() == SAMPLES
        assert float(router.slope) == pytest.approx(1 / 20, rel=0.02)  # of d level / d log budget
        assert float(router.fitted_budget) == pytest.approx(0.1)


def test_sources_weigh_the_same():
    weights = outcomes()[0].weights()
    assert float(weights[::3].sum()) == pytest.approx(0.5) and float(weights.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 0, 1, 2, 3, 4)])
def test_an_order_of_other_heads_is_refused(order):
    with pytest.raises(ValueError, match="do not fit 3 layers with 6 KV heads"):
        fitted(outcomes()[0], order=order)


def test_outcomes_of_other_layers_are_refused():
    of, _ = outcomes()
    few = Outcomes(of.reach_MLR[:, :2], of.length_M, of.kl_MJ, of.levels, of.sources)
    with pytest.raises(ValueError, match="outcomes of 2 layers"):
        fitted(few)


def test_from_rows_to_a_model_that_answers(tmp_path):
    rows, _ = build(wanted(level_samples=16))
    module = HeadNeed(
        "tiny", SPARSE, GRADIENT, (rows[0], rows[1]), partial_file(tmp_path / "c.json"), level_rows=rows[2]
    )
    found = measure(module, progress=False)
    of = module.outcomes()
    assert list(of.levels) == [round(6 * level) / 6 for level in LEVELS_OF_FILES]  # the shares of six heads that ran
    assert of.kl_MJ.shape == (len(rows[2].sources), 11) and bool((of.kl_MJ[:, 0] < 1e-6).all())
    assert bool(((of.reach_MLR >= 0) & (of.reach_MLR <= 1 + 1e-6)).all()) and float(of.reach_MLR.max()) > 0.05
    explained = module.fit(budget=0.2)
    assert len(explained) == module.size[0] and all(0 <= share <= 1 for share in explained)
    ranks = torch.cat([router.rank for router in routers(module.model)])
    assert ranks.argsort().tolist() == list(found.order)
    loaded, tokenizer = elastic.load(elastic.save_elastic(tmp_path / "levels", module.model, "tiny"))
    (answer,) = elastic.generate(loaded, tokenizer, "f1 f2 key k1 3 4 5 6 " + "f3 f4 " * 40 + "find k1", 4)
    assert 0 <= answer.report.msr <= 1 and len(answer.token_ids) == 4


@pytest.mark.parametrize("modes", [("full", "xattention"), ("xattention", "streaming")])
def test_other_modes_are_judged_by_what_route_1_adds(modes, tmp_path):
    sparse = replace(SPARSE, route0=modes[0], route1=modes[1], stride=4)
    rows, _ = build(wanted(sparse=sparse, level_samples=8))
    module = HeadNeed(
        "tiny", sparse, GRADIENT, (rows[0], rows[1]), partial_file(tmp_path / "c.json"), level_rows=rows[2]
    )
    measure(module, progress=False)
    measured = module._values(OutcomeRound())[:, : len(LEVELS_OF_FILES)]
    of = module.outcomes()
    torch.testing.assert_close(of.kl_MJ, measured - measured[:, :1])
    assert bool((measured[:, 0] > 1e-4).any()) == (modes[0] == "xattention")
    assert float(of.kl_MJ[:, -1].mean()) > 0.01 and float(of.reach_MLR.max()) > 0.05
    assert all(0 <= share <= 1 for share in module.fit(budget=0.2))


def test_rows_are_needed(tmp_path):
    rows, _ = build(wanted())
    module = HeadNeed("tiny", SPARSE, GRADIENT, (rows[0], rows[1]), partial_file(tmp_path / "x.json"))
    with pytest.raises(ValueError, match="no rows were given to fit level routers to"):
        module.outcomes()
