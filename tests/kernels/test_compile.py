"""Every kernel variant compiles without a GPU, without spills where it must not spill and without wgmma warnings."""

import re

import pytest

from elastic.kernels import jit

pytest.importorskip("cupy", reason="the CUDA kernels need CuPy: pip install elastic-attention[cuda12]")
# sm_80 is a fallback: a few words of its tile setup may spill, never more.
LIMITS = {"attention_forward_sm90": 0, "attention_forward_sm80": 128}


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("name", "arch"), [("attention_forward_sm90", "sm_90a"), ("attention_forward_sm80", "sm_80")])
def test_variant_compiles_clean(name: str, arch: str, head_dim: int, bf16: bool) -> None:
    cubin, log = jit.compile_cubin(jit.Variant(name, arch, head_dim, bf16))
    assert cubin[:4] == b"\x7fELF"
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill stores", log)]
    assert spilled and max(spilled) <= LIMITS[name], log
    # ptxas put in a fence, serialised a wgmma, or ignored setmaxnreg
    assert not re.search(r"C75\d\d", log), log


def test_cache_key_covers_headers_and_options(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    variant = jit.Variant("attention_forward_sm80", "sm_80", 64, True)
    first = jit.cubin_path(variant)
    assert first == jit.cubin_path(variant) and first.read_bytes()[:4] == b"\x7fELF"
    monkeypatch.setattr(jit, "_source_hash", lambda: "an edited header")
    second = jit.cubin_path(variant)
    assert second != first and sorted(first.parent.iterdir()) == sorted([first, second])


def test_old_compiler_is_named(monkeypatch) -> None:
    class Old:
        @staticmethod
        def getVersion():  # noqa: N802  (NVRTC's own name)
            return 12, 8

    monkeypatch.setattr(jit, "_import_nvrtc", lambda: Old)
    with pytest.raises(RuntimeError, match=r"12\.8 is too old for sm_90a.*12\.9"):
        jit.compile_cubin(jit.Variant("attention_forward_sm90", "sm_90a", 64, True))
