"""What follows from measurements of single samples: means by source, rounds of random routes, rounds of ablation."""

import torch

from elastic.routing.calibration import LEVELS
from elastic.training.head_need import (
    AblationRound,
    CurveRound,
    GradientRound,
    Ranking,
    balanced,
    in_context,
    mean_over_sources,
    need_of_gradients,
    source_means,
)

SIZE = (2, 3)
SOURCES = ["b", "a", "b", "b"]


def test_every_source_counts_the_same():
    values = torch.tensor([[3.0], [10.0], [6.0], [9.0]])
    assert {name: mean.tolist() for name, mean in source_means(values, SOURCES).items()} == {"a": [10.0], "b": [6.0]}
    assert mean_over_sources(values, SOURCES).tolist() == [8.0]


class Parabola:
    """A model whose KL is sum_h need_h r_h^2 + 0.1 r_0 r_1, for every sample."""

    need = torch.tensor([0.5, 0.02, 0.3, 0.0, 0.1, 0.04])

    def kl(self, route):
        flat = route.flatten(-2)
        return (self.need * flat**2).sum(-1) + 0.1 * flat[..., 0] * flat[..., 1]

    def divergences(self, routes_CLK):
        return self.kl(routes_CLK).expand(4, -1)

    def gradients(self, routes_NDLK):
        route = routes_NDLK.clone().requires_grad_()
        return torch.autograd.grad(self.kl(route).sum(), route)[0]


def after(rounds, sources):
    known = Ranking.unknown(6)
    for of in rounds:
        routes = of.routes(known, SIZE, sources)
        known = of.learn(known, routes, of.measure(Parabola(), routes, slice(None)), sources)
    return known


def test_the_trapezoid_of_gradients_is_exact_for_a_parabola():
    sources = ["a"] * 20
    order, need = after([GradientRound("random", (0.5,), 0, 0)], sources)
    torch.testing.assert_close(need[2:].float(), Parabola.need[2:])
    assert torch.allclose(need[:2].float(), Parabola.need[:2] + 0.05, atol=0.06), "and half of what they share"
    assert order == [3, 5, 1, 4, 2, 0]
    order, need = after([GradientRound("random", (0.5,), 0, 0), GradientRound("in context", None, 2, 1)], sources)
    assert order == [3, 1, 5, 4, 2, 0], "beside head 0, which seldom runs sparse there, head 1 is cheap"


def test_means_are_over_the_sources_that_have_such_draws():
    gradient = torch.tensor([[[1.0, 4.0]], [[3.0, 8.0]], [[2.0, 9.0]]])
    route = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]], [[0.0, 1.0]]])
    assert need_of_gradients(gradient, route, ["a", "a", "a"]).tolist() == [(1.5 + 3) / 2, 7.0]
    assert need_of_gradients(gradient, route, ["a", "a", "b"]).tolist() == [(1.5 + 3) / 2, 7.5]
    assert need_of_gradients(gradient, route, ["a", "b", "b"]).tolist() == [(1.5 + 3) / 2, (4 + 8.5) / 2]


def test_ablation_measures_the_rest_beside_the_cheap_heads():
    rounds = [AblationRound("beside 0", 0.0), AblationRound("beside 0.5", 0.5)]
    known = after(rounds[:1], ["a"] * 4)
    torch.testing.assert_close(known.need_T.float(), Parabola.need)
    assert known.order == [3, 1, 5, 4, 2, 0]
    routes = rounds[1].routes(known, SIZE, [])
    assert routes.flatten(1).tolist() == [
        [0, 1, 0, 1, 0, 1], [1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1],
    ]  # fmt: skip
    order, need = after(rounds, ["a"] * 4)
    assert order == [3, 1, 5, 4, 2, 0]
    torch.testing.assert_close(need.float(), Parabola.need + torch.tensor([0.1, 0, 0, 0, 0, 0]))


def test_the_curve_follows_the_order():
    known = Ranking([3, 1, 5, 4, 2, 0], torch.zeros(6))
    routes = CurveRound().routes(known, SIZE, [])
    assert routes.shape == (len(LEVELS), *SIZE)
    assert [int(route.sum()) for route in routes] == [round(6 * level) for level in LEVELS]
    assert routes[LEVELS.index(0.25)].flatten().tolist() == [0, 1, 0, 1, 0, 0]
    assert CurveRound().learn(known, routes, torch.zeros(1, len(LEVELS)), ["a"]) is known


def test_random_routes_are_balanced_within_each_source():
    sources = ["a"] * 40 + ["b"] * 20
    share = torch.tensor([0.1, 0.35, 0.65, 0.5])
    route = balanced(share, sources, 0)
    assert route[:40].sum(0).tolist() == [4, 14, 26, 20] and route[40:].sum(0).tolist() == [2, 7, 13, 10]
    assert torch.equal(route, balanced(share, sources, 0)) and not torch.equal(route, balanced(share, sources, 1))
    few = torch.stack([balanced(share, ["a", "b"], seed) for seed in range(400)])
    (
        torch.testing.assert_close(few.mean((0, 1)), share, atol=0.05, rtol=0),
        "shares hold where they are below one sample",
    )
    assert torch.corrcoef(balanced(torch.full((6,), 0.5), ["a"] * 2000, 0).T).fill_diagonal_(0).abs().max() < 0.1


def test_cheap_heads_mostly_run_sparse_in_context():
    order = list(range(100))[::-1]
    share = in_context(order)[order]
    assert torch.allclose(share[:50], torch.tensor(0.8)) and torch.allclose(share[85:], torch.tensor(0.1))
    assert (share.diff() <= 0).all() and 0.1 < share[70] < 0.8


def test_rounds_of_random_routes():
    known, sources = Ranking([3, 1, 5, 4, 2, 0], torch.zeros(6)), ["a"] * 100
    routes = GradientRound("random", (0.1, 0.35), 0, 0).routes(known, SIZE, sources)
    assert routes.shape == (100, 2, *SIZE)
    assert torch.equal(routes.mean(0).flatten(1), torch.tensor([0.1, 0.35])[:, None].expand(-1, 6))
    routes = GradientRound("in context", None, 2, 0).routes(known, SIZE, sources)
    assert routes.shape == (100, 2, *SIZE) and not torch.equal(routes[:, 0], routes[:, 1])
    assert routes.mean((0, 1)).flatten()[[3, 0]].tolist() == torch.tensor([0.8, 0.1]).tolist()
