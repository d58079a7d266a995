"""Two and four processes over gloo train the same routers as one: DDP, FSDP2, context parallelism and their products,
both objectives; and through the command.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

import elastic
from elastic.data.datamodule import MixtureDataModule
from elastic.model.checkpoint import is_trainable
from elastic.training.config import ObjectiveConfig, OptimiserConfig
from elastic.training.module import ElasticModule
from elastic.training.sharding import ContextParallel, ShardedBackbone, average_gradients
from tests.helpers.forked import forked_program, forked_ranks, run_command, say_to
from tests.helpers.training import ROOT, SMALL, build_data, router_tensors, small_run


class Watched(ElasticModule):
    """Remembers which rows it has read."""

    def training_step(self, batch, batch_idx):
        self.rows = [*getattr(self, "rows", []), *(int(m["input_ids"].sum()) for m in batch)]
        super().training_step(batch, batch_idx)


def objective_of(kind: str) -> ObjectiveConfig:
    return ObjectiveConfig(kind.split("-")[0], budget=1e-4, average="tasks" if "-" in kind else "tokens")


def train(folder: Path, data: Path, processes: int, strategy: str, sliced: int, kind: str) -> None:
    """One of the processes of a case. Four rows a step over all of them; the test compares with one process on four."""
    seed_everything(0, verbose=False)
    module = Watched(
        elastic=SMALL,
        optimiser=OptimiserConfig(lr=1e-3, multiplier_lr=0.5),
        objective=objective_of(kind),
        gradient_checkpointing=kind == "quality",
    )
    strategies = {"ddp": ContextParallel, "fsdp": ShardedBackbone}
    trainer = Trainer(
        accelerator="cpu", devices=processes, max_steps=3, max_epochs=-1, logger=False,
        strategy=strategies[strategy](context_parallel=sliced) if strategy == "fsdp" or sliced > 1 else "ddp",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=1.0, num_sanity_val_steps=0, use_distributed_sampler=False,
    )  # fmt: skip
    loader = MixtureDataModule(str(data), rows_per_step=4 * sliced // processes)
    trainer.fit(module, loader)
    scalars = dict(trainer.callback_metrics)
    trainer.validate(module, loader, verbose=False)
    torch.save(
        {
            "state": router_tensors(module), "step": trainer.global_step, "rows": module.rows, "scalars": scalars,
            "results": module.results, "samples": module.sample_results,
            "sharded": sum(isinstance(p, DTensor) for p in module.parameters()),
        },
        folder / f"{processes}-{strategy}-{sliced}-{kind}.rank{trainer.global_rank}.pt",
    )  # fmt: skip


def train_all(folder: Path, data: Path, cases: list[tuple[int, str, int, str]]) -> None:
    """What a process does; its words are in a file."""
    say_to(folder / "log")
    for case in cases:
        train(folder, data, *case)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("data"))


# Processes, strategy, processes that share rows, objective (and what it averages over).
CASES = [
    (2, "ddp", 1, "target"),
    (2, "fsdp", 1, "quality"),
    (2, "ddp", 2, "target-tasks"),
    (2, "fsdp", 2, "target"),
    (4, "ddp", 2, "quality"),
    (4, "fsdp", 2, "target"),
    (4, "ddp", 1, "target"),
    (4, "fsdp", 1, "target"),
]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """What every process of every case ended with, in files."""
    folder = tmp_path_factory.mktemp("trained")
    for processes in (2, 4):
        cases = [case for case in CASES if case[0] == processes]
        codes = forked_ranks(processes, train_all, folder, data, cases)
        assert codes == [0] * processes, (folder / "log").read_text()[-3000:]
    return folder


@pytest.mark.parametrize(("processes", "strategy", "sliced", "kind"), CASES)
def test_several_processes_train_the_routers_of_one(data, trained, tmp_path, processes, strategy, sliced, kind):
    name = f"{processes}-{strategy}-{sliced}-{kind}"
    ends = [torch.load(trained / f"{name}.rank{rank}.pt", weights_only=True) for rank in range(processes)]
    one, two = ends[0], ends[-1]
    settings = {
        "optimiser": OptimiserConfig(lr=1e-3, multiplier_lr=0.5),
        "objective": objective_of(kind),
    }
    single, _, trainer = small_run(data, tmp_path, 3, rows_per_step=4, **settings)
    assert {end["step"] for end in ends} == {trainer.global_step} == {3}
    assert all(bool(end["sharded"]) == (strategy == "fsdp") for end in ends)
    for rank, end in enumerate(ends):
        assert (end["rows"] == one["rows"]) == (rank < sliced)  # a group reads the same rows, each group its own
    for name, value in router_tensors(single).items():
        assert all(torch.equal(one["state"][name], end["state"][name]) for end in ends), name  # multipliers included
        torch.testing.assert_close(one["state"][name], value, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    multipliers = [value for name, value in one["state"].items() if name.startswith("multipliers.")]
    assert any(value.abs().max() > 1e-3 for value in multipliers)
    assert one["state"]["model.model.layers.0.self_attn.router.head.4.weight"].abs().max() > 2e-4
    same_scalars(one["scalars"], two["scalars"], dict(trainer.callback_metrics))
    assert one["results"] == two["results"]
    assert all(map(torch.equal, one["samples"], two["samples"]))
    alone, loader, judge = small_run(data, tmp_path, fit=False, rows_per_step=3, **settings)
    alone.configure_model()
    alone.load_state_dict(one["state"], strict=False)
    judge.limit_val_batches = 1.0
    judge.validate(alone, loader, verbose=False)
    assert sum(row["n"] for row in alone.results.values()) == 16  # each sample once, however many read it
    assert torch.equal(one["samples"][0], alone.sample_results[0])
    torch.testing.assert_close(one["samples"][1], alone.sample_results[1], rtol=1e-4, atol=1e-5)
    for task, row in alone.results.items():
        assert one["results"][task] == pytest.approx(row, rel=1e-4, abs=1e-5)
    assert not (tmp_path / "lightning_logs").exists()


def same_scalars(one, two, alone):
    """What both processes log is of the rows of both, as one process logs it that reads all of them."""
    logged = {name for name in alone if name.startswith("train/")}
    assert {name for name in one if name.startswith("train/")} == logged > {"train/loss", "train/objective"}
    for name in logged - {"train/step_seconds", "train/tokens_per_second"}:
        assert float(one[name]) == float(two[name]) == pytest.approx(float(alone[name]), rel=1e-3, abs=1e-4), name


def test_the_command_trains_on_two_processes_and_strategies_share_checkpoints(data, tmp_path):
    """A DDP run of two steps, begun as users do, resumes under FSDP2 from the same files."""
    configs, log = ROOT / "configs", tmp_path / "log"
    fixed = [f"--data.data_dir={data}", "--trainer.devices=2", "--trainer.limit_val_batches=1", "--ckpt_path=last"]
    fixed = ["fit", "-c", str(configs / "debug.yaml"), *fixed, "--trainer.default_root_dir=run"]
    begun = [*fixed, "--trainer.strategy=ddp", "--trainer.max_steps=2"]
    process = forked_program(begun, tmp_path, log, MASTER_ADDR="127.0.0.1")
    process.start()
    process.join(300)
    assert process.exitcode == 0, log.read_text()[-3000:]
    ddp = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    resumed = [*fixed, "-c", str(configs / "strategy" / "fsdp.yaml"), "--trainer.max_steps=4"]
    assert forked_ranks(2, run_command, resumed, tmp_path, log) == [0, 0], log.read_text()[-3000:]
    fsdp = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert (ddp["global_step"], fsdp["global_step"]) == (2, 4)
    assert ddp["state_dict"].keys() == fsdp["state_dict"].keys() and all(is_trainable(n) for n in ddp["state_dict"])
    for end, steps in ((ddp, 2), (fsdp, 4)):
        assert {float(state["step"]) for state in end["optimizer_states"][0]["state"].values()} == {steps}
    last = "model.model.layers.0.self_attn.router.head.4.weight"
    assert not torch.equal(ddp["state_dict"][last], fsdp["state_dict"][last])
    model, _ = elastic.load(tmp_path / "run" / "checkpoint")
    for name, value in model.state_dict().items():
        if is_trainable(name):
            assert torch.equal(value, fsdp["state_dict"][f"model.{name}"])


def test_gradients_are_averaged_and_a_missing_one_counts_as_zero():
    with one_process_group():
        present, missing = torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))
        present.grad = torch.ones(2, 3)
        average_gradients([present, missing])
    assert torch.equal(present.grad, torch.ones(2, 3)) and torch.equal(missing.grad, torch.zeros(4))


def test_lightnings_own_model_parallel_strategy_is_refused(data, tmp_path):
    module, loader, _ = small_run(data, tmp_path, fit=False)
    trainer = Trainer(accelerator="cpu", devices=1, strategy=ModelParallelStrategy(1, 1), logger=False, max_steps=1)
    try:
        with pytest.raises(ValueError, match=r"does not know what is frozen; use elastic\.training\.sharding"):
            trainer.fit(module, loader)
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def one_process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
