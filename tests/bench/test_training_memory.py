"""The script that measures a training step's memory, on a tiny shape with memory as a CPU can tell it."""

import pytest
import torch

from elastic.bench import e2e_models, records
from elastic.model.memory import Shape, footprint
from tests.bench import training_memory

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "vocab_size": 97, "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """All shapes made small, on the CPU."""
    small = {
        name: {**sizes, **{key: SIZES[key] for key in sizes if key in SIZES}}
        for name, sizes in training_memory.HYBRIDS.items()
    }
    monkeypatch.setattr(training_memory, "HYBRIDS", small)
    for name in set(training_memory.MEASURED) - set(small):
        family, sizes = e2e_models.SHAPES[name]
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        monkeypatch.setitem(
            e2e_models.SHAPES, name, (family, {**sizes, **{k: SIZES[k] for k in sizes if k in SIZES}, **heads})
        )
    rows = {name: (depths, (1024, 2048)) for name, (depths, _) in training_memory.MEASURED.items()}
    monkeypatch.setattr(training_memory, "MEASURED", rows)


@pytest.mark.parametrize("name", list(training_memory.MEASURED))
def test_every_shape_is_measured_at_two_depths_and_extrapolated(tiny, monkeypatch, tmp_path, name):
    monkeypatch.setattr(
        training_memory, "peak_and_seconds",
        lambda model, tokens, checkpointing: (2**30 * (model.config.num_hidden_layers + tokens // 1024), 0.5),
    )  # fmt: skip
    assert (
        training_memory.main(["--shapes", name, "--device", "cpu", "--commit", "abc", "--out", str(tmp_path)]) == 1
    )  # GiB, not MiB
    found = records.load(tmp_path / "training-memory.json")
    depths, _ = training_memory.MEASURED[name]
    peaks = [record["value"] for record in found if record["metric"] == "peak" and record["layers"] == depths[0]]
    assert peaks == [depths[0] + 1] * 2 + [depths[0] + 2] * 2
    far = {(r["length"], r["who"]): r["value"] for r in found if r["metric"] == "peak, extrapolated"}
    assert far[2048, "plain"] == pytest.approx(training_memory.config_of(name).num_hidden_layers + 2) and len(far) == 4


def test_a_step_runs_and_what_does_not_fit_is_left_out(tiny, monkeypatch, tmp_path):
    for name, value in (("empty_cache", None), ("reset_peak_memory_stats", None), ("synchronize", None),
                        ("max_memory_allocated", 2**20)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    step = training_memory.peak_and_seconds

    def some(model, tokens, checkpointing):
        if tokens == 2048:
            raise torch.OutOfMemoryError
        return step(model, tokens, checkpointing)

    monkeypatch.setattr(training_memory, "peak_and_seconds", some)
    assert (
        training_memory.main(["--shapes", "llama-3.1-8b", "--device", "cpu", "--commit", "abc", "--out", str(tmp_path)])
        == 0
    )
    found = records.load(tmp_path / "training-memory.json")
    assert {r["why"] for r in found if r["value"] is None} == {"out of memory"}
    shape = Shape.of(training_memory.config_of("llama-3.1-8b"))
    assert [r["value"] for r in found if r["metric"] == "reckoned over extrapolated"] == pytest.approx(
        [footprint(shape, 1024, 2, on, training_memory.ANSWER).total / 2**20 for on in (True, False)], rel=1e-3
    )
