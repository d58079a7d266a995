"""What training must never hold: logits of a whole row, or activations that gradient checkpointing gives up."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from elastic.model.attach import attach, last_routes, routers
from elastic.training.losses import chunked_cross_entropy, chunked_divergence, labelled_positions
from tests.helpers.alive import Alive
from tests.helpers.models import VOCAB, random_ids, small_config, tiny_model, varied_routers

LENGTH, PROMPT, CHUNK, HIDDEN = 80, 24, 8, 64


class Widest(TorchDispatchMode):
    """Largest number of rows of any tensor over the vocabulary that an operator makes, backward pass included."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            logits = isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCAB
            if logits and tensor.shape != (HIDDEN, VOCAB):  # the output head's weight, transposed
                self.rows = max(self.rows, math.prod(tensor.shape[:-1]))
        return out


@contextmanager
def saved_sizes() -> Iterator[list[int]]:
    """Elements of every tensor that autograd keeps for the backward pass."""
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def routed_model(checkpointing: bool, seed: int = 0):
    model = attach(tiny_model("qwen3"), small_config()).train()
    varied_routers(model, seed)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def row() -> tuple[torch.Tensor, torch.Tensor]:
    ids = random_ids(1, LENGTH)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return ids, labels


def loss_of(model, kind: str) -> torch.Tensor:
    """Objective `target`'s cross-entropy or `quality`'s divergence, in training mode with one seed's noise."""
    ids, labels = row()
    torch.manual_seed(5)
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    if kind == "cross entropy":
        return chunked_cross_entropy(hidden, head, labels, CHUNK)
    routed, _ = labelled_positions(hidden, labels)
    return chunked_divergence(routed, routed.detach() * 1.1, head, CHUNK).mean()


@pytest.mark.parametrize("kind", ["cross entropy", "divergence"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_no_tensor_of_logits_is_longer_than_a_chunk(kind, checkpointing):
    model = routed_model(checkpointing)
    with Widest() as widest:
        loss_of(model, kind).backward()
    assert widest.rows == CHUNK < LENGTH - PROMPT
    assert all(router.head[-1].weight.grad.abs().max() > 0 for router in routers(model))


@pytest.mark.parametrize("kind", ["cross entropy", "divergence"])
def test_no_logits_are_kept_for_the_backward_pass(kind):
    model = routed_model(False)
    ids, labels = row()
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    routed, target = labelled_positions(hidden, labels)
    with saved_sizes() as plain:
        torch.nn.functional.cross_entropy(head(routed), target)
    with saved_sizes() as chunked:
        if kind == "cross entropy":
            chunked_cross_entropy(hidden, head, labels, CHUNK)
        else:
            chunked_divergence(routed, routed.detach(), head, CHUNK)
    assert max(plain) >= target.numel() * VOCAB > max(chunked, default=0)


def test_checkpointing_keeps_less_than_half():
    kept = []
    for checkpointing in (False, True):
        with saved_sizes() as sizes:
            loss_of(routed_model(checkpointing), "cross entropy")
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_recomputed_layers_leave_nothing_but_their_input():
    """In the backward pass too: no decision of a second run keeps its graph, and with it what a norm has read."""
    peaks, wide, tokens = [], 128, 256
    for layers in (3, 9):
        model = tiny_model("llama", num_hidden_layers=layers, hidden_size=wide).bfloat16()
        attach(model, small_config()).train().gradient_checkpointing_enable({"use_reentrant": False})
        for counted in (False, True):  # the routers have gradients by then
            with Alive() as alive:
                model.get_decoder()(input_ids=random_ids(1, tokens), use_cache=False).last_hidden_state.sum().backward()
            peaks += [alive.peak] if counted else []
    a_layer = (peaks[1] - peaks[0]) / (6 * tokens)
    assert a_layer < 1.2 * 2 * wide, "bytes of a token: its input in bf16"


def router_gradients(checkpointing: bool, autocast: bool) -> list[torch.Tensor]:
    model = routed_model(checkpointing)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(model, "cross entropy")
    assert last_routes(model).route.dtype == torch.float32  # routers decide in fp32 whatever the autocast
    loss.backward()
    return [p.grad.clone() for router in routers(model) for p in router.parameters()]


def test_checkpointing_under_bf16_autocast_gives_the_same_router_gradients():
    plain, saving = (router_gradients(checkpointing, True) for checkpointing in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, saving, strict=True))
    assert all(gradient.dtype == torch.float32 for gradient in plain)


def test_bf16_autocast_gradients_point_where_the_fp32_ones_do():
    exact, rounded = (
        torch.cat([g.reshape(-1) for g in router_gradients(True, autocast)]) for autocast in (False, True)
    )
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=0) > 0.95
