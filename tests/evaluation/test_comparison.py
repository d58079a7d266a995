"""The table of an evaluation: paired differences as by hand, the same figures in Markdown, LaTeX and CSV."""

import csv
import io
import json
import re

import pytest
import torch

from elastic.evaluation import paper
from elastic.evaluation.comparison import Compared, compare, references
from elastic.evaluation.scores import row_of, sample_file
from elastic.routing.methods import parse_method
from elastic.training.paired import Interval, Resamples, difference

METHODS = ("dense", "static:a_b.json@0.6", "elastic:x&y@-2")
CELLS = (("ruler_vt", 1024), ("ruler_fwe", 1024), ("ruler_vt", 2048), ("ruler_fwe", 2048))


def written(out, scores, benchmark="ruler"):
    """Result files as the runner writes them; the rows of its table."""
    rows = []
    for (method, task, length), values in scores.items():
        origin = {"method": method, "task": task, "length": length, "protocol": [f"{benchmark} by hand"]}
        about = {"msr": 0.5, "esr_last": 0.1, "esr_all": 0.2, "prefill_seconds": 0.1, "tokens": 9}
        samples = [{"index": at, "score": value, **about} for at, value in values]
        file = sample_file(out, method, task, length)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(line) + "\n" for line in (origin, *samples)))
        rows.append(row_of(origin, samples))
    return rows


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    return {
        (method, *cell): list(enumerate((torch.rand(20, generator=generator) < share).double().tolist()))
        for method, share in zip(METHODS, (0.9, 0.7, 0.5), strict=True)
        for cell in CELLS
    }


def joined(scores, method, cells):
    return torch.tensor([value for cell in cells for _, value in scores[(method, *cell)]], dtype=torch.float64)


def test_differences_are_paired_and_every_task_and_length_counts_the_same(scores, tmp_path):
    found = compare(written(tmp_path, scores), tmp_path, METHODS[:2])
    assert len(found) == 3 * (2 + 1 + 4)
    mine = {(one.length, one.task, one.method): one for one in found}
    whole = mine[None, None, METHODS[2]]
    wanted = difference(
        joined(scores, METHODS[2], CELLS),
        joined(scores, "dense", CELLS),
        Resamples([str(at // 20) for at in range(80)]),
    )
    for name in ("value", "low", "high"):
        assert getattr(whole.ahead["dense"], name) == pytest.approx(getattr(wanted, name), abs=1e-12)
    assert whole.n == 80 and whole.score == pytest.approx(joined(scores, METHODS[2], CELLS).mean().item())
    assert mine[1024, "ruler_vt", METHODS[1]].ahead.keys() == {"dense"}
    one = mine[1024, None, METHODS[1]]
    by_hand = joined(scores, METHODS[1], CELLS[:2]).mean() - joined(scores, "dense", CELLS[:2]).mean()
    assert one.ahead["dense"].value == pytest.approx(by_hand.item()) and one.n == 40
    assert found == compare(written(tmp_path, scores), tmp_path, METHODS[:2])  # the same draws every time


def test_pairs_cancel_what_makes_a_sample_hard(tmp_path):
    """Two methods that differ in no sample have no interval to speak of, however much samples differ."""
    values = list(enumerate([0.0, 1.0] * 20))
    same = {(method, *CELLS[0]): values for method in METHODS[:2]}
    (_, static, *_) = compare(written(tmp_path, same), tmp_path, ["dense"])
    assert (static.ahead["dense"], static.half_width > 0.1) == (Interval(0.0, 0.0, 0.0), True)


def test_methods_on_other_samples_are_refused(scores, tmp_path):
    scores[(METHODS[1], *CELLS[1])] = scores[(METHODS[1], *CELLS[1])][:-1]
    with pytest.raises(ValueError, match=r"different samples of ruler_fwe in .*; evaluate them in one command"):
        compare(written(tmp_path, scores), tmp_path, ["dense"])


def test_what_others_are_compared_with():
    methods = [parse_method(name) for name in ("streaming", "static:a", "dense", "static:b@0.5")]
    assert references(methods, None) == ["dense", "static:a"] and references(methods[:1], None) == []
    assert references(methods, ["static:b@0.5", "streaming", "streaming"]) == ["static:b@0.5", "streaming"]
    with pytest.raises(ValueError, match="--against moba:3: it is not among the methods, which are streaming"):
        references(methods, ["moba:3"])


def test_three_formats_tell_the_same(scores, tmp_path):
    rows = written(tmp_path, scores)
    longbench = {(m, "longbench2", None): [(0, 1.0), (1, 0.0)] for m in METHODS}
    rows += written(tmp_path, longbench, "longbench2")
    found = compare(rows, tmp_path, METHODS[:2])
    files = paper.write_tables(found, METHODS[:2], ["Caveat: 100 % of x_1 | frozen"], tmp_path)
    assert [file.name for file in files] == ["comparison.md", "comparison.tex", "comparison.csv"]
    plain, tex, table = (file.read_text() for file in files)
    header, _, *lines = [line for line in plain.splitlines() if line.startswith("|")]
    assert header == "| method | MSR | 1K | 2K | mean | vs dense | vs static:a_b.json@0.6 |"
    assert {line.count(" | ") for line in lines} == {header.count(" | ")} and len(lines) == 2 * 4
    assert lines[0] == "| **ruler** | n | 40 | 40 | 80 |  |  |" and lines[4].startswith(
        "| **longbench2** | n |  |  | 2 |"
    )
    assert "Caveat: 100 % of x\\_1 \\| frozen" in plain
    records = list(csv.DictReader(io.StringIO(table)))
    assert len(records) == 3 * (7 + 2)
    for record in records:
        if not record["task"]:
            assert f"{100 * float(record['score']):.1f}" in plain
        assert (record["vs dense"] == "") == (record["method"] == "dense")
    whole = next(
        r for r in records if r["method"] == METHODS[2] and r["set"] == "ruler" and not r["length"] and not r["task"]
    )
    (line,) = (line for line in lines[:4] if METHODS[2].replace("_", "\\_") in line)
    shown = [float(x) for x in re.findall(r"-?\d+\.\d", line.split(" | ")[5])]
    assert shown == pytest.approx([100 * float(whole[f"vs dense{end}"]) for end in ("", ", low", ", high")], abs=0.051)
    assert line.split(" | ")[5].replace("-", "$-$") in tex
    assert r"\texttt{elastic:x\&y@$-$2}" in tex and r"static:a\_b.json" in tex and r"100 \% of x\_1" in tex
    body = tex[tex.index(r"\toprule") : tex.index(r"\bottomrule")]
    assert {len(re.findall(r"(?<!\\)&", row)) for row in body.split("\\\\")[:-1]} == {6} and body.count(
        r"\midrule"
    ) == 2


def compared(method, score, **ahead):
    return Compared("set", None, None, method, 3, score, 0.1, 0.5, 0.2, 0.1, ahead)


def test_marks_say_whose_interval_excludes_zero():
    apart, not_apart = Interval(-0.1, -0.2, -0.05), Interval(-0.1, -0.2, 0.05)
    found = [
        compared("dense", 1.0),
        compared("a", 0.9, dense=apart, b=not_apart),
        compared("b", 0.8, dense=apart, b=apart),
    ]
    (block,) = paper.blocks_of(found, ["dense", "b"])
    assert [line[2] for line in block.lines] == ["100.0", "90.0*", "80.0*†"]
    assert paper.tex("80.0*†") == r"80.0$^{*\dagger}$" and paper.tex("{a}\\~^$#") == (
        r"\{a\}\textbackslash{}\textasciitilde{}\textasciicircum{}\$\#"
    )


def test_a_table_without_references_has_scores_alone(scores, tmp_path):
    found = compare(written(tmp_path, scores), tmp_path, [])
    assert paper.header_of(found, [])[-1] == "mean" and "differences" not in paper.caption([])
    paper.write_tables(found, [], [], tmp_path)
    assert (tmp_path / "comparison.csv").read_text().splitlines()[0].endswith("prefill_seconds")
