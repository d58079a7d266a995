"""A server of the tiny model, shared by the tests of a file."""

import json

import pytest

from elastic.model.checkpoint import save_elastic
from elastic.model.loading import ASSETS


@pytest.fixture(scope="module")
def model():
    """The tiny backbone with fresh routers, and its tokenizer."""
    pytest.importorskip("fastapi", reason="needs the extra serve")
    from tests.helpers.server import tiny_model

    return tiny_model()


@pytest.fixture(scope="module")
def server(model):
    """Its address."""
    from tests.helpers.server import serving

    with serving(model) as address:
        yield address


@pytest.fixture(scope="module")
def endless(tmp_path_factory, model):
    """A checkpoint, and a backbone whose answers have no end."""
    folder = tmp_path_factory.mktemp("endless")
    for file in (ASSETS / "tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))
    return ["--checkpoint", str(save_elastic(folder / "checkpoint", model[0], "tiny")), "--backbone", str(folder)]
