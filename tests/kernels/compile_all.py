"""Compile what the GPU tests launch, in as many processes as there are cores: before the first test of a fresh machine.

python -m tests.kernels.compile_all [WORD ...]
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product

from elastic.kernels.devices import decode_config, reach_config
from elastic.kernels.jit import Variant, cubin_path

STRESS = ("ELASTIC_STRESS=1", "ELASTIC_WATCHDOG=1")
H100 = ((9, 0), 132, 232_448)  # compute capability, multiprocessors, shared memory of a CTA


def variants() -> list[Variant]:
    """Of compute capability 9.0, each once."""
    found = []
    for dim, bf16 in product((64, 128), (True, False)):
        for debug in ((), STRESS):
            found.append(Variant("attention_forward_sm90", "sm_90a", dim, bf16, debug))
            found.append(Variant("attention_backward_sm90", "sm_90a", dim, bf16, debug))
            for stride, block in product((8, 16), (64, 128)):
                macros = (f"ELASTIC_STRIDE={stride}", f"ELASTIC_BLOCK={block}", *debug)
                found.append(Variant("xattention_select_sm90", "sm_90a", dim, bf16, macros))
        found.append(Variant("attention_forward_sm80", "sm_90", dim, bf16))
        found.append(Variant("attention_backward_rows", "sm_90", dim, bf16))
        found.append(Variant("route_prompt", "sm_90", dim, bf16, ("ELASTIC_PARTS=8",)))
        found += reach_variants(dim, bf16)
        for macros in sorted(decode_macros(dim)):
            found.append(Variant("attention_decode", "sm_90", dim, bf16, macros))
        found += paged_variants(dim, bf16)
    return found


def paged_variants(dim: int, bf16: bool) -> list[Variant]:
    """The forward pass over pages of every size and its builds of the delay tests, and decoding."""
    found = [Variant("attention_forward_sm80", "sm_90", dim, bf16, ("ELASTIC_PAGED=1",))]
    for box, debug in product((16, 32, 64), ((), STRESS)):
        found.append(Variant("attention_forward_sm90", "sm_90a", dim, bf16, (f"ELASTIC_PAGED={box}", *debug)))
    for macros in sorted(decode_macros(dim)):
        found.append(Variant("attention_decode", "sm_90", dim, bf16, (*macros, "ELASTIC_PAGED=1")))
    return found


def reach_variants(dim: int, bf16: bool) -> list[Variant]:
    """Both kernels for every grouping, and the builds of the delay tests."""
    found = []
    for group in range(1, 9):
        for capability in ((8, 0), (9, 0)):
            config = reach_config(capability, H100[1], H100[2], dim, group, 8, 64)
            arch = "sm_90" if capability == (8, 0) else config.arch
            debugs = ((), STRESS) if capability == (9, 0) and group == 4 and bf16 else ((),)
            found += [Variant(config.name, arch, dim, bf16, (*config.macros, *debug)) for debug in debugs]
    return list(dict.fromkeys(found))


def decode_macros(dim: int) -> set[tuple[str, str]]:
    """Warps and stages of the random decode problems' launches."""
    found = set()
    for group, heads in product((1, 2, 4, 5, 8, 16), (b * k for b in (1, 2, 3, 9, 64) for k in (1, 2, 3, 8))):
        for warps, most in ((8, 6), (4, 2)):
            config = decode_config(*H100, dim, group, heads, warps=warps, most_stages=most)
            found.add((f"ELASTIC_WARPS={config.warps}", f"ELASTIC_STAGES={config.stages}"))
    return found


def main() -> int:
    """Compile; a kernel that fails ends it with the compiler's log. With arguments only files whose options name one of
    them: PAGED.
    """
    words = sys.argv[1:]
    started, wanted = time.perf_counter(), [v for v in variants() if not words or any(w in str(v) for w in words)]
    with ProcessPoolExecutor(min(len(wanted), os.cpu_count() or 1)) as pool:
        paths = list(pool.map(cubin_path, wanted))
    sys.stdout.write(f"{len(set(paths))} kernels in {time.perf_counter() - started:.0f} s\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
