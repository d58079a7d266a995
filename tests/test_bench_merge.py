"""`elastic bench merge`: runs that shared their work become one record file, one table and one picture."""

from elastic import cli
from elastic.bench import records, tables
from elastic.bench.methods import score_cells

FACTS = {"gpu": "g", "kernel": "k", "versions": {"torch": "2"}, "commit": "c"}


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
    assert page.count("- `elastic bench e2e") == 3 and page.count(", commit abc") == 1 and "![Timings of e2e]" in page
    timed = {r["value"] for r in records.load(long) if r["metric"] == "first token" and r["who"] == "cudnn"}
    assert timed < {r["value"] for r in found if r["metric"] == "first token"}


def test_methods_of_several_processes_stand_side_by_side():
    def run(source, **exact):
        shared = {"case": source, "metric": "exact", "unit": "share", "half": 0.1, "n": 5, "esr_all": 0.5, **FACTS}
        return [{**shared, "who": who, "value": value, "command": f"c {who}"} for who, value in exact.items()]

    one = [*run("needle_single", elastic=0.5, dense=0.9), *run("code_completion", elastic=0.4, dense=0.8)]
    two = [*run("needle_single", elastic=0.5, streaming=0.2), *run("code_completion", streaming=0.1)]
    found, repeated = records.merge([one, two, run("needle_single", **{"fa-xa": 0.7})])
    assert repeated == 1 and len(found) == 7
    header, rows = score_cells(found)
    assert header[3:] == ["elastic", "dense", "streaming", "fa-xa"]
    cells = {row[0]: row[3:] for row in rows}
    assert cells["needle_single"][3] == "0.700 ± 0.100 (0.50)"
    assert cells["mean of retrieval"] == ["0.500 (0.50)", "0.900 (0.50)", "0.200 (0.50)", "0.700 (0.50)"]
