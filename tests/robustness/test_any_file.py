"""Files that somebody cut, edited or wrote by hand - a checkpoint's elastic.json, calibrations, manifests - are read as
what they say or refused in one line that names them; `ELASTIC_EXAMPLES=2000` looks at more examples than the suite.
"""

import copy
import json
import warnings

import pytest
import torch
from hypothesis import given

from elastic.config import ElasticConfig
from elastic.data.datamodule import MixtureDataModule
from elastic.data.shards import MANIFEST, SPLITS, sources_of, verify
from elastic.files import unsealed
from elastic.model.attach import attach, elastic_config, is_attached
from elastic.model.checkpoint import METADATA, load_into, read_elastic, save_elastic
from elastic.routing.calibration import Calibration, Curve, read_calibration
from tests.helpers.damage import examples, files_of, refusal
from tests.helpers.models import random_ids, small_config, tiny_model
from tests.helpers.training import build_data

# -- a checkpoint's elastic.json


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = attach(tiny_model(), small_config())
    return save_elastic(tmp_path_factory.mktemp("checkpoint") / "ck", model, "tiny", recipe={"step": 3})


def read_twice(folder, model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # another backbone of the same shape
        return read_elastic(folder), load_into(model, folder)


def test_a_checkpoint(checkpoint):
    file = checkpoint / METADATA
    good, model, ids = unsealed(file.read_text()), tiny_model(), random_ids(1, 12)

    @examples(150)
    @given(files_of(good))
    def holds(data):
        file.write_bytes(data)
        fresh = copy.deepcopy(model)
        try:
            values, fresh = read_twice(checkpoint, fresh)
        except ValueError as error:
            refusal(error, checkpoint)
            assert not is_attached(fresh)
            return
        assert isinstance(values["backbone"], str) and isinstance(values["recipe"], dict)
        told = json.loads(data.decode("utf-8-sig"))["config"]
        told.setdefault("router", {}).setdefault("pool_over", "prompt")
        assert elastic_config(fresh) == ElasticConfig.from_dict(told)
        with torch.no_grad():
            assert bool(torch.isfinite(fresh(ids).logits).all())

    holds()


# -- calibration files


def calibration():
    curve = Curve((0.0, 0.5, 1.0), (0.0, 0.01, 0.3), {"a": (0.0, 0.01, 0.3), "b": (0.0, 0.02, 0.4)})
    shape = {"model_type": "llama", "num_layers": 2, "num_kv_heads": 2, "head_dim": 16, "vocab_size": 97}
    sparse = {"sink": 4, "window": 16, "block": 4}
    provenance = {"backbone": "tiny", "architecture": shape, "sparse": sparse, "by": "gradient", "data": "here"}
    return Calibration(((0.3, 0.01), (0.0, 0.2)), (2, 1, 3, 0), curve, provenance)


def test_a_calibration(tmp_path):
    file = tmp_path / "cal.json"
    calibration().write(file)

    @examples(150)
    @given(files_of(json.loads(file.read_text())))
    def holds(data):
        file.write_bytes(data)
        try:
            found = read_calibration(file)
        except ValueError as error:
            refusal(error, file)
            return
        told = json.loads(data.decode())
        assert [list(row) for row in found.need] == told["need"] and list(found.order) == told["order"]
        assert list(found.curve.kl) == told["curve"]["kl"] and 0 <= found.level() <= 1
        assert found.backbone == told["backbone"] and found.sparse.window == told["sparse"].get("window", 2048)
        assert found.routes(0.5).sum() == 2 and found.routes().shape == (2, 2)
        again = file.with_suffix(".again")
        found.write(again)
        assert read_calibration(again) == found
        try:
            found.check_backbone(calibration().provenance["architecture"], file)
        except ValueError as error:
            refusal(error, file)

    holds()


# -- manifests of packed data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_data(tmp_path_factory.mktemp("manifest"), per_task=8)


def test_a_manifest(data):
    file = data / MANIFEST
    good = file.read_bytes()

    @examples(150)
    @given(files_of(unsealed(good.decode())))  # as earlier versions wrote them: a checksum refuses every change
    def holds(damage):
        file.write_bytes(damage)
        try:
            found = verify(data)
            MixtureDataModule(str(data)).setup("fit")
        except ValueError as error:
            refusal(error, data)
            return
        assert found == json.loads(damage.decode())
        assert set(found["splits"]) <= set(SPLITS) and found["seq_length"] > 0
        assert isinstance(found["tokenizer"]["name"], str) and isinstance(found["tokenizer"]["sha256"], str)
        for split in found["splits"]:
            assert all(isinstance(name, str) for name in sources_of(found, split))

    holds()
    file.write_bytes(good)
