"""Two processes with half a packed row each equal one process with the whole row: states, routes, losses, gradients,
scores. The row's length is odd, so the second half ends in a token of no sample.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from elastic.attention.head_plan import HeadPlan
from elastic.attention.layout import packed_layout
from elastic.attention.modes import BLOCK_SPARSE, FULL, STREAMING
from elastic.attention.row_slice import RowSlice
from elastic.config import RouterConfig, SparseConfig
from elastic.data.packing import Sample, collate, pack
from elastic.model.attach import attach, last_features, last_routes, override_routes, routers, set_row_slice
from elastic.routing.sparsity import msr
from elastic.training.context_parallel import context_parallel, deal, shard
from elastic.training.losses import answer_divergence, answer_losses, chunked_cross_entropy, labelled_positions
from elastic.training.metrics import score_answers
from elastic.training.multipliers import LagrangeMultipliers
from elastic.training.objective import sparsity_loss, target_intervals
from elastic.training.sharding import average_gradients
from tests.helpers.forked import forked_ranks, say_to
from tests.helpers.models import random_ids, small_config, tiny_model, varied_routers

LENGTHS = ((21, 8), (40, 31), (34, 20))  # tokens and prompt of the samples; prompts cross the slices' border


def packed_row():
    ids = random_ids(1, 95)[0].tolist()
    bounds = [sum(n for n, _ in LENGTHS[:i]) for i in range(len(LENGTHS))]
    samples = [
        Sample(ids[b : b + n], prompt, task) for task, (b, (n, prompt)) in enumerate(zip(bounds, LENGTHS, strict=True))
    ]
    return collate(list(pack(samples, 95)))


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
    labels, bounds = batch["labels"], batch["cu_seq_lens"]
    language = chunked_cross_entropy(hidden, head, labels, 4, row_slice=row_slice)
    answers = answer_losses(hidden, head, labels, bounds, 4, row_slice)
    scored = score_answers(hidden, head, labels, bounds, 4, row_slice)
    loss = (
        language
        + (answers * torch.tensor([1.0, 0.5, 2.0])).sum()
        + sparsity_loss(msr(state.route), batch["task_id"], target_intervals({}), multipliers)
    )
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
        "answers": answers.detach(),
        "scores": torch.stack(list(scored.scores.values())),
        "predicted": scored.predicted_P,
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
    dense = labelled_positions(dense, batch["labels"], row_slice)[0]
    found = answer_divergence(hidden, dense, head, batch["labels"], batch["cu_seq_lens"], 4, row_slice)
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


def slice_process(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    say_to(folder / "log")
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
    level = attach(tiny_model(), replace(small_config(), router=RouterConfig(kind="level")))
    with pytest.raises(ValueError, match="routers by level or reach look at"), context_parallel(level):
        pass
    model = routed_model("llama")
    with pytest.raises(ValueError, match="a slice of a sequence came without cu_seq_lens"), context_parallel(model):
        model(random_ids(1, 10), use_cache=False)
    with context_parallel(model) as row_slice, pytest.raises(ValueError, match="a slice of 47 tokens came with"):
        inputs = shard(packed_row(), row_slice)
        model.get_decoder()(**{**inputs, "input_ids": inputs["input_ids"][:, :47]}, use_cache=False)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def slices(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slices")
    assert forked_ranks(2, slice_process, folder) == [0, 0], (folder / "log").read_text()[-3000:]
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen3", "llama+xattention"])
def test_two_slices_equal_the_whole_row(slices, family):
    whole = trained_pass(routed_model(family), RowSlice(), False)
    one, two = (torch.load(slices / f"{family}.{rank}.pt", weights_only=True) for rank in (0, 1))
    assert set(whole["route"].unique().tolist()) == {0.0, 1.0}
    for part in (one, two):
        assert torch.equal(part["route"], whole["route"])
        assert torch.equal(part["predicted"], whole["predicted"])
        for name in ("pooled", "loss", "answers", "scores", "gradients", "density"):
            torch.testing.assert_close(part[name], whole[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    both = torch.cat([one["hidden"], two["hidden"]], dim=1)
    assert both.shape[1] == 96
    torch.testing.assert_close(both[:, :95], whole["hidden"], rtol=1e-4, atol=1e-5)
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


def test_heads_are_dealt_out_by_what_they_cost():
    """Full before block-sparse before streaming, in a snake; a long sample counts more than a short one."""
    layout = packed_layout(torch.tensor([0, 10, 110]), None, 110, torch.device("cpu"))
    short_full, long_full, blocks = [FULL, STREAMING], [STREAMING, FULL], [STREAMING, BLOCK_SPARSE]
    modes = [short_full, long_full, blocks, [STREAMING] * 2, [FULL] * 2, [STREAMING] * 2, short_full, [STREAMING] * 2]
    plan = HeadPlan(torch.tensor(modes, dtype=torch.int32).T.contiguous(), SparseConfig(), layout)
    dealt = deal(plan, 2, 3)
    assert dealt.kv_K.tolist() == [4, 0, 6, 7, 1, 2, 3, 5]  # by cost: 4 1 2 0 6 3 5 7
    assert dealt.query_H[:6].tolist() == [12, 13, 14, 0, 1, 2]
    assert torch.equal(dealt.query_H[dealt.back_H], torch.arange(24))
    assert sorted(deal(plan, 4, 1).kv_K.tolist()) == list(range(8)) and deal(plan, 8, 1).kv_K.shape == (8,)


def test_a_context_is_restored_and_needs_a_process_group():
    model = attach(tiny_model(), small_config())
    with pytest.raises(RuntimeError, match=r"needs a process group; call torch\.distributed"), context_parallel(model):
        pass
    own = set_row_slice(model, RowSlice())
    assert own.size == 1 and set_row_slice(model, own).size == 1
