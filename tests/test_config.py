"""Configuration: round trips, and every rejected value with its message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import BLOCK_SIZES, ElasticConfig, RouterConfig, SparseConfig


@st.composite
def sparse_configs(draw) -> SparseConfig:
    block = draw(st.sampled_from(BLOCK_SIZES))
    modes = draw(st.permutations(["full", "streaming", "xattention"]))
    return SparseConfig(
        route0=modes[0],
        route1=modes[1],
        sink=block * draw(st.integers(0, 50)),
        window=block * draw(st.integers(1, 50)),
        block=block,
        granule=draw(st.sampled_from(["token", "block"])),
        stride=draw(st.sampled_from([s for s in (1, 2, 4, 8, 16) if block % s == 0])),
        threshold=draw(st.floats(0.01, 1.0)),
    )


@given(
    sparse_configs(),
    st.integers(1, 10_000),
    st.sampled_from(["running", "none"]),
    st.sampled_from(["input", "static"]),
    st.floats(-50, 50),
    st.booleans(),
)
def test_any_valid_config_survives_the_round_trip(sparse, pool, norm, kind, bias, dense_decode):
    config = ElasticConfig(RouterConfig(pool, norm, kind), sparse, bias, dense_decode)
    assert ElasticConfig.from_dict(config.to_dict()) == config
    assert hash(config) == hash(ElasticConfig.from_dict(config.to_dict()))


@given(st.integers(-5000, 5000), st.sampled_from(BLOCK_SIZES))
def test_windows_are_positive_multiples_of_the_block_or_refused(window, block):
    if window > 0 and window % block == 0:
        assert SparseConfig(window=window, block=block, sink=0).window == window
    else:
        with pytest.raises(ValueError, match=r"sparse\.window=.* is not a multiple of sparse\.block"):
            SparseConfig(window=window, block=block, sink=0)


def test_defaults_are_the_papers():
    config = ElasticConfig()
    assert config.sparse.name == "FA-SSA"
    assert (config.sparse.sink, config.sparse.window, config.sparse.block, config.router.pool_tokens) == (
        128,
        2048,
        128,
        100,
    )
    assert SparseConfig("full", "xattention").name == "FA-XA"
    assert SparseConfig("xattention", "streaming").name == "XA-SSA"
    assert SparseConfig("xattention", "streaming").has("xattention") and not SparseConfig().has("xattention")
    assert SparseConfig("xattention", "streaming", sink=256).dense == SparseConfig(sink=256)


BAD = {
    "window": (
        lambda: SparseConfig(window=2000),
        r"sparse\.window=2000 is not a multiple of sparse\.block=128.*1920 or 2048",
    ),
    "window zero": (lambda: SparseConfig(window=0), r"sparse\.window=0 is not a multiple .*use 128"),
    "sink": (lambda: SparseConfig(sink=100), r"sparse\.sink=100 is not a multiple of sparse\.block=128.*use 0 or 128"),
    "block": (lambda: SparseConfig(block=100), r"sparse\.block=100 is not supported; use one of 4, 8, 16, 32, 64, 128"),
    "float window": (
        lambda: SparseConfig(window=2048.0),
        r"sparse\.window=2048\.0 is a float, expected a whole number",
    ),
    "bool sink": (lambda: SparseConfig(sink=True), r"sparse\.sink=True is a bool"),
    "share": (
        lambda: ElasticConfig(gradient_share=0.3),
        r"gradient_share=0\.3 is not 1, 1/2, 1/3, .*0\.125 an estimate",
    ),
    "no share": (lambda: ElasticConfig(gradient_share=0.0), r"gradient_share=0\.0 is not 1, 1/2"),
    "mode": (lambda: SparseConfig(route1="local"), r"sparse\.route1='local' is not known; use one of full, streaming"),
    "one mode": (lambda: SparseConfig(route0="streaming"), "both 'streaming'; routing needs two different modes"),
    "granule": (lambda: SparseConfig(granule="row"), r"sparse\.granule='row' is not known; use one of token, block"),
    "stride": (
        lambda: SparseConfig(route1="xattention", stride=12),
        r"sparse\.stride=12 does not divide sparse\.block=128",
    ),
    "two choices": (
        lambda: SparseConfig("xattention", "moba"),
        r"sparse\.route0='xattention' and sparse\.route1='moba' both choose key blocks",
    ),
    "top_k": (lambda: SparseConfig(route1="nsa", top_k=0), r"sparse\.top_k=0 is below 1"),
    "chunk": (
        lambda: SparseConfig(route1="moba", chunk=100),
        r"sparse\.chunk=100 is not a multiple of sparse\.block=128 \(at least 128\); use 128",
    ),
    "min_budget": (lambda: SparseConfig(min_budget=1.5), r"sparse\.min_budget=1\.5 is a float"),
    "threshold": (lambda: SparseConfig(threshold=1.5), r"sparse\.threshold=1\.5 is not in \(0, 1\]"),
    "pool": (lambda: RouterConfig(pool_tokens=0), r"router\.pool_tokens=0 is below 1"),
    "offset": (lambda: RouterConfig(head_offset="yes"), r"router\.head_offset='yes' is not true or false"),
    "norm": (
        lambda: RouterConfig(feature_norm="batch"),
        r"router\.feature_norm='batch' is not known; use one of running, none",
    ),
    "bias": (lambda: ElasticConfig(sparsity_bias=float("nan")), "sparsity_bias=nan is not a finite number"),
    "a bias beyond floats": (lambda: ElasticConfig(sparsity_bias=10**400), "is not a finite number"),
    "a window beyond the kernels": (lambda: SparseConfig(window=2**31), "sparse.window=2147483648 is above 2147483647"),
    "an unprintable name": (lambda: ElasticConfig.from_dict({"a\nb": 1}), r"unknown setting 'a\\nb'; known"),
    "decode": (lambda: ElasticConfig(dense_decode="yes"), "dense_decode='yes' is a str, expected true or false"),
    "nested": (lambda: ElasticConfig(sparse={"sink": 0}), r"ElasticConfig\.sparse is a dict, expected SparseConfig"),
    "unknown": (
        lambda: ElasticConfig.from_dict({"sparce": {}}),
        "unknown setting sparce; known settings are router, sparse",
    ),
    "unknown nested": (
        lambda: ElasticConfig.from_dict({"sparse": {"local": 2048}}),
        r"unknown setting sparse\.local; known settings are sparse\.route0",
    ),
    "not a mapping": (lambda: ElasticConfig.from_dict({"sparse": [1]}), r"sparse\. is a list, expected a mapping"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_named(case):
    build, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        build()
