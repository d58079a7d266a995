"""The format of calibration files: what is written is read, what does not fit is refused, levels follow the curve."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from elastic.config import SparseConfig
from elastic.routing.calibration import Calibration, Curve, agreement, read_calibration
from elastic.routing.methods import parse_method
from tests.helpers.training import ROOT

SHAPE = {"model_type": "qwen3", "num_layers": 2, "num_kv_heads": 2, "vocab_size": 64}
SPARSE = SparseConfig(sink=4, window=32, block=4)


def made(need=((0.3, 0.01), (0.0, 0.2)), order=(2, 1, 3, 0), kl=(0.0, 0.01, 0.019, 0.3, 1.2), **more):
    curve = Curve((0.0, 0.25, 0.5, 0.75, 1.0), kl, {"a [1]": kl, "b": kl})
    provenance = {"backbone": "tiny", "architecture": SHAPE, "sparse": vars(SPARSE), "by": "gradient", **more}
    return Calibration(need, order, curve, provenance)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cal.json"
    made().write(path)
    return path


def test_what_is_written_is_read(file):
    assert read_calibration(file) == made()
    assert read_calibration(file).sparse == SPARSE
    before = file.read_bytes()
    read_calibration(file).write(file)
    assert file.read_bytes() == before
    assert " [0.3, 0.01],\n" in file.read_text() and '"order": [2, 1, 3, 0]' in file.read_text()


def test_levels_stay_within_the_budget():
    assert made().level() == 0.5
    assert made().level(0.3) == 0.75 and made().level(2) == 1.0 and made().level(0.001) == 0.0
    assert made(kl=(0.0, 0.05, 0.01, 0.3, 1.2)).level() == 0.0, "what is cheap only after a dear level does not count"
    assert made(kl=(0.1, 0.1, 0.1, 0.3, 1.2)).level() == 0.0


def test_what_route_0_costs_by_itself_is_not_counted():
    sparse = vars(SparseConfig(route0="xattention", route1="streaming"))
    found = made(kl=(0.1, 0.1, 0.119, 0.3, 1.2), sparse=sparse)
    assert (found.floor, found.level(), found.level(0.25)) == (0.1, 0.5, 0.75)
    assert made(kl=(0.1, 0.1, 0.119, 0.3, 1.2)).floor == 0.0, "full attention costs nothing"


def test_routes_follow_the_order(file):
    assert made().routes(0.25).tolist() == [[0, 0], [1, 0]]
    assert made().routes(0.75).tolist() == [[0, 1], [1, 1]]
    assert made().routes().tolist() == [[0, 1], [1, 0]]
    assert made().routes(0).sum() == 0 and made().routes(1).sum() == 4
    for name in (f"static:{file}", f"static:{file}@0.75", f"static:{file}@0"):
        method = parse_method(name)
        assert torch.equal(method.routes(2, 2), made().routes(method.msr))
        assert torch.equal(method.routes(2, 2, SHAPE), made().routes(method.msr))


def test_other_modes_are_refused_and_other_sizes_where_the_file_chooses_the_level(file):
    def routes(sparse, at=""):
        return parse_method(f"static:{file}{at}").routes(2, 2, SHAPE, sparse)

    other = replace(SPARSE, route1="xattention", stride=4)
    for at in ("", "@0.5"):
        with pytest.raises(
            ValueError, match=r"cal\.json is of heads that choose between full and streaming, .* full and xatt"
        ):
            routes(other, at)
    wide = replace(SPARSE, window=64, sink=0)
    with pytest.raises(ValueError, match="was measured with sink 4, window 32, but heads have sink 0, window 64 here"):
        routes(wide)
    assert routes(wide, "@0.5").sum() == 2 and routes(SPARSE).sum() == 2
    assert routes(replace(SPARSE, stride=1, threshold=0.5, block=2**2)).sum() == 2, "what no head reads"
    made(sparse=vars(other)).write(file)
    assert routes(other, "@0.25").sum() == 1 and routes(replace(other, window=64)).sum() == 2
    with pytest.raises(ValueError, match=r"measured with threshold 0\.9, but heads have threshold 0\.5"):
        routes(replace(other, threshold=0.5))
    with pytest.raises(ValueError, match="between full and xattention, but here they choose between full and stream"):
        routes(SPARSE, "@0.5")


def test_another_architecture_is_refused_by_both_names(file):
    method = parse_method(f"static:{file}@0.5")
    with pytest.raises(
        ValueError, match=r"cal.json is of 'tiny' with num_layers=2, but this backbone has num_layers=3"
    ):
        method.routes(3, 2)
    with pytest.raises(ValueError, match="with model_type=qwen3, but this backbone has model_type=llama"):
        method.routes(2, 2, {**SHAPE, "model_type": "llama"})
    assert method.routes(2, 2, {**SHAPE, "vocab_size": 65}).sum() == 2, "more words do not change heads"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2, this version reads format 1"),
        ({"order": [0, 1, 2, 2]}, "order does not name every head once"),
        ({"need": [[0.1], [0.2]]}, "need is not a table of 2 layers and 2 KV heads"),
        ({"need": [[0.1, float("nan")], [0.2, 0.1]]}, "need holds NaN or infinity"),
        ({"need": [[0.1, "x"], [0.2, 0.1]]}, "damaged"),
        ({"curve": {"msr": [0, 1], "kl": [0], "sources": {}}}, "not as many as its values"),
        ({"curve": {"msr": [1, 0], "kl": [0, 1], "sources": {}}}, "levels are not ascending"),
        ({"curve": None}, "damaged"),
        ({"sparse": {"window": 5}}, "is not a multiple of sparse.block"),
        ({"architecture": None}, "damaged"),
        ({"backbone": None}, "backbone' is missing"),
        ({"by": 3}, "damaged"),
    ],
)
def test_broken_files_are_refused(file, change, message):
    values = {**json.loads(file.read_text()), **change}
    file.write_text(json.dumps({key: value for key, value in values.items() if key != "backbone" or value}))
    with pytest.raises(ValueError, match=message):
        read_calibration(file)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not a calibration file"), ("{}", "need` is missing"), ("[1]", "need` is missing")]
)
def test_other_files_are_refused(file, text, message):
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_calibration(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no calibration file at .*absent.json; `elastic calibrate"):
        read_calibration(tmp_path / "absent.json")


def test_agreement():
    reference = made()  # most needed: 0 (0.3), then 3 (0.2), 1 (0.01), 2 (0)
    itself = agreement(reference, reference, 0.5)
    assert (itself.heads, itself.shared, itself.covered) == (2, 1, 1)
    other = replace(made(), order=(2, 3, 1, 0))  # keeps 1 and 0
    found = agreement(other, reference, 0.5)
    assert (found.heads, found.shared) == (2, 0.5) and found.covered == pytest.approx(0.31 / 0.5)
    with pytest.raises(ValueError, match="2 layers of 2 KV heads and of 1 layers of 2 KV heads cannot be compared"):
        agreement(other, replace(other, need=((0.1, 0.2),)))
    with pytest.raises(ValueError, match="is 0 heads"):
        agreement(other, reference, 0.1)


def test_reading_needs_no_torch(file):
    code = f"import sys; from elastic.routing.calibration import read_calibration as r; r({str(file)!r}).level(); "
    done = subprocess.run(
        [sys.executable, "-c", f"{code} assert 'torch' not in sys.modules"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
