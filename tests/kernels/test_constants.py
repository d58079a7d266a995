"""Every number that Python and `cuda_src` share is the same on both sides."""

import importlib
import struct

import pytest

from elastic.kernels import devices, jit, params
from elastic.kernels.checks import HEAD_DIMS
from tests.kernels.cuda_constants import Constants, as_python

FORWARD, FORWARD_SM80 = "attention_forward_sm90.cu", "attention_forward_sm80.cu"
BACKWARD, ROWS = "attention_backward_sm90.cu", "attention_backward_rows.cu"
REACH, REACH_SM80 = "reach_sm90.cu", "reach_sm80.cu"
SELECT, DECODE, ROUTER = "xattention_select_sm90.cu", "attention_decode.cu", "route_prompt.cu"
# (file of cuda_src, its name, module below elastic, its name)
SAME = [
    (FORWARD, "kFull", "kernels.params", "FULL"),
    (FORWARD, "kStreaming", "kernels.params", "STREAMING"),
    (FORWARD, "kBlockSparse", "kernels.params", "BLOCK_SPARSE"),
    (FORWARD, "kTileM", "kernels.params", "QUERY_BLOCK"),
    (FORWARD, "kBlockN", "kernels.params", "KEY_BLOCK"),
    (FORWARD, "kHalf", "kernels.params", "HALF_BLOCK"),
    (FORWARD, "kConsumerWarps", "kernels.devices", "CONSUMER_WARPS"),
    (FORWARD_SM80, "kTileM", "kernels.params", "QUERY_BLOCK"),
    (FORWARD_SM80, "kThreads", "kernels.devices", "SM80_THREADS"),
    (BACKWARD, "kKeys", "kernels.params", "KEY_BLOCK"),
    (BACKWARD, "kTileElements", "kernels.params", "BACKWARD_TILE"),
    (BACKWARD, "kStages", "kernels.devices", "BACKWARD_STAGES"),
    (BACKWARD, "kConsumerWarps", "kernels.devices", "CONSUMER_WARPS"),
    (ROWS, "kThreads", "kernels.devices", "ROWS_THREADS"),
    (SELECT, "kRows", "kernels.params", "ROW_TILE"),
    (SELECT, "kCells", "kernels.params", "KEY_CELLS"),
    (SELECT, "kStages", "kernels.devices", "SELECTION_STAGES"),
    (SELECT, "kConsumerWarps", "kernels.devices", "CONSUMER_WARPS"),
    (SELECT, "kUnits", "kernels.xattention_oracle", "UNITS"),
    (DECODE, "kRows", "kernels.devices", "MAX_GROUP"),
    (DECODE, "kTokens", "kernels.devices", "DECODE_TOKENS"),
    (REACH, "kQueries", "kernels.params", "REACH_QUERIES"),
    (REACH, "kRecent", "kernels.params", "REACH_RECENT"),
    (REACH, "kTile", "kernels.params", "REACH_TILE"),
    (REACH, "kBlockRows", "kernels.devices", "REACH_BLOCK"),
    (REACH, "kPartBytes", "kernels.devices", "REACH_PART"),
    (REACH_SM80, "kSharedBytes", "kernels.devices", "REACH_SHARED"),
    (ROUTER, "kRows", "kernels.route_prompt", "_ROWS"),
    (ROUTER, "kThreads", "kernels.route_prompt", "_THREADS"),
    (ROUTER, "kEpsilon", "routing.router", "EPSILON"),
    (ROUTER, "kLimit", "routing.router", "STANDARDISED_LIMIT"),
    (ROUTER, "kLeastSamples", "routing.router", "MIN_STATISTICS"),
]
SIZES = [
    (FORWARD, "Params", params.PARAMS_BYTES),
    (BACKWARD, "BackwardParams", params.BACKWARD_BYTES),
    (SELECT, "SelectParams", params.SELECTION_BYTES),
    (REACH, "ReachParams", params.REACH_BYTES),
    (FORWARD, "PagedParams", params.PAGED_BYTES),
]


def constants(file: str, head_dim: int = 128, **sizes: int) -> Constants:
    macros = {
        "STRIDE": 16,
        "BLOCK": 128,
        "WARPS": 8,
        "STAGES": 6,
        "PARTS": 8,
        "BLOCKS": 2,
        "HEAD_DIM": head_dim,
        **sizes,
    }
    return Constants(file, kHeadDim=head_dim, **{f"ELASTIC_{name}": value for name, value in macros.items()})


@pytest.mark.parametrize(("file", "name", "module", "python"), SAME, ids=lambda value: str(value))
def test_both_sides_have_the_same_number(file: str, name: str, module: str, python: str) -> None:
    assert constants(file).value(name) == getattr(importlib.import_module(f"elastic.{module}"), python)


@pytest.mark.parametrize(("file", "name", "size"), SIZES)
def test_structures_have_the_asserted_size(file: str, name: str, size: int) -> None:
    assert constants(file).sizes[name] == size


@pytest.mark.parametrize(
    ("file", "name", "module", "python"),
    [
        (DECODE, "DecodeParams", "attention_decode", "PARAMS"),
        (DECODE, "PagedDecodeParams", "paged_decode", "_PARAMS"),
        (ROUTER, "RouteParams", "route_prompt", "_PARAMS"),
    ],
)
def test_packed_structures_have_the_asserted_size(file: str, name: str, module: str, python: str) -> None:
    packed: struct.Struct = getattr(importlib.import_module(f"elastic.kernels.{module}"), python)
    assert constants(file).sizes[name] == packed.size


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_launches_have_the_shared_memory_that_the_kernels_lay_out(head_dim: int) -> None:
    """For three samples: the tiles begin at a multiple of 1,024 bytes, and every sample has its schedule entries."""
    forward, backward = constants(FORWARD, head_dim), constants(BACKWARD, head_dim)
    select, sm80 = constants(SELECT, head_dim), constants(FORWARD_SM80, head_dim)
    assert forward.value("kStages") == devices.FORWARD_STAGES[head_dim]
    found = devices.launch_config((9, 0), 132, head_dim, 3, 9)
    assert found.shared_bytes == 1024 + forward.value("SharedLayout.segments") + 3 * 3 * 16
    found = devices.launch_config((8, 0), 108, head_dim, 3, 9)
    rows = sm80.value("kTileM") + 2 * sm80.value("kHalf")
    assert found.shared_bytes == rows * sm80.value("kRowBytes") + 16 + 3 * 3 * 16
    found = devices.backward_config(132, head_dim, 3, 9)
    assert found.shared_bytes == 1024 + backward.value("BackwardLayout.first") + 16 + 3 * 3 * 16
    chosen = devices.selection_config(132, 3, 9, 64)
    units = 4 * select.value("kConsumerWarps") * chosen.shared_units
    assert chosen.shared_bytes == 1024 + select.value("SelectLayout.units") + units + 3 * 16
    assert constants(DECODE, head_dim).value("kPitch") == head_dim + devices.DECODE_PADDING


def test_sm90_kernels_are_bounded_by_the_threads_they_are_launched_with() -> None:
    for file in (FORWARD, BACKWARD, SELECT, REACH):
        assert f"__launch_bounds__({devices.SM90_THREADS}, 1)" in (jit.CUDA_SRC / file).read_text()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_router_has_shared_memory_for_its_rows_and_a_slice_of_the_weights(head_dim: int) -> None:
    module, router = importlib.import_module("elastic.kernels.route_prompt"), constants(ROUTER, head_dim)
    values = 4 * router.value("kColumns") // 4 * router.value("kFour")
    assert module._shared_bytes(head_dim, 1) == values
    assert router.value("kSlice") * module._CLUSTER == head_dim * router.value("kWide")
    weights = 4 * router.value("kLayers") * (router.value("kSlice") + router.value("kWide") // module._CLUSTER)
    assert module._shared_bytes(head_dim, module._CLUSTER) == values + weights


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_reach_has_shared_memory_for_its_tiles_and_rows(head_dim: int, group: int) -> None:
    """For six heads, whose list has seven entries."""
    for file, capability in ((REACH, (9, 0)), (REACH_SM80, (8, 0))):
        config = devices.reach_config(capability, 100, 166_912, head_dim, group, 6, 9)
        sizes = {
            name.removeprefix("ELASTIC_"): int(value) for name, _, value in (m.partition("=") for m in config.macros)
        }
        kernel = constants(file, head_dim, **sizes)
        if file == REACH:
            assert config.shared_bytes == 1024 + kernel.value("ReachLayout.list") + 4 * 7
            continue
        assert config.threads == kernel.value("kThreads")
        tiles, parts = sizes["STAGES"] * kernel.value("kTileBytes"), config.threads * kernel.value("kPartBytes")
        assert config.shared_bytes == tiles + parts + kernel.value("kSharedBytes") + 4 * 7


def test_a_number_that_is_gone_is_missed() -> None:
    with pytest.raises(LookupError, match=r"kGone is not declared in route_prompt.cu and its headers"):
        constants(ROUTER).value("kGone")
    with pytest.raises(LookupError, match=r"kArrivals is declared 2 times"):
        constants(BACKWARD).value("kArrivals")
    with pytest.raises(KeyError):
        constants(FORWARD).sizes["NoSuchParams"]


@pytest.mark.parametrize(
    ("expression", "value"),
    [("1e-5f", 1e-5), ("10.0f", 10.0), ("1u", 1), ("16777216.0f", 2**24), ("0xffff", 0xFFFF), ("128", 128)],
)
def test_literals(expression: str, value: float) -> None:
    body = as_python(expression).body
    assert getattr(body, "value", None) == value
