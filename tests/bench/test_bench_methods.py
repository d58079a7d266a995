"""The quality table of ways to run attention: the script that measures it, what its means mean, several processes."""

from elastic.bench import records
from elastic.bench.studies.methods import score_cells
from elastic.config import ElasticConfig
from elastic.model.attach import attach
from elastic.model.checkpoint import save_elastic
from tests.helpers.models import small_config, varied_routers
from tests.helpers.training import build_data
from tests.helpers.xattention import sparse_of

MADE_BY = {"gpu": "g", "kernel": "k", "versions": {"torch": "2"}, "commit": "c"}


def test_the_quality_script_writes_records_and_tables(tmp_path, capsys):
    from elastic.bench.records import load as load_records
    from elastic.bench.studies.methods import DENSITY
    from elastic.bench.tables import markdown
    from elastic.model import loading
    from tests.bench.methods import main

    model, _ = loading.load_backbone("tiny")
    attach(model, ElasticConfig(small_config().router, sparse_of("FA-XA")))
    varied_routers(model)
    checkpoint = save_elastic(tmp_path / "ck", model, "tiny")
    names = ["elastic", "dense", "xattention:0.3", "streaming", "elastic/xa-ssa"]
    words = ["--checkpoint", str(checkpoint), "--data", str(build_data(tmp_path)), "--out", str(tmp_path)]
    words += ["--dtype", "float32", "--batch-rows", "1", "--batches", "6", "--name", "own"]
    assert main([*words, "--methods", *names]) == 0
    names = [name.replace("elastic", "own") for name in names]
    found = load_records(tmp_path / "methods.json")
    assert found[0]["command"].endswith(
        "--methods elastic dense xattention:0.3 streaming elastic/xa-ssa --name own --dtype float32"
    )
    ratio = {(r["who"], r["metric"]): r["esr_all"] for r in found if r["case"] != DENSITY}
    assert {who for who, _ in ratio} == set(names) and ratio["dense", "exact"] == 0.0
    assert 0 < ratio["own", "loss"] < ratio["xattention:0.3", "loss"] < 1
    layers = {r["who"]: r["by_layer"] for r in found if r["case"] == DENSITY}
    assert set(layers) == {"own", "xattention:0.3", "own/xa-ssa"}
    assert all(0 < share < 1 for share in layers["xattention:0.3"])
    printed, page = capsys.readouterr().out, markdown({"methods": found})
    for text in (printed, page):
        assert all(name in text for name in (*names, "pairs visited", *{r["case"] for r in found} - {DENSITY}))
    loss = next(r for r in found if (r["who"], r["metric"]) == ("dense", "loss"))
    assert loss["unit"] == "nats a token" and loss["n"] > 0 and loss["half"] >= 0


def test_the_quality_table_means_what_counts_in_a_source():
    from elastic.bench.studies.methods import score_cells

    def record(case, who, metric, value, esr):
        return {"case": case, "who": who, "metric": metric, "value": value, "half": 0.1, "n": 5, "esr_all": esr}

    found = [
        record(case, who, metric, value * (2 if who == "streaming" else 1), 0.5 if who == "streaming" else 0.0)
        for who in ("dense", "streaming")
        for case, metric, value in (
            ("needle_single-4096", "exact", 0.3),
            ("needle_single-4096", "loss", 9.0),
            ("verbatim_copy", "accuracy", 0.1),
            ("continuation", "loss", 2.0),
        )
    ]
    header, rows = score_cells(found)
    assert header == ["source", "score", "n", "dense", "streaming"]
    assert rows == [
        ["mean of retrieval", "", "10", "0.200 (0.00)", "0.400 (0.50)"],
        ["mean of text", "", "5", "2.000 (0.00)", "4.000 (0.50)"],
        ["needle_single-4096", "exact", "5", "0.300 ± 0.100 (0.00)", "0.600 ± 0.100 (0.50)"],
        ["verbatim_copy", "accuracy", "5", "0.100 ± 0.100 (0.00)", "0.200 ± 0.100 (0.50)"],
        ["continuation", "loss", "5", "2.000 ± 0.100 (0.00)", "4.000 ± 0.100 (0.50)"],
    ]


def test_methods_of_several_processes_stand_side_by_side():
    def run(source, **exact):
        shared = {"case": source, "metric": "exact", "unit": "share", "half": 0.1, "n": 5, "esr_all": 0.5, **MADE_BY}
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
