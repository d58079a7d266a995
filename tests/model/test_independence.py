"""Models of one process, and threads of one model, do not notice each other; detaching leaves nothing."""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from elastic.config import ElasticConfig, RouterConfig
from elastic.model.attach import (
    attach,
    biased,
    detach,
    elastic_config,
    is_attached,
    last_features,
    last_routes,
    override_routes,
    route_of,
    set_config,
)
from elastic.model.compiling import compile_layers
from tests.helpers.models import KV_HEADS, LAYERS, random_ids, small_config, tiny_model, varied_routers

STEPS = ("attach", "compile", "detach")
IDS = random_ids(2, 40)


def take(step: str, model: Any) -> None:
    if step == "attach":
        torch.manual_seed(0)  # of the routers' first layers
        varied_routers(attach(model, small_config()))
    elif step == "compile":
        compile_layers(model, backend="eager")
    else:
        detach(model)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


def solo_runs(seed: int) -> list[Tensor]:
    """Logits after each step of a model that is alone, the stock model's first."""
    torch.compiler.reset()
    model = tiny_model(seed=seed)
    found = [logits_of(model)]
    for step in STEPS:
        take(step, model)
        found.append(logits_of(model))
    return found


@pytest.fixture(scope="module")
def solo() -> list[list[Tensor]]:
    return [solo_runs(0), solo_runs(1)]


def closed_to_the_compiler(model: Any) -> bool:
    function = AttentionInterface().get_interface(model.config._attn_implementation, None)
    return bool(getattr(function, "_torchdynamo_disable", False))


# Places of the first model's steps among those of both; the model that begins is the first.
ORDERS = [(0, *others) for others in itertools.combinations(range(1, 6), 2)]


@pytest.mark.parametrize("first", ORDERS, ids=lambda places: "".join(map(str, places)))
def test_two_models_in_any_order_are_as_each_alone(first: tuple[int, ...], solo: list[list[Tensor]]) -> None:
    """Every interleaving of the three steps of either model; after each step both give the outputs of their solo runs,
    and the attention of a compiled model, of no other, is closed to the compiler.
    """
    torch.compiler.reset()
    models, done = [tiny_model(seed=0), tiny_model(seed=1)], [0, 0]
    for place in range(6):
        who = 0 if place in first else 1
        take(STEPS[done[who]], models[who])
        done[who] += 1
        both = [*zip(models, done, solo, strict=True)]
        for model, steps, wanted in (*both, both[0]):  # after the other as well as before it
            assert torch.equal(logits_of(model), wanted[steps])
            assert closed_to_the_compiler(model) == (steps == 2)


def traces(model: Any) -> dict[str, Any]:
    """What attach and compile touch."""
    return {
        "hooks": {name: len(m._forward_pre_hooks) + len(m._forward_hooks) for name, m in model.named_modules()},
        "with keywords": {name: len(m._forward_pre_hooks_with_kwargs) for name, m in model.named_modules()},
        "forwards": {name: vars(m).get("forward") for name, m in model.named_modules()},
        "trainable": {name: p.requires_grad for name, p in model.named_parameters()},
        "implementation": model.config._attn_implementation,
        "attributes": sorted(vars(model)),
    }


def test_detach_leaves_nothing() -> None:
    attach(tiny_model(), small_config())  # the registry's entries are the process's
    registry = dict(AttentionInterface._global_mapping)
    model = tiny_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    mlp.forward, attention.forward = own_forward(mlp), own_forward(attention)
    before = traces(model)
    for step in STEPS:
        take(step, model)
    assert traces(model) == before
    assert dict(AttentionInterface._global_mapping) == registry


def own_forward(module: Any) -> Callable[..., Any]:
    """A forward that somebody else put on a module."""
    plain = module.forward
    return lambda *args, **kwargs: plain(*args, **kwargs)


def without_mlp(model: Any) -> None:
    del model.model.layers[2].mlp


def with_fused_projections(model: Any) -> None:
    del model.model.layers[2].self_attn.k_proj


def with_a_router(model: Any) -> None:
    model.model.layers[2].self_attn.router = torch.nn.Identity()


@pytest.mark.parametrize("spoil", [without_mlp, with_fused_projections, with_a_router])
def test_attach_that_fails_leaves_the_model_as_it_was(spoil: Callable[[Any], None]) -> None:
    model = tiny_model()
    spoil(model)
    before = traces(model)
    with pytest.raises((AttributeError, ValueError)):
        attach(model, small_config())
    assert traces(model) == before and not is_attached(model)
    routers = [hasattr(layer.self_attn, "router") for layer in model.model.layers]
    assert routers == [False, False, spoil is with_a_router]


def test_a_model_that_keeps_its_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    before = traces(model)
    monkeypatch.setattr(type(model), "set_attn_implementation", lambda *_: None)
    with pytest.raises(ValueError, match="kept attention implementation 'sdpa'"):
        attach(model, small_config())
    assert traces(model) == before


# -- threads


ROUNDS = 80
PATTERN = torch.tensor([[0, 1], [1, 0], [1, 1]])
assert PATTERN.shape == (LAYERS, KV_HEADS)


def settings(model: Any) -> list[Any]:
    """What each thread asks for: biases, routes, both, and nothing."""
    sparser = small_config(window=8).sparse
    return [
        lambda: biased(model, -1e6),
        lambda: biased(model, 1e6),
        lambda: override_routes(model, PATTERN),
        lambda: override_routes(model, 1, sparser),
        lambda: biased(model, None),
    ]


@torch.no_grad()
def prefill(model: Any, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, routes of the pass and of the cache, and the logits of a decode step."""
    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache).logits
    routes = last_routes(model).route
    step = model(ids[:, :1], past_key_values=cache).logits
    return logits, routes, route_of(cache).route.float(), step


@contextmanager
def fast_switching() -> Iterator[None]:
    interval, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(threads)


def in_threads(work: list[Callable[[], None]]) -> None:
    """Run these at the same time; an error of any of them is raised here."""
    start, errors = threading.Barrier(len(work)), []

    def run(call: Callable[[], None]) -> None:
        start.wait()
        try:
            call()
        except Exception as error:  # noqa: BLE001 - handed to the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in work]
    with fast_switching():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def test_threads_of_one_model_are_as_each_alone() -> None:
    model = attach(tiny_model(), small_config())
    varied_routers(model)
    config, ids = elastic_config(model), [random_ids(1, 24, seed=seed) for seed in range(5)]
    with fast_switching():
        wanted = []
        for asked, own in zip(settings(model), ids, strict=True):
            with asked():
                wanted.append(prefill(model, own))
    assert len({tuple(routes.flatten().tolist()) for _, routes, _, _ in wanted}) >= 4, (
        "threads ask for different routes"
    )
    wrong = dict.fromkeys(range(5), 0)

    def work(who: int) -> None:
        for _ in range(ROUNDS):
            with settings(model)[who]():
                found = prefill(model, ids[who])
            wrong[who] += not all(torch.equal(a, b) for a, b in zip(found, wanted[who], strict=True))

    in_threads([lambda who=who: work(who) for who in range(5)])  # type: ignore[misc]
    assert sum(wrong.values()) == 0, f"{wrong} of {ROUNDS} prefills by thread"
    assert elastic_config(model) == config


def test_training_threads_keep_their_own_routes_through_checkpointing() -> None:
    """Routers in training mode under an override; layers run again in the backward pass."""
    model = attach(tiny_model(), small_config()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, wrong = random_ids(1, 24), []

    def work(route: int) -> None:
        for _ in range(20):
            with override_routes(model, route):
                loss = model(ids, use_cache=False).logits.square().mean()
            loss.requires_grad_().backward()
            wrong.extend([route] * (not bool((last_routes(model).route == route).all())))

    in_threads([lambda: work(0), lambda: work(1)])
    assert not wrong, f"{len(wrong)} of 40"


def test_what_a_thread_forces_ends_with_its_context() -> None:
    """Contexts nest; another thread sees the model's own; an error inside undoes them too."""
    model = attach(tiny_model(), small_config())
    own, sparser, seen = elastic_config(model), small_config(window=8).sparse, []
    with biased(model, 2.0), override_routes(model, 1, sparser):
        with biased(model, None), override_routes(model, 0):
            assert (elastic_config(model).sparsity_bias, elastic_config(model).sparse) == (2.0, sparser)
            in_threads([lambda: seen.append(elastic_config(model))])
        with pytest.raises(ValueError, match="leave that context first"):
            set_config(model, elastic_config(model))
    with pytest.raises(KeyError), biased(model, 1.0):
        raise KeyError
    assert seen == [own] and elastic_config(model) is own


def test_two_models_are_forced_one_by_one() -> None:
    one, two = (attach(tiny_model(), ElasticConfig(RouterConfig(pool_tokens=8))) for _ in range(2))
    with biased(one, 1e6), torch.no_grad():
        for model in (one, two):
            model(IDS, use_cache=False)
    assert last_routes(one).route.min() == 1.0 and last_routes(two).route.max() == 0.0
    assert [features.shape for features in last_features(one)] == [(2, KV_HEADS, 16)] * LAYERS
