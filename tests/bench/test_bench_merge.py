"""`elastic bench merge`: runs that shared their work become one record file, one table and one picture."""

import pytest

from elastic import cli
from elastic.bench import records, tables


def bench(tmp_path, tag, *options):
    small = ["--device", "cpu", "--dtype", "float32", "--shapes", "tiny", "--new-tokens", "2", "--contestants", "cudnn"]
    sizes = ["--sink", "8", "--window", "16", "--block", "8", "--commit", "abc", "--out", str(tmp_path), "--tag", tag]
    assert cli.main(["bench", "e2e", *small, *sizes, *options]) == 0
    return tmp_path / f"{tag}.json"


def test_lengths_and_ratios_of_several_runs_stand_in_one_table(tmp_path, capsys):
    long = bench(tmp_path / "runs", "b", "--lengths", "128", "--msr", "0.5")
    short = bench(tmp_path / "runs", "a", "--lengths", "64", "--msr", "0", "0.5")
    more = bench(tmp_path / "runs", "c", "--lengths", "128", "--msr", "1")
    capsys.readouterr()
    merged = tmp_path / "page"
    assert cli.main(["bench", "merge", *map(str, (long, short, more)), "--out", str(merged), "--tag", "e2e"]) == 0
    found = records.load(merged / "e2e.json")
    repeated = sum(r["who"] == "cudnn" for r in records.load(more))
    assert f"{len(found)} records of 3 files, {repeated} measured again left out" in capsys.readouterr().out
    assert (merged / "e2e.png").read_bytes().startswith(b"\x89PNG")
    page = tables.markdown({"e2e": found}, ["page/e2e.png"])
    names = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| tiny")]
    of_64 = ["tiny 64 elastic MSR 0.00", "tiny 64 elastic MSR 0.50", "tiny 64 cudnn"]
    assert names == [*of_64, "tiny 128 elastic MSR 0.50", "tiny 128 cudnn", "tiny 128 elastic MSR 1.00"]
    assert page.count("- `elastic bench e2e") == 3 and page.count(", commit abc") == 1
    assert "![e2e](page/e2e.png)" in page
    timed = {r["value"] for r in records.load(long) if r["metric"] == "first token" and r["who"] == "cudnn"}
    assert timed < {r["value"] for r in found if r["metric"] == "first token"}


def test_records_of_another_command_are_not_replaced(tmp_path, capsys):
    first = bench(tmp_path, "e2e", "--lengths", "64", "--msr", "0")
    again = bench(tmp_path, "e2e", "--lengths", "64", "--msr", "0", "--commit", "new")
    before = again.read_bytes()
    capsys.readouterr()
    words = ["--device", "cpu", "--shapes", "tiny", "--lengths", "128", "--out", str(tmp_path)]
    assert cli.main(["bench", "e2e", *words]) == 2
    err = capsys.readouterr().err
    assert "e2e.json holds records of `elastic bench e2e --device cpu --dtype" in err and "another --tag" in err
    assert first.read_bytes() == before
    first.write_text("[1, 2]")
    assert cli.main(["bench", "e2e", *words]) == 2
    assert first.read_text() == "[1, 2]"


def record(case="dense-8k", value=1.0, **about):
    made = {"gpu": "A", "kernel": "cpu", "versions": {}, "commit": "abc", "command": "elastic bench attention"}
    return {"case": case, "who": "ours", "metric": "time", "value": value, "unit": "ms", **made, **about}


@pytest.mark.parametrize("name", ["heads", "dtype", "gpu"])
def test_figures_that_a_table_cannot_tell_apart_are_not_merged(name):
    one, other = record(heads=32, dtype="bf16"), record(heads=32, dtype="bf16") | {name: "other"}
    assert records.merge([[one], [one]]) == ([one], 1)
    with pytest.raises(ValueError, match=f"time of ours in dense-8k was measured with {name} .* and other"):
        records.merge([[one], [other]])


def test_figures_of_several_shapes_and_lengths_are_all_kept():
    runs = [[record(shape=shape, timed_length=length)] for shape in "ab" for length in (1, 2)]
    merged, repeated = records.merge([*runs, runs[0]])
    assert len(merged) == 4 and repeated == 1
