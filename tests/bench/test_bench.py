"""`elastic bench` without a GPU: cases and their arithmetic, block lists, contestants, messages."""

import argparse
import os
import shutil
import subprocess
import sys
import time
import types
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

from elastic import cli
from elastic.bench import attention, backward, contestants, gpu_state, race, records, tables
from elastic.bench.cases import BLOCK, SINK, WINDOW, Case
from elastic.bench.contestants import COMPETITORS, Contestant, block_lists, forward, split_lists
from elastic.bench.timing import measure_in_turn, repeats_within
from elastic.kernels.block_bits import mask_from_bits
from elastic.visibility import visible

SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 64}


def visible_pairs(case: Case) -> torch.Tensor:
    """Token by token: which keys each query head's queries see, bool [H, S, S]."""
    i, j = torch.arange(case.length)[:, None], torch.arange(case.length)[None]
    local = visible(i, j, sink=SINK, window=WINDOW, granule="block", block=BLOCK)
    few = case.streaming * case.heads // case.kv_heads
    if case.density is not None:
        chosen = mask_from_bits(case.inputs("cpu").bits)[0, ..., : case.length // BLOCK]
        return chosen.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2) & (j <= i)
    return torch.stack([local] * few + [j <= i] * (case.heads - few))


@pytest.mark.parametrize("length", [128, 2048, 2944])
@pytest.mark.parametrize("kind", [{}, {"streaming": 1}, {"streaming": 2}, {"density": 0.25}])
def test_flops_count_the_visible_blocks(length, kind):
    case = Case(length, **kind, **SHAPE)
    pairs = visible_pairs(case)
    blocks = pairs.unflatten(1, (-1, BLOCK)).unflatten(3, (-1, BLOCK)).any(4).any(2)
    assert torch.equal(case.block_mask().expand(1, 4, -1, -1)[0], blocks)
    # A diagonal block holds 128 * 129 / 2 visible pairs and is counted as half a block.
    diagonal = case.heads * length // BLOCK
    assert case.visited_blocks() == (pairs.sum().item() - diagonal * BLOCK / 2) / BLOCK**2
    assert case.flops() == 4 * 64 * BLOCK**2 * case.visited_blocks()


def test_names_and_properties():
    assert [c.name for c in (Case(65536), Case(8192, 6), Case(65536, density=0.25))] == [
        "dense-64k",
        "streaming-6of8-8k",
        "random-25pct-64k",
    ]
    assert Case(640, 1, heads=9, kv_heads=3, head_dim=64, dtype="fp16").name == "streaming-1of3-d64-640-fp16"
    assert Case(8192, 6).properties()["msr"] == 0.75 and Case(8192, density=0.5).properties()["msr"] is None


def test_block_lists_hold_every_block_once_in_ascending_order():
    mask = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    counts, indices = block_lists(mask)
    for row, count, listed in zip(mask.flatten(0, 2), counts.flatten(), indices.flatten(0, 2), strict=True):
        assert listed[:count].tolist() == row.nonzero().flatten().tolist()
    assert counts.dtype == indices.dtype == torch.int32
    assert block_lists(mask.transpose(-1, -2))[1].is_contiguous()  # flash-attn-4 takes no other
    few, first, many, rest = split_lists(torch.ones(5, 5).tril().bool())
    assert few.tolist() == [1] * 5 and first[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert many.tolist() == [0, 1, 2, 3, 4] and rest[4, :4].tolist() == [0, 1, 2, 3]


def listed_tokens(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The tokens of listed blocks, bool [1, H, S, S], read as the packages' documentation describes the lists."""
    blocks = torch.zeros(*counts.shape, indices.shape[-1] + 1, dtype=torch.bool)
    used = torch.arange(indices.shape[-1]) < counts[..., None]
    blocks.scatter_(-1, torch.where(used, indices.long(), indices.shape[-1]), True)
    return blocks[..., :-1].repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)


def by_lists(q, k, v, *, block_mask, enable_gqa):
    """What compiled FlexAttention computes: full blocks throughout, the others under the element mask."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    partial = listed_tokens(block_mask.kv_num_blocks, block_mask.kv_indices) & block_mask.mask_mod(0, 0, i, j)
    mask = partial | listed_tokens(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    assert block_mask.BLOCK_SIZE == (BLOCK, BLOCK)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=enable_gqa)


def flash_attn_func(q, k, v, causal, block_sparse_tensors=None, block_sparse_tensors_bwd=None):
    """What flash-attn-4 computes: a causal mask over all listed blocks. Its backward pass reads lists of query blocks
    for each key block, which must name the same pairs.
    """
    assert causal and (block_sparse_tensors is None) == (block_sparse_tensors_bwd is None)
    mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()[None, None]
    if block_sparse_tensors is not None:
        listed, turned = (
            listed_tokens(few, first) | listed_tokens(many, rest)
            for few, first, many, rest, block_size in (block_sparse_tensors, block_sparse_tensors_bwd)
            if block_size == (BLOCK, BLOCK)
        )
        assert torch.equal(listed, turned.transpose(-1, -2))
        mask = mask & listed
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2), None


@pytest.fixture
def on_cpu(monkeypatch):
    """Stand-ins for what needs a GPU: they read the block lists and masks that the contestants build."""
    monkeypatch.setattr(contestants, "compiled_flex", lambda: by_lists)
    dense = contestants._dense
    monkeypatch.setattr(contestants, "_dense", lambda q, k, v, _: dense(q, k, v, SDPBackend.MATH))
    package, lists = types.ModuleType("flash_attn.cute"), types.ModuleType("flash_attn.cute.block_sparsity")
    package.flash_attn_func = flash_attn_func
    lists.BlockSparseTensorsTorch = lambda *tensors, block_size: (*tensors, block_size)
    for module in (types.ModuleType("flash_attn"), package, lists):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(race, "measure_in_turn", lambda calls, _: {name: [1.0, 2.0, 4.0] for name in calls})


@pytest.mark.parametrize(
    ("kind", "who"),
    [
        ({}, ["ours", "cudnn", "flash2", "flex", "fa4"]),
        ({"streaming": 1}, ["ours", "flex", "serial", "fa4"]),
        ({"streaming": 2}, ["ours", "flex", "fa4"]),
        ({"density": 0.25}, ["ours", "flex", "fa4"]),
    ],
    ids=["dense", "mixed", "streaming", "random"],
)
def test_every_contestant_computes_the_same(on_cpu, monkeypatch, kind, who):
    """2944 tokens: beyond sink and window, and a limit at which a wrong block list shows."""
    case = Case(2944, **kind, **SHAPE, dtype="fp16")
    monkeypatch.setattr(race, "TOLERANCE", 5e-3)
    found = race.run_case(case, {"ours": attention.ours}, COMPETITORS, case.flops(), 400.0, 4096, "cpu")
    assert not [r["why"] for r in found if r["metric"] == records.LEFT_OUT]
    assert [r["who"] for r in found if r["metric"] == "time"] == who
    assert {r["value"] for r in found if r["metric"] == "eff"} == {case.flops() / 2e9}
    assert all(r["length"] == 2944 and r["repeats"] == 3 for r in found)


WIDE = {"heads": 4, "kv_heads": 2, "head_dim": 256}


@pytest.mark.parametrize("kind", [{}, {"streaming": 1}, {"density": 0.25}], ids=["dense", "mixed", "random"])
def test_what_runs_instead_of_the_kernel_computes_the_same(kind):
    inputs = Case(2944, **kind, **WIDE, dtype="fp16").inputs("cpu")
    assert race.largest_difference(attention.in_torch(inputs)(), forward(inputs)[:1]) <= 5e-3


def test_a_head_dim_without_kernels_is_timed_in_torch_and_recorded_so(on_cpu, monkeypatch, tmp_path, capsys):
    ceiling = {"case": "matmul", "who": "cublas", "metric": "eff", "value": 1.0, "unit": "TFLOP/s"}
    monkeypatch.setattr(attention, "kernel_device", lambda *_: torch.device("cpu"))
    monkeypatch.setattr(attention, "product_ceiling", lambda: ceiling)
    case = ["--lengths", "256", "--heads", "4", "--kv-heads", "2", "--head-dim", "256", "--msr", "0.5", "--density"]
    assert cli.main(["bench", "attention", *case, "--contestants", "flex", "--out", str(tmp_path)]) == 0
    assert "the kernels take no head dim 256; timed is PyTorch" in capsys.readouterr().out
    timed = [r for r in records.load(tmp_path / "attention.json") if r["metric"] == "time"]
    assert [(r["who"], r["kernel"], r["head_dim"]) for r in timed] == [
        (who, "torch (cpu)", 256) for who in ("torch", "flex")
    ]


def test_every_backward_contestant_computes_the_same(on_cpu, monkeypatch):
    monkeypatch.setattr(backward, "compiled_flex", lambda: by_lists)
    monkeypatch.setattr(race, "TOLERANCE", 5e-3)
    ours = {"ours": partial(backward.ours, deterministic=True)}
    rivals = {name: backward.COMPETITORS[name] for name in ("flex", "fa4")}
    for kind in ({}, {"streaming": 1}, {"density": 0.5}):
        case = Case(1280, **kind, **SHAPE, dtype="fp16")
        found = race.run_case(case, ours, rivals, 2.5 * case.flops(), 400.0, 4096, "cpu")
        assert not [r["why"] for r in found if r["metric"] == records.LEFT_OUT]
        assert [r["who"] for r in found if r["metric"] == "time"] == ["ours", "flex", "fa4"]
        assert {r["value"] for r in found if r["metric"] == "eff"} == {2.5 * case.flops() / 2e9}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_flex_attention_reads_our_lists():
    case = Case(640, density=0.25, **SHAPE)
    inputs = case.inputs("cpu")
    wide = inputs._replace(q=inputs.q.float(), k=inputs.k.float(), v=inputs.v.float())
    (out,) = COMPETITORS["flex"].build(case, wide)()
    torch.testing.assert_close(out, forward(wide)[0], rtol=1e-3, atol=1e-4)


def test_who_is_left_out_and_why(on_cpu):
    def breaks(_case, _inputs):
        raise RuntimeError("out of\nmemory")

    everyone = {
        "wrong": Contestant("", lambda _: True, lambda _, inputs: lambda: (torch.zeros_like(forward(inputs)[0]),)),
        "nan": Contestant("", lambda _: True, lambda _, inputs: lambda: (forward(inputs)[0] * float("nan"),)),
        "broken": Contestant("", lambda _: True, breaks),
        "never": Contestant("", lambda _: False, breaks),
        "flex": COMPETITORS["flex"],
    }
    found = race.run_case(Case(256, **SHAPE), {"ours": attention.ours}, everyone, 1.0, 400.0, 128, "cpu")
    why = {r["who"]: r["why"] for r in found if r["metric"] == records.LEFT_OUT}
    assert why.pop("wrong").startswith("its output differs from ours by")
    assert why == {
        "nan": "its output differs from ours by inf, allowed is 0.05",
        "broken": "RuntimeError: out of memory",
        "flex": "longer than --flex-max-length 128",
    }
    assert [r["who"] for r in found if r["metric"] == "time"] == ["ours"]
    text = tables.terminal(found)
    assert text.count("left out") == 8 and "broken left out of dense-d64-256: RuntimeError: out of memory" in text


def test_repeats_fit_the_budget():
    assert [repeats_within(once, 400.0) for once in (1e-6, 20.0, 80.0, 1700.0)] == [50, 20, 5, 3]


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "attention"]) == 2
    error = capsys.readouterr().err
    assert "needs an NVIDIA GPU" in error and "no CUDA device" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


BAD = [
    (["--lengths", "1000"], "length 1000 is not a positive multiple of 128; use 1024"),
    (["--lengths", "many"], "invalid int value: 'many'"),
    (["--msr", "0.3"], "--msr 0.3 is 2.4 of 8 KV heads; expected a whole number"),
    (["--msr", "1.5"], "--msr 1.5 is 12 of 8 KV heads"),
    (["--density", "0"], "density 0 is not in (0, 1]"),
    (["--msr", "--density"], "no case to time"),
    (["--heads", "30"], "30 query heads are not a multiple of 8 KV heads"),
    (["--dtype", "fp32"], "invalid choice: 'fp32'"),
    (["--contestants", "cudn"], "there is no contestant 'cudn'; expected some of cudnn, flash2, flex, serial, fa4"),
    (["--contestants", "fa4"], "fa4 needs flash-attn-4, which is not installed"),
    (["--budget-ms", "0"], "--budget-ms 0 is not positive"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_bad_options(options, message, capsys, monkeypatch):
    monkeypatch.setattr(Contestant, "installed", property(lambda self: self.package is None))
    try:
        code = cli.main(["bench", "attention", *options])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("argv", [["bench"], ["bench", "speed"]])
def test_bench_without_a_known_benchmark(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(argv)
    assert "elastic bench: error:" in capsys.readouterr().err


def test_python_m_elastic_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "elastic", "bench", "--help"], capture_output=True, text=True, check=True
    )
    assert "attention" in done.stdout and "table" in done.stdout


def test_a_race_keeps_every_case_and_tells_a_contestant_that_differs(on_cpu, tmp_path, capsys):
    """On the CPU, with rates of 2.5 forward passes; the file is complete after every case."""
    args = argparse.Namespace(out=tmp_path, tag="run", budget_ms=1.0, flex_max_length=4096)
    cases = [Case(length, **SHAPE) for length in (128, 256)]
    ceiling = {"case": "matmul-8192", "who": "cublas", "metric": "eff", "value": 1.0, "unit": "TFLOP/s"}
    stamp = {"gpu": "none", "kernel": "torch", "versions": {}, "commit": "abc", "command": "elastic bench"}
    ours = {"ours": attention.ours}
    assert race.race(args, cases, ours, {}, [ceiling], stamp, torch.device("cpu"), 2.5) == 0
    found = records.load(tmp_path / "run.json")
    assert [record["case"] for record in found] == ["matmul-8192", *(case.name for case in cases for _ in range(2))]
    assert str(tmp_path / "run.json") in capsys.readouterr().out
    wrong = Contestant("adds one", lambda case: True, lambda case, inputs: lambda: (attention.ours(inputs)()[0] + 1,))
    assert race.race(args, cases[:1], ours, {"wrong": wrong}, [ceiling], stamp, torch.device("cpu")) == 1


TOOL = """#!/bin/sh
echo "$@" >> LOG
for i in 1 2 3; do echo "17${i}0, 612.4${i}"; done
echo "1980, [N/A]"
printf "19"
exec sleep 60
"""


def test_the_gpus_clock_and_power_are_read_while_it_is_timed(monkeypatch, tmp_path):
    """A tool that says what nvidia-smi says, also a figure that is not available and a line that was cut short."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(TOOL.replace("LOG", str(tmp_path / "log")))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="a-b"))
    with gpu_state.watched(torch.device("cuda", 0)) as state:
        until = time.monotonic() + 20
        while not (tmp_path / "log").is_file() and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)
    read = [(record["metric"], record["value"], record["unit"]) for record in state]
    assert read == [("SM clock", 1725.0, "MHz"), ("power", 612.42, "W")]
    assert "--id=GPU-a-b" in (tmp_path / "log").read_text()
    other = [{**record, "value": record["value"] + 100} for record in state]
    line = "GPU while it was timed, medians of the cases: SM clock 1725 to 1825 MHz, power 612 to 712 W"
    assert gpu_state.ranges([*state, *other]) == [line]
    timing = {"case": "a", "who": "ours", "metric": "time", "value": 1.0, "unit": "ms"}
    assert tables.remarks([timing, *({"case": "a", **r} for r in (*state, *other))]) == [line]


def test_without_the_drivers_tool_nothing_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with gpu_state.watched(torch.device("cuda", 0)) as state:
        pass
    assert state == [] and gpu_state.ranges(state) == []


def test_rounds_have_an_order_of_their_own(monkeypatch):
    done = []
    event = types.SimpleNamespace(record=lambda: None, elapsed_time=lambda _: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = measure_in_turn({name: partial(done.append, name) for name in "abc"}, 1e9)
    rounds = ["".join(done[at : at + 3]) for at in range(6, len(done), 3)]  # after two calls that are not timed
    assert [len(times) for times in found.values()] == [len(rounds)] * 3 == [50] * 3
    assert {"".join(sorted(order)) for order in rounds} == {"abc"} and len(set(rounds)) == 6
