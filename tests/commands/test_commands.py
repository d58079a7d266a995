"""The commands generate and doctor, called as the `elastic` command calls them."""

import io
import json
import math
import sys

import pytest
import torch

from elastic.commands import doctor, generate
from elastic.model import loading
from elastic.model.attach import attach
from elastic.model.checkpoint import METADATA, save_elastic
from tests.helpers.models import small_config, varied_routers

PROMPT = "f4 f5 " * 30 + "key k3 1 2 3 4 " + "f6 " * 20 + "find k3"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = attach(loading.load_backbone("tiny")[0], small_config())
    varied_routers(model)
    return save_elastic(tmp_path_factory.mktemp("ck") / "ck", model, "tiny")


def run(checkpoint, *options):
    return generate.main(["--checkpoint", str(checkpoint), "--max-new-tokens", "5", *map(str, options)])


def test_text_goes_to_stdout_and_the_report_to_stderr(checkpoint, capsys):
    assert run(checkpoint, "--prompt", PROMPT) == 0
    out, err = capsys.readouterr()
    model, tokenizer = loading.load_backbone("tiny")
    from elastic.inference.generate import generate as answer
    from elastic.model.checkpoint import load_into

    result = answer(load_into(model, checkpoint), tokenizer, PROMPT, max_new_tokens=5)[0]
    assert out.split() == result.text.split()
    assert "head 0" in err and "MSR" in err and "backend torch (cpu)" in err


def test_all_outputs(checkpoint, tmp_path, capsys):
    files = ("--report-json", tmp_path / "r.json", "--heatmap", tmp_path / "r.png")
    assert run(checkpoint, "--prompt", PROMPT, "--dense", "--sparsity-bias", "1e6", *files) == 0
    assert json.loads((tmp_path / "r.json").read_text())["msr"] == 1.0
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    out, err = capsys.readouterr()
    assert "all heads full:" in err and "tokens are the same with all heads full" in err
    assert out.count("\n") == 2  # the routed and the dense answer


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_reading_a_prompt_shows_progress_on_a_terminal(checkpoint, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(checkpoint, "--prompt", PROMPT) == 0
    assert "reading the prompt:   0%|" in terminal.getvalue() and "/3 [" in terminal.getvalue()
    monkeypatch.undo()
    assert run(checkpoint, "--prompt", PROMPT) == 0
    assert "reading the prompt" not in capsys.readouterr().err


def test_both_kinds_of_cache_give_the_same_answer(checkpoint, capsys):
    said = {}
    for kind in ("full", "elastic"):
        assert run(checkpoint, "--prompt", PROMPT, "--kv-cache", kind) == 0
        out, err = capsys.readouterr()
        assert f"the {kind} cache holds" in err
        said[kind] = out
    assert said["full"] == said["elastic"]


def test_prompts_in_pieces(checkpoint, capsys, monkeypatch):
    assert run(checkpoint, "--prompt", PROMPT, "--prefill-chunk-size", "0") == 2
    assert "prefill_chunk_size=0 is not a whole number of 1 or more tokens" in capsys.readouterr().err
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run(checkpoint, "--prompt", PROMPT, "--prefill-chunk-size", "8") == 0
    assert terminal.getvalue().count("reading the prompt:   0%|") > 2  # once more for every piece


@pytest.mark.parametrize("options", [["-"], ["--prompt", "-"]])
def test_prompt_from_standard_input(checkpoint, capsys, monkeypatch, options):
    run(checkpoint, "--prompt", PROMPT)
    expected = capsys.readouterr()
    for mark in ("", "\ufeff"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(mark + PROMPT))
        assert run(checkpoint, *options) == 0
        assert capsys.readouterr() == expected


@pytest.mark.parametrize("options", [["-"], ["--prompt", "-"], ["--prompt-file"]])
def test_bytes_that_are_not_utf8_are_named(checkpoint, options, capsys, monkeypatch, tmp_path):
    file, wrong = tmp_path / "p.txt", PROMPT.encode() + b" caf\xe9"
    file.write_bytes(wrong)
    for errors in ("strict", "surrogateescape"):  # as the locale has it
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(wrong), "utf-8", errors))
        given = [*options, str(file)] if options == ["--prompt-file"] else options
        assert run(checkpoint, *given) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and ("not UTF-8" in error)
        if errors == "strict":
            where = f"--prompt-file {file}" if options == ["--prompt-file"] else "standard input"
            assert f"{where} is not UTF-8 (byte {len(wrong) - 1}); convert it" in error


def test_prompt_from_a_file(checkpoint, capsys, tmp_path):
    run(checkpoint, "--prompt", PROMPT)
    expected = capsys.readouterr()
    for encoding in ("utf-8", "utf-8-sig"):  # without and with a byte order mark
        (tmp_path / "p.txt").write_text(PROMPT, encoding=encoding)
        assert run(checkpoint, "--prompt-file", tmp_path / "p.txt") == 0
        assert capsys.readouterr() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "caf\udce9"], "the prompt has half a surrogate pair, or a byte that is not UTF-8"),
        (["--prompt", "caf\udce9", "--raw"], "the prompt has half a surrogate pair, or a byte that is not UTF-8"),
        (["--prompt", PROMPT, "--max-new-tokens", "0"], "max_new_tokens=0 is not a whole number"),
        (["--prompt", PROMPT, "--max-new-tokens", "5000"], "the model reads at most"),
        (["--prompt", PROMPT, "--sparsity-bias", "nan"], "sparsity_bias=nan is not a finite number"),
        (["--prompt", PROMPT, "--dtype", "int8"], "dtype='int8' is not supported"),
        (["--prompt", PROMPT, "--device", "toaster"], "device='toaster' is not a torch device"),
        (["--prompt", PROMPT, "--backbone", "./none"], "no backbone './none'"),
        (["--prompt-file", "/nonexistent/p.txt"], "--prompt-file /nonexistent/p.txt: no such file"),
        (["--prompt", PROMPT, "--heatmap", "r.jpg"], "--heatmap r.jpg does not end in .png"),
        (["--prompt", PROMPT, "--report-json", "/nonexistent/r.json"], "the folder /nonexistent does not exist"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(checkpoint, capsys, options, message):
    assert run(checkpoint, *options) == 2
    out, err = capsys.readouterr()
    assert err.startswith("elastic generate: error: ") and message in err
    assert err.count("\n") == 1
    assert not out


def test_a_missing_or_damaged_checkpoint(checkpoint, capsys, tmp_path):
    assert run(tmp_path / "none", "--prompt", PROMPT) == 2
    assert f"no checkpoint at {tmp_path / 'none'}" in capsys.readouterr().err
    (tmp_path / METADATA).write_text("{")
    (tmp_path / "router.safetensors").write_bytes(b"")
    assert run(tmp_path, "--prompt", PROMPT) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_prompt_file_that_is_not_text(checkpoint, capsys, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"f1 \xff")
    assert run(checkpoint, "--prompt-file", tmp_path / "p.txt") == 2
    assert "is not UTF-8 (byte 3); convert it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "one of the arguments --prompt --prompt-file - is required"),
        (["--prompt", "a", "-"], "not allowed with argument"),
        (["--prompt", "a", "--max-new-tokens", "x"], "invalid int value: 'x'"),
        (["--prompt", "a", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_options(checkpoint, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        run(checkpoint, *options)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "--help" in err


def test_doctor(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    assert "OK    self-check" in out and "of the oracle" in out
    assert "OK    stock model" in out
    assert "layer parts" in out and "a GPU runs them fused" in out
    assert "The CPU path works." in out


def test_doctor_json(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cpu_path"] is True
    names = [check["name"] for check in report["checks"]]
    assert {"python", "torch", "transformers", "lightning", "self-check", "CuPy", "NVRTC"} <= set(names)
    assert {check["status"] for check in report["checks"]} <= {"OK", "FAIL", "--"}


def test_doctor_finds_wrong_attention(capsys, monkeypatch):
    from elastic.attention import reference

    right = reference.routed_attention
    monkeypatch.setattr(reference, "routed_attention", lambda *args: right(*args) * 1.01)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "FAIL  self-check" in out and "-> allowed is 2e-05; report it" in out
    assert "The CPU path does not work" in out


def test_doctor_finds_gradients_that_are_no_numbers(capsys, monkeypatch):
    """The output is right, so that the largest error in Python's order would be."""
    right = torch.autograd.grad
    broken = iter([lambda *found: (found[0] * math.nan, *found[1:])])
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *args, **kwargs: next(broken, lambda *found: found)(*right(*args, **kwargs))
    )
    assert doctor.main([]) == 1
    assert "FAIL  self-check" in capsys.readouterr().out


def test_doctor_finds_a_missing_and_an_old_package(capsys, monkeypatch):
    right = doctor.importlib.metadata.version

    def version(name):
        if name == "datasets":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return "5.1.0" if name == "transformers" else right(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    missing = next(i for i, line in enumerate(lines) if "datasets" in line)
    assert lines[missing].startswith("FAIL") and "pip install 'datasets>=4'" in lines[missing + 1]
    assert any(line.startswith("FAIL  transformers") and "5.1.0, but this project needs" in line for line in lines)


def test_doctor_reports_a_crash_as_a_line(capsys, monkeypatch):
    def boom(*_):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(loading, "load_backbone", boom)
    assert doctor.main([]) == 1
    assert "FAIL  stock check" in (out := capsys.readouterr().out) and "RuntimeError: no luck" in out
