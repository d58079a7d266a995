"""`elastic bench decode` and `elastic bench router` without a GPU: cases, contestants against the oracle, records,
tables, messages.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend

from elastic import cli
from elastic.bench import decode, reach, records, replay, router, tables
from elastic.bench.decode import RIVALS, DecodeCase
from elastic.bench.router import RouteCase
from elastic.bench.timing import Timing
from elastic.config import ElasticConfig

SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": "fp16"}
STAMP = {"gpu": "a GPU", "kernel": "a kernel", "versions": {"torch": "2"}, "commit": "abc", "command": "elastic bench"}


@pytest.fixture
def on_cpu(monkeypatch):
    """SDPA's plain backend, and a clock that says 2 ms."""
    dense = decode._dense
    monkeypatch.setattr(decode, "_dense", lambda q, k, v, _: dense(q, k, v, SDPBackend.MATH))
    monkeypatch.setattr(replay, "measure_replayed", lambda call, _budget: Timing(2.0, 60))


def test_cases_count_their_bytes():
    case = DecodeCase(131_072, 6, batch=2)
    assert case.name == "streaming-6of8-128k-b2" and DecodeCase(8192).name == "dense-8k"
    assert case.nbytes == 2 * 2 * 2 * 128 * (6 * 2176 + 2 * 131_072)
    assert case.properties()["batch"] == 2 and case.properties()["msr"] == 0.75
    assert DecodeCase(1024, 8).kept == [1024] * 8  # a sample shorter than sink and window keeps all
    inputs = DecodeCase(2304, 1, batch=2, **SHAPE).decode_inputs("cpu")
    assert inputs.base.tolist() == [[0, 2176], [4480, 6656]] and inputs.end.tolist() == [[2176, 2304]] * 2
    assert inputs.pools[0][0].shape == (2 * 4480, 64)


@pytest.mark.parametrize("streaming", [0, 1, 2])
@pytest.mark.parametrize("batch", [1, 2])
def test_every_rival_computes_the_same(on_cpu, monkeypatch, streaming, batch):
    monkeypatch.setattr(decode, "TOLERANCE", 5e-3)
    case = DecodeCase(2304, streaming, batch=batch, **SHAPE)
    found = decode.run_case(case, RIVALS, 400.0, "cpu")
    assert not [r["why"] for r in found if r["metric"] == records.LEFT_OUT]
    who = ["ours", "serial"] if streaming else ["ours", "cudnn", "flash2"]
    assert [r["who"] for r in found if r["metric"] == "time"] == who
    assert {r["value"] for r in found if r["metric"] == "eff"} == {case.nbytes / 2e9}


def test_a_rival_that_fails_or_differs_is_a_record(on_cpu):
    case = DecodeCase(2304, 0, **SHAPE)

    def fails(*_):
        raise RuntimeError("no kernel\nhere")

    def differs(case, inputs):
        return lambda: (decode.ours(case, inputs)()[0] + 1,)

    rivals = {"a": decode.Rival("", lambda case: True, fails), "b": decode.Rival("", lambda case: True, differs)}
    why = [r["why"] for r in decode.run_case(case, rivals, 400.0, "cpu") if r["metric"] == records.LEFT_OUT]
    assert why[0] == "RuntimeError: no kernel here" and why[1].startswith("its output differs from ours by")


def test_copies_take_turns():
    seen = []
    call = replay.in_turn([lambda: seen.append(0), lambda: seen.append(1)])
    for _ in range(3):
        call()
    assert seen == [0, 1, 0]
    assert [replay.copies_beyond_cache(n) for n in (1, 150_000_000, 200_000_000)] == [200_000_000, 2, 1]


def test_router_records(on_cpu, monkeypatch):
    """All four ways run on the CPU, where the kernel's two are PyTorch's as well."""
    monkeypatch.setattr(router, "host_microseconds", lambda call, rounds: call() and 7.0)
    monkeypatch.setattr(router, "launches", lambda call: call() and 3)
    monkeypatch.setattr(router, "LAYERS", 2)
    case = RouteCase(300, 2, 32, 2, 64, "bf16")
    assert case.name == "route-300-b2" and RouteCase(1_048_576, 1, 32, 2, 64, "bf16").name == "route-1024k"
    found = router.run_case(case, ElasticConfig(), 400.0, "cpu")
    assert [r["who"] for r in found if r["metric"] == "time"] == ["fused", "torch", "fused-keys", "torch-keys"]
    assert {r["metric"]: r["value"] for r in found} == {"time": 2.0, "host time": 7.0, "launches": 3}
    again = router.run_case(case, ElasticConfig(), 400.0, "cpu", count=False)
    assert [r["metric"] for r in again] == ["time", "host time"] * 4


def test_reach_records(on_cpu, monkeypatch):
    """The kernel's place is its twin's on the CPU; a kernel that finds something else is not timed."""
    case = reach.ReachCase(2304, 4, 2, 64, "fp16")
    assert case.name == "reach-d64-2304" and reach.ReachCase(131_072, *reach.SHAPES[0]).name == "reach-128k"
    found = reach.run_reach(case, 400.0, "cpu")
    assert [r["who"] for r in found if r["metric"] == "time"] == ["reach", "reach-torch"]
    assert {r["value"] for r in found if r["metric"] == "eff"} == {2304 * 2 * 64 * 2 / 2e9}
    nothing = torch.zeros(1, 2)
    monkeypatch.setattr(reach, "reach", lambda *_: (nothing, nothing))
    found = reach.run_reach(case, 400.0, "cpu")
    assert [r["who"] for r in found if r["metric"] == "time"] == ["reach-torch"]
    (left_out,) = [r for r in found if r["metric"] == records.LEFT_OUT]
    assert left_out["who"] == "reach" and left_out["why"].startswith("its output differs from ours by 0.")


def test_keys_at_hand_are_the_gathered_ones():
    """Both starting points give the same routes."""
    case, config = RouteCase(300, 2, 32, 2, 64, "bf16"), ElasticConfig()
    layers = router.layers_of(case, config, "cpu")[:3]
    hidden = torch.randn(2, 300, 32, dtype=torch.bfloat16)
    of_pass = router.ForwardPass(router.batch_layout(2, 300, 0, hidden.device), config)
    with torch.inference_mode():
        plans = [[call().mode_NK for call in f(layers, hidden, of_pass)] for f in (router.whole, router.from_keys)]
    assert all(torch.equal(a, b) for a, b in zip(*plans, strict=True))


def test_a_kernel_that_decides_otherwise_is_left_out(on_cpu, monkeypatch):
    monkeypatch.setattr(router, "host_microseconds", lambda call, rounds: 7.0)
    monkeypatch.setattr(router, "launches", lambda call: 3)
    monkeypatch.setattr(router, "disagreement", lambda *_: "its output differs from ours in layer 0")
    monkeypatch.setattr(router, "LAYERS", 1)
    found = router.run_case(RouteCase(300, 1, 32, 2, 64, "bf16"), ElasticConfig(), 400.0, "cpu")
    assert [r["who"] for r in found if r["metric"] == records.LEFT_OUT] == ["fused", "fused-keys"]
    assert [r["who"] for r in found if r["metric"] == "time"] == ["torch", "torch-keys"]


def test_tables_name_the_unit_of_a_rate(on_cpu):
    found = [{**r, **STAMP} for r in decode.run_case(DecodeCase(2304, 1, **SHAPE), RIVALS, 400.0, "cpu")]
    assert tables.cells(found)[0] == ["case", "ours ms (TB/s)", "serial ms (TB/s)"]
    assert tables.cells(found)[1] == [["streaming-1of2-d64-2304-fp16", "2.000 (0.00)", "2.000 (0.00)"]]
    bare = [{k: v for k, v in r.items() if k != "why"} for r in found if r["metric"] == "time"]
    assert tables.cells(bare) == (["case", "ours ms", "serial ms"], [[found[0]["case"], "2.000", "2.000"]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["decode", "--lengths", "1000"], "length 1000 is not a positive multiple of 128"),
        (["decode", "--msr", "0.3"], "--msr 0.3 is 2.4 of 8 KV heads"),
        (["decode", "--batch", "0"], "--batch 0; expected at least 1 sample"),
        (["decode", "--contestants", "cudn"], "invalid choice: 'cudn'"),
        (["decode"], "needs an NVIDIA GPU"),
        (["router", "--lengths", "0"], "must be at least 1"),
        (["router", "--reach-lengths", "0"], "must be at least 1"),
        (["router", "--lengths", "--reach-lengths"], "nothing to time"),
        (["router"], "needs an NVIDIA GPU"),
    ],
)
def test_what_does_not_fit_is_named(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        code = cli.main(["bench", *options])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err
