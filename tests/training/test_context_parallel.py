"""Two processes with half a packed row each equal one process with the whole row: states, routes, loss, gradients."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from elastic.attention.row_slice import RowSlice
from elastic.data.packing import Sample, collate, pack
from elastic.model.attach import attach, last_features, last_routes, override_routes, routers, set_row_slice
from elastic.routing.sparsity import msr
from elastic.training.context_parallel import RowSliceGroup, context_parallel, divergence, language_loss, shard
from elastic.training.losses import chunked_cross_entropy
from elastic.training.multipliers import LagrangeMultipliers
from elastic.training.objective import sparsity_loss, target_intervals
from elastic.training.sharding import average_gradients
from tests.helpers.models import random_ids, small_config, tiny_model, varied_routers

LENGTHS = ((21, 8), (40, 31), (35, 20))  # tokens and prompt of the samples; prompts cross the slices' border


def packed_row():
    ids = random_ids(1, 96)[0].tolist()
    bounds = [sum(n for n, _ in LENGTHS[:i]) for i in range(len(LENGTHS))]
    samples = [
        Sample(ids[b : b + n], prompt, task) for task, (b, (n, prompt)) in enumerate(zip(bounds, LENGTHS, strict=True))
    ]
    return collate(list(pack(samples, 96)))


def trained_pass(model, row_slice: RowSlice, checkpointing: bool) -> dict[str, torch.Tensor]:
    """Forward, loss and backward of the row in training, with the noise of one seed."""
    batch = packed_row()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(7)
    hidden = model.get_decoder()(**shard(batch, row_slice), use_cache=False).last_hidden_state
    state, head = last_routes(model), model.get_output_embeddings()
    multipliers = LagrangeMultipliers()
    with torch.no_grad():
        multipliers.u.fill_(0.5)
    language = language_loss(hidden, head, batch["labels"], 4, row_slice)
    loss = language + sparsity_loss(msr(state.route), batch["task_id"], target_intervals({}), multipliers)
    loss.backward()
    parameters = [p for router in routers(model) for p in router.parameters()]
    if row_slice.size > 1:
        average_gradients([*parameters, *multipliers.parameters()])
    return {
        "hidden": hidden.detach(),
        "route": state.route.detach(),
        "pooled": last_features(model),
        "density": torch.zeros(0) if state.density is None else state.density,
        "loss": loss.detach(),
        "gradients": torch.cat([p.grad.reshape(-1) for p in [*parameters, *multipliers.parameters()]]),
    }


def quality_pass(model, row_slice: RowSlice) -> dict[str, torch.Tensor]:
    """Divergence per sample from the dense pass, and its gradient to the routers."""
    batch = packed_row()
    inputs = {**shard(batch, row_slice), "use_cache": False}
    with torch.no_grad(), override_routes(model, 0):
        dense = model.get_decoder()(**inputs).last_hidden_state
    torch.manual_seed(7)
    hidden, head = model.train().get_decoder()(**inputs).last_hidden_state, model.get_output_embeddings()
    found = divergence(hidden, dense, head, batch["labels"], batch["cu_seq_lens"], 4, row_slice)
    parameters = [p for router in routers(model) for p in router.parameters()]
    (found * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    if row_slice.size > 1:
        average_gradients(parameters)
    return {"divergence": found.detach(), "gradients": torch.cat([p.grad.reshape(-1) for p in parameters])}


def routed_model(family: str):
    """A model of the family; after a `+`, the mode of route 1."""
    family, _, mode = family.partition("+")
    sparse = {"route1": mode, "stride": 4, "threshold": 0.5} if mode else {}
    model = attach(tiny_model(family), small_config(**sparse))
    varied_routers(model)
    return model


def slice_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for family, checkpointing in (("llama", False), ("qwen3", True), ("llama+xattention", True)):
        model = routed_model(family)
        with context_parallel(model) as row_slice:
            torch.save(trained_pass(model, row_slice, checkpointing), f"{folder}/{family}.{rank}.pt")
            model.zero_grad()
            torch.save(quality_pass(model, row_slice), f"{folder}/{family}.quality.{rank}.pt")
    model = attach(tiny_model(num_key_value_heads=1), small_config())
    with (
        pytest.raises(ValueError, match="1 KV heads cannot be shared out over 2 processes; use a group of 1"),
        context_parallel(model),
    ):
        pass
    with pytest.raises(ValueError, match="a row of 95 tokens cannot be cut into 2 equal slices"):
        batch = {**packed_row(), "input_ids": torch.zeros(1, 95, dtype=torch.int64)}
        shard(batch, RowSliceGroup())
    model = routed_model("llama")
    with pytest.raises(ValueError, match="a slice of a sequence came without cu_seq_lens"), context_parallel(model):
        model(random_ids(1, 10), use_cache=False)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def slices(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slices")
    multiprocessing.spawn(slice_process, (str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama+xattention"])
def test_two_slices_equal_the_whole_row(slices, family):
    whole = trained_pass(routed_model(family), RowSlice(), False)
    one, two = (torch.load(slices / f"{family}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert set(whole["route"].unique().tolist()) == {0.0, 1.0}
    for part in (one, two):
        assert torch.equal(part["route"], whole["route"])
        for name in ("pooled", "loss", "gradients", "density"):
            torch.testing.assert_close(part[name], whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(torch.cat([one["hidden"], two["hidden"]], dim=1), whole["hidden"], rtol=1e-4, atol=1e-5)
    assert torch.equal(one["gradients"], two["gradients"]) and whole["gradients"].abs().max() > 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_two_slices_diverge_as_the_whole_row_does(slices, family):
    whole = quality_pass(routed_model(family), RowSlice())
    for rank in (0, 1):
        part = torch.load(slices / f"{family}.quality.{rank}.pt", weights_only=True)
        for name, value in whole.items():
            torch.testing.assert_close(part[name], value, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert whole["divergence"].shape == (3,) and (whole["divergence"] > 1e-5).sum() >= 2
    assert whole["gradients"].abs().max() > 1e-6


def test_one_slice_is_the_ordinary_loss():
    batch, head = packed_row(), torch.nn.Linear(8, 11)
    labels = batch["labels"].clamp(max=10)
    hidden = torch.randn(1, 96, 8)
    mine = language_loss(hidden, head, labels, 5, RowSlice())
    torch.testing.assert_close(mine, chunked_cross_entropy(hidden, head, labels, 7))
    with pytest.raises(ValueError, match="no labelled token"):
        language_loss(hidden, head, torch.full((1, 96), -100), 5, RowSlice())


def test_a_context_is_restored_and_needs_a_process_group():
    model = attach(tiny_model(), small_config())
    with pytest.raises(RuntimeError, match=r"needs a process group; call torch\.distributed"), context_parallel(model):
        pass
    own = set_row_slice(model, RowSlice())
    assert own.size == 1 and set_row_slice(model, own).size == 1
