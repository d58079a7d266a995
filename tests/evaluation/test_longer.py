"""`elastic eval --rope`: backbones beyond their own length, dense in the same table, levels that do not drift."""

import csv
import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytest.importorskip("wonderwords", reason="the extra `eval` is not installed")
from elastic import cli
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.data.context_length import context_length
from elastic.model.attach import attach, routers
from elastic.model.checkpoint import save_elastic
from elastic.model.loading import load_backbone
from tests.evaluation.test_packed_rows import sample, written

OWN, LENGTHS = 1024, (512, 1024, 2048, 4096)  # tokens that the tiny backbone reads, and those asked for


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Rows of every length, and level routers fitted to 300 to 1,000 tokens whose levels rise with the length."""
    folder = tmp_path_factory.mktemp("longer")
    data = written(folder / "data", [sample("needle", length - 3) for length in LENGTHS for _ in range(2)])
    model, _ = load_backbone("tiny")
    assert context_length(model.config) == OWN
    sparse = SparseConfig(sink=4, window=16, block=4)
    attach(model, ElasticConfig(RouterConfig(kind="level"), sparse))
    lengths = torch.linspace(300, 1000, 64)
    of_layers = routers(model)
    for layer, router in enumerate(of_layers):
        heads = router.rank.shape[0]
        place = (torch.arange(heads) * len(of_layers) + layer + 0.5) / (heads * len(of_layers))
        router.begin_in_order(place, 0.5)
        reach = torch.rand(64, router.mean.shape[0] - 1) * 0.01
        router.update_statistics(router.features(reach, lengths, sparse))
        with torch.no_grad():
            router.weight[-1] = 0.1
            router.outline_scale[:2] = 0.0  # length alone may be strange here
    return data, save_elastic(folder / "levels", model, "tiny")


def run(places, out, *more):
    data, checkpoint = places
    lengths = ["--lengths", ",".join(map(str, LENGTHS))]
    methods = ["--methods", "dense", f"elastic:{checkpoint}"]
    return cli.main(["eval", "--rows", f"own={data}", "--tasks", "own", *lengths, *methods, "--out", str(out), *more])


@pytest.mark.parametrize("scaling", ["yarn", "ntk"])
def test_levels_do_not_drift_beyond_the_lengths_that_they_were_fitted_to(places, tmp_path, scaling):
    assert run(places, tmp_path / "out", "--rope", scaling) == 0
    note = f"Beyond the length of tiny, its RoPE is stretched ({scaling}): 2048 tokens by 2, 4096 tokens by 4"
    assert note in (tmp_path / "out" / "summary.txt").read_text()
    with open(tmp_path / "out" / "comparison.csv") as table:
        rows = [row for row in csv.DictReader(table) if not row["task"] and row["length"]]
    msr = {int(row["length"]): float(row["msr"]) for row in rows if row["method"].startswith("elastic")}
    assert sum(row["method"] == "dense" for row in rows) == len(LENGTHS) == len(msr)
    assert all(float(row["prefill_seconds"]) > 0 for row in rows)
    assert msr[512] < msr[1024] < msr[2048] > msr[4096]  # the slope where it was fitted, then caution alone
    origins = {
        length: json.loads((tmp_path / "out" / "samples" / f"dense.own_needle.{length}.jsonl").open().readline())
        for length in LENGTHS
    }
    assert [origins[length].get("rope") for length in LENGTHS] == [None, None, f"{scaling}:2", f"{scaling}:4"]


def test_without_it_longer_rows_are_refused(places, tmp_path, capsys):
    assert run(places, tmp_path / "out") == 2
    assert "length 2048 is over the 1024 tokens that tiny reads" in capsys.readouterr().err
