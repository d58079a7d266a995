"""`elastic bench merge`: runs that shared their work become one record file, one table and one picture."""

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
