"""A server of the tiny model, shared by the tests of a file."""

import pytest


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
