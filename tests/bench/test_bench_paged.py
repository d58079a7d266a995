"""`elastic bench paged` without a GPU: cases, contestants against each other, records, factors, messages."""

import types

import pytest
import torch

from elastic import cli
from elastic.bench import paged, records, tables
from elastic.bench.paged import DECODE, LAYOUTS, PREFILL, PagedCase, Rival

SHAPE = {"heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": "fp16"}
STAMP = {"gpu": "a GPU", "kernel": "a kernel", "versions": {"torch": "2"}, "commit": "abc", "command": "elastic bench"}


@pytest.fixture
def on_cpu(monkeypatch):
    """A graph is its call, and a clock that says 1, 2, 3 ms for the contestants in their order."""
    monkeypatch.setattr(paged, "captured", lambda call, _: types.SimpleNamespace(replay=call))
    monkeypatch.setattr(
        paged, "measure_in_turn", lambda calls, _: {name: [n + 1.0] * 3 for n, name in enumerate(calls)}
    )


def test_cases_say_what_they_are() -> None:
    case = PagedCase(65_536, 6)
    assert case.name == "prefill-streaming-6of8-64k-page16" and case.properties()["kind"] == PREFILL
    case = PagedCase(131_072, batch=8, kind=DECODE, page=64, layout="heads")
    assert case.name == "decode-dense-128k-b8-page64-heads" and case.nbytes == 2 * 8 * 8 * 131_072 * 128 * 2


@pytest.mark.parametrize("kind", [PREFILL, DECODE])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("streaming", [0, 1])
def test_all_contestants_compute_the_same(on_cpu, monkeypatch, kind: str, layout: str, streaming: int) -> None:
    monkeypatch.setattr(paged, "TOLERANCE", 1e-5)
    case = PagedCase(2432, streaming, batch=2 if kind == DECODE else 1, kind=kind, layout=layout, **SHAPE)
    found = paged.run_case(case, {}, 400.0, "cpu")
    assert not [r["why"] for r in found if r["metric"] == records.LEFT_OUT]
    who = ["ours", "dense", "contiguous"] if streaming else ["ours", "contiguous"]
    assert [r["who"] for r in found if r["metric"] == "time"] == who
    factors = {r["metric"]: r["value"] for r in found if r["unit"] == "x"}
    assert factors[paged.TIME_FACTOR] == (1 / 3 if streaming else 1 / 2)
    assert factors.get(paged.SPEED_FACTOR) == (2.0 if streaming else None)
    assert case.name in tables.terminal([{**r, **STAMP} for r in found])


def test_a_rival_that_fails_or_differs_is_a_record(on_cpu) -> None:
    def fails(*_):
        raise RuntimeError("pages of 16\nnot here")

    def differs(case, inputs):
        return lambda: (paged.contiguous(case, inputs)()[0] + 1,)

    case = PagedCase(256, 0, kind=DECODE, **SHAPE)
    rivals = {"a": Rival("", "torch", fails), "b": Rival("", "torch", differs)}
    why = [r["why"] for r in paged.run_case(case, rivals, 400.0, "cpu") if r["metric"] == records.LEFT_OUT]
    assert why[0] == "RuntimeError: pages of 16 not here" and why[1].startswith("its output differs from ours by")


def test_who_is_not_installed_is_said(monkeypatch) -> None:
    monkeypatch.setattr(paged, "RIVALS", {"none": Rival("", "no-such-package", lambda *_: None),
                                          "some": Rival("", "torch", lambda *_: None)})  # fmt: skip
    rivals, absent = paged.chosen(None)
    assert list(rivals) == ["some"] and absent == ["none"]
    with pytest.raises(ValueError, match="none needs no-such-package, which is not installed"):
        paged.chosen(["none"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch 0; expected at least 1 request"),
        (["--pages", "48"], "--pages 48; expected powers of two from 16 to 128"),
        (["--prefill-lengths", "--decode-lengths"], "no case to time"),
        (["--msr", "0.3"], "expected a whole number"),
        (["--prefill-lengths", "100"], "not a positive multiple of 128"),
    ],
)
def test_what_does_not_fit_is_named(capsys, options: list[str], message: str) -> None:
    assert cli.main(["bench", "paged", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(capsys) -> None:
    assert cli.main(["bench", "paged"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
