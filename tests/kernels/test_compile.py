"""Every kernel variant compiles without a GPU, without spills where it must not spill and without wgmma warnings."""

import dataclasses
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elastic.kernels import jit
from elastic.kernels.devices import decode_config, reach_config
from elastic.kernels.paged_forward import paged_config

pytest.importorskip("cupy", reason="the CUDA kernels need CuPy: pip install elastic-attention[cuda12]")
CHECKOUT = Path(__file__).parents[2]
# sm_80 is a fallback: a few words of its tile setup may spill, never more. The backward's producer warp lives on 24
# registers, so it spills between its loads; the consumers, which hold the loop of matrix products, must not. Reach with
# seven or eight query heads spills a few words of a head's description, read once a key tile.
LIMITS = {
    "attention_forward_sm90": 0,
    "attention_forward_sm80": 128,
    "attention_backward_sm90": 144,
    "attention_backward_rows": 0,
    "xattention_select_sm90": 0,
    "reach_sm90": 32,
    "reach_sm80": 0,
}
TARGETS = [
    ("attention_forward_sm90", "sm_90a"),
    ("attention_forward_sm80", "sm_80"),
    ("attention_backward_sm90", "sm_90a"),
    ("attention_backward_rows", "sm_90"),
    ("attention_backward_rows", "sm_80"),
]


@functools.cache
def compiled(variant: jit.Variant) -> tuple[bytes, str]:
    """Once, where several sizes run the same variant."""
    return jit.compile_cubin(variant)


def compiles_clean(variant: jit.Variant) -> None:
    """Raise unless it compiles within its limit of spills and without warnings about wgmma."""
    cubin, log = compiled(variant)
    assert cubin[:4] == b"\x7fELF"
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    assert spilled and max(spilled) <= LIMITS[variant.file], log
    # ptxas put in a fence, serialised a wgmma, or ignored setmaxnreg
    assert not re.search(r"C75\d\d", log), log


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("name", "arch"), TARGETS)
def test_variant_compiles_clean(name: str, arch: str, head_dim: int, bf16: bool) -> None:
    compiles_clean(jit.Variant(name, arch, head_dim, bf16))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("capability", "size"), [((9, 0), 16), ((9, 0), 32), ((9, 0), 128), ((8, 0), 16)])
def test_paged_forward_compiles_clean(capability: tuple[int, int], size: int, head_dim: int, bf16: bool) -> None:
    config = paged_config(capability, 100, head_dim, 1, 9, size)
    compiles_clean(jit.Variant(config.name, config.arch, head_dim, bf16, config.macros))


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_selection_compiles_clean(head_dim: int, bf16: bool, block: int, stride: int) -> None:
    sizes = (f"ELASTIC_STRIDE={stride}", f"ELASTIC_BLOCK={block}")
    compiles_clean(jit.Variant("xattention_select_sm90", "sm_90a", head_dim, bf16, sizes))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
def test_decode_and_router_compile_clean(arch: str, head_dim: int, bf16: bool) -> None:
    """With the warps, stages and clusters of that GPU; a spill here would be traffic in a memory-bound loop."""
    capability = int(arch[3:-1]), int(arch[-1])
    limit = {(8, 0): 166_912, (8, 6): 101_376, (9, 0): 232_448, (12, 0): 101_376}[capability]
    config = decode_config(capability, 100, limit, head_dim, 4, 8)
    parts = 8 if capability >= (9, 0) else 1
    ring = (f"ELASTIC_WARPS={config.warps}", f"ELASTIC_STAGES={config.stages}")
    wanted = [
        ("attention_decode", ring),
        ("attention_decode", (*ring, "ELASTIC_PAGED=1")),
        ("route_prompt", (f"ELASTIC_PARTS={parts}",)),
    ]
    for name, macros in wanted:
        cubin, log = jit.compile_cubin(jit.Variant(name, arch, head_dim, bf16, macros))
        assert cubin[:4] == b"\x7fELF"
        assert set(re.findall(r"(\d+) bytes spill stores", log)) == {"0"}, log


SHARED_MEMORY = {(8, 0): 166_912, (8, 6): 101_376, (9, 0): 232_448}


# Every group size in bf16; of fp16, and of GPUs whose binaries differ by the target alone, the largest.
@pytest.mark.parametrize(
    ("capability", "bf16", "group"),
    [
        ((8, 6), True, 8),
        *((c, bf16, g) for c in ((8, 0), (9, 0)) for bf16, g in [*((True, n) for n in (1, 3, 4, 6, 8)), (False, 8)]),
    ],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_reach_compiles_clean(capability: tuple[int, int], head_dim: int, bf16: bool, group: int) -> None:
    limit = SHARED_MEMORY[capability]
    config = reach_config(capability, 100, limit, head_dim, group, 8, 64)
    compiles_clean(jit.Variant(config.name, config.arch, head_dim, bf16, config.macros))


@pytest.mark.parametrize("arch", ["sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_the_other_gpus_compile(arch: str) -> None:
    """Compute capability 8.x, and newer than 9.0: the sm_80 kernel, built for the GPU's own target."""
    compiles_clean(jit.Variant("attention_forward_sm80", arch, 128, True))


@pytest.mark.parametrize(
    "name", ["attention_forward_sm90", "attention_backward_sm90", "xattention_select_sm90", "reach_sm90"]
)
def test_the_builds_of_the_race_tests_compile(name: str) -> None:
    debug = ("ELASTIC_STRESS=1", "ELASTIC_WATCHDOG=1", "ELASTIC_STRIDE=16", "ELASTIC_BLOCK=128")
    debug += ("ELASTIC_BLOCKS=2", "ELASTIC_STAGES=4")
    for more in ((), ("ELASTIC_PAGED=16",)):
        cubin, _ = jit.compile_cubin(jit.Variant(name, "sm_90a", 128, True, (*debug, *more)))
        assert cubin[:4] == b"\x7fELF"


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """An empty cache, and a compiler that only notes what it was asked for."""
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    asked: list[jit.Variant] = []

    def compile_cubin(variant: jit.Variant) -> tuple[bytes, str]:
        asked.append(variant)
        return b"\x7fELF", ""

    monkeypatch.setattr(jit, "compile_cubin", compile_cubin)
    yield asked
    jit._source_hash.cache_clear()


VARIANT = jit.Variant("attention_forward_sm80", "sm_80", 64, True)


def test_each_variant_is_compiled_once_and_said_so(counted, caplog) -> None:
    first = jit.cubin_path(VARIANT)
    assert jit.cubin_path(VARIANT) == first and counted == [VARIANT] and first.read_bytes() == b"\x7fELF"
    said = [record.getMessage() for record in caplog.records if record.name == "elastic.kernels"]
    assert said[0] == "compiling attention_forward_sm80 for sm_80, D 64 (first use)"
    assert said[1].startswith("compiled in ") and str(first.parent) in said[1] and len(said) == 2


@pytest.mark.parametrize(
    "change",
    [{"head_dim": 128}, {"bf16": False}, {"arch": "sm_86"}, {"debug": ("X=1",)}, {"file": "attention_forward_sm90"}],
    ids=str,
)
def test_cache_key_covers_options(counted, change) -> None:
    other = dataclasses.replace(VARIANT, **change)
    assert jit.cubin_path(VARIANT) != jit.cubin_path(other) and counted == [VARIANT, other]


def test_cache_key_covers_the_compiler(counted, monkeypatch) -> None:
    first = jit.cubin_path(VARIANT)
    newer = type("NVRTC", (), {"getVersion": staticmethod(lambda: (13, 5))})
    monkeypatch.setattr(jit, "_import_nvrtc", lambda: newer)
    assert jit.cubin_path(VARIANT) != first and len(counted) == 2


@pytest.mark.parametrize("file", ["include/elastic/softmax.cuh", "attention_forward_sm80.cu"])
def test_cache_key_covers_sources_and_headers(counted, monkeypatch, tmp_path, file: str) -> None:
    source = tmp_path / "cuda_src"
    shutil.copytree(jit.CUDA_SRC, source)
    monkeypatch.setattr(jit, "CUDA_SRC", source)
    paths = []
    for text in ("", "// edited\n", ""):
        edited = source / file
        edited.write_text((jit.CUDA_SRC / file).read_text().removesuffix("// edited\n") + text)
        jit._source_hash.cache_clear()
        paths.append(jit.cubin_path(VARIANT))
    assert paths[0] == paths[2] != paths[1] and len(counted) == 2


def test_processes_that_compile_at_once_leave_one_whole_file(tmp_path) -> None:
    """One of them compiles, the others wait for it; each ends with the binary that is in the cache."""
    code = """if True:
        import hashlib, pathlib, sys, time
        from elastic.kernels import jit
        folder = pathlib.Path(sys.argv[1])
        real = jit.compile_cubin

        def slowly(variant):
            (folder / f"compiled-{sys.argv[2]}").touch()
            time.sleep(1)
            return real(variant)

        jit.compile_cubin = slowly
        path = jit.cubin_path(jit.Variant("attention_forward_sm80", "sm_80", 64, True))
        print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    """
    environment = {**os.environ, "ELASTIC_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [
        subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True, env=environment, cwd=CHECKOUT)
        for n in range(3)
    ]
    said = {process.communicate(timeout=300)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0] and len(said) == 1
    assert len(list(tmp_path.glob("compiled-*"))) == 1
    name, digest = said.pop().split()
    kept = tmp_path / "cache" / "kernels" / name
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == digest
    assert kept.read_bytes()[:4] == b"\x7fELF"


def test_a_refused_source_shows_the_compilers_log(monkeypatch, tmp_path) -> None:
    (tmp_path / "broken.cu").write_text("__global__ void broken() { this is not C++; }")
    monkeypatch.setattr(jit, "CUDA_SRC", tmp_path)
    with pytest.raises(RuntimeError, match=r"could not compile Variant\(file='broken'[\s\S]*broken.cu\(1\): error"):
        jit.compile_cubin(jit.Variant("broken", "sm_80", 64, True))


def test_missing_cupy_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(ModuleNotFoundError, match=r"need CuPy.*elastic-attention\[cuda12\].*run on the CPU"):
        jit._import_nvrtc()


def test_old_compiler_is_named(monkeypatch) -> None:
    class Old:
        @staticmethod
        def getVersion():  # noqa: N802  (NVRTC's own name)
            return 12, 8

    monkeypatch.setattr(jit, "_import_nvrtc", lambda: Old)
    with pytest.raises(RuntimeError, match=r"12\.8 is too old for sm_90a.*12\.9"):
        jit.compile_cubin(jit.Variant("attention_forward_sm90", "sm_90a", 64, True))
