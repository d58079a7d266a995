"""What surrounds attention, in one pass over memory for each part: norms, RoPE, activations (docs/design.md section 7).

Each part is a plain PyTorch function that computes what transformers' modules compute, step by step and bit for bit
(norms of heads: up to the order of a sum). On a GPU `torch.compile` makes one kernel of it, in which intermediate
results are not rounded; anywhere else, and for tests, the function itself runs.
Legend: T tokens of all rows, E hidden size, F width of an MLP, H query heads, K KV heads, D head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from elastic.kernels.triton_host import triton_reason
from elastic.protocols import Decoder

Function = Callable[..., Any]


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, rounded before the weight is applied, as in Llama."""
    return weight * _normed(hidden, eps).to(hidden.dtype)


def rms_norm_late(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, rounded after the weight is applied, as in OLMo 2."""
    return (weight * _normed(hidden, eps)).to(hidden.dtype)


def rms_norm_offset(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis by 1 + weight, rounded at the end, as in Gemma."""
    return (_normed(hidden, eps) * (1.0 + weight.float())).to(hidden.dtype)


def _normed(hidden: Tensor, eps: float) -> Tensor:
    """fp32."""
    hidden = hidden.to(torch.float32)
    return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)


def add_rms_norm(hidden: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum, and its `rms_norm`."""
    hidden = hidden + added
    return hidden, rms_norm(hidden, weight, eps)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return functional.silu(gate) * up


def gelu_product(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with the tanh approximation."""
    return functional.gelu(gate, approximate="tanh") * up


def rotate(q_THD: Tensor, k_TKD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE that pairs element i with i + D / 2, on all D."""
    return _turned(q_THD.chunk(2, -1), cos_TD, sin_TD), _turned(k_TKD.chunk(2, -1), cos_TD, sin_TD)


def norm_rotate(
    q_THD: Tensor, k_TKD: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, cos_TD: Tensor, sin_TD: Tensor
) -> tuple[Tensor, Tensor]:
    """`rms_norm` of every head, then `rotate`. The norm takes the two halves of a head together, so that one kernel can
    do both.
    """
    q, k = _normed_halves(q_THD, q_weight, eps), _normed_halves(k_TKD, k_weight, eps)
    return _turned(q, cos_TD, sin_TD), _turned(k, cos_TD, sin_TD)


def _normed_halves(heads: Tensor, weight: Tensor, eps: float) -> list[Tensor]:
    one, two = (half.to(torch.float32) for half in heads.chunk(2, -1))
    mean = (one.pow(2) + two.pow(2)).sum(-1, keepdim=True) / heads.shape[-1]
    scale = torch.rsqrt(mean + eps)
    return [w * (half * scale).to(heads.dtype) for half, w in zip((one, two), weight.chunk(2), strict=True)]


def _turned(halves: Sequence[Tensor], cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    one, two = halves
    (cos1, cos2), (sin1, sin2) = (x[:, None].chunk(2, -1) for x in (cos_TD, sin_TD))
    return torch.cat((one * cos1 + -two * sin1, two * cos2 + one * sin2), -1)


LAUNCH_SECONDS, GPU_FLOPS = 1e-3, 4e14  # of a layer of a pass, by the host; of large matrix products, by a recent GPU
_ALWAYS = ContextVar("elastic-always-fused", default=False)


@contextmanager
def always_fused() -> Iterator[None]:
    """Inside the context, in this thread (or asyncio task) alone, passes of few tokens run fused too: a CUDA graph is
    captured, or warmed up for, or the pass is compared with one under gradients, which runs fused.
    """
    before = _ALWAYS.set(True)
    try:
        yield
    finally:
        _ALWAYS.reset(before)


def hidden_tokens(decoder: Decoder) -> int:
    """Tokens that a GPU works through while the host launches a pass. In a pass of fewer the host is what takes time:
    padding costs nothing, and fused parts more than the model's own modules, for they take more of Python. Of a layer
    of n weights that the host launches in t seconds, and a GPU of F FLOP/s: t F / 2 n.
    """
    layers = decoder.layers
    weights = sum(weight.numel() for layer in layers for weight in layer.parameters()) // len(layers)
    return int(LAUNCH_SECONDS * GPU_FLOPS / (2 * max(weights, 1)))


def unfused_reason(device: str) -> str | None:
    """Why parts are not compiled on devices of this type; None where they are."""
    return triton_reason() if device == "cuda" else f"devices of type {device} run transformers' own code"


class Parts:
    """The functions above as one model runs them.

    Args:
        devices: types of the devices on which they are compiled; elsewhere the model's own modules run.
        settings: of `torch.compile`.

    Attributes:
        on: False leaves everything to the model's own modules.
        few: tokens at most of an inference pass that is left to them too, outside of `always_fused`.
    """

    def __init__(self, devices: tuple[str, ...] = ("cuda",), **settings: Any) -> None:
        self.devices, self.settings, self.on, self.few = devices, settings, True, 0
        self._compiled = dict[tuple[Any, ...], Function]()

    def take(self, hidden: Tensor, *weights: Tensor) -> bool:
        """Whether parts over these operands run here. Weights that are offloaded or cut among processes are left to
        those who know where they are, and what is being compiled already is left to that compiler.
        """
        kind = hidden.device.type
        if not self.on or kind not in self.devices or torch.compiler.is_compiling():
            return False
        tokens = hidden.shape[: min(2, len(hidden.shape) - 1)].numel()  # whatever number of heads each has
        few = tokens <= self.few and not torch.is_grad_enabled() and not _ALWAYS.get()
        ready = kind != "cuda" or (not few and unfused_reason(kind) is None)
        return ready and all(w.device == hidden.device and not hasattr(w, "to_local") for w in weights)

    def run(self, function: Function, *args: Any) -> Any:
        """A function above of these operands, compiled. What is not a parameter has tokens on its first axis, of any
        number; numbers are constants (`dynamic=True` would make eps a variable in fp64).
        """
        alike = (function, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(_kind, args))
        if alike not in self._compiled:
            # The compiler counts recompilations by code object, for all models of the process, and gives up after some:
            # each gets its own, and so does whatever else than the number of tokens would be compiled anew.
            plain = cast(FunctionType, function)
            own = FunctionType(plain.__code__.replace(), plain.__globals__, plain.__name__)
            self._compiled[alike] = torch.compile(own, **self.settings)
        for operand in args:
            if isinstance(operand, Tensor) and not isinstance(operand, nn.Parameter) and operand.shape[0] > 1:
                torch._dynamo.maybe_mark_dynamic(operand, 0)
        return self._compiled[alike](*args)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles compile for themselves."""
        return {**vars(self), "_compiled": {}}


def _kind(operand: Any) -> Any:
    """What operands have in common that share a kernel: all but values and the number of tokens; numbers themselves."""
    if not isinstance(operand, Tensor):
        return operand
    return operand.shape[1:], operand.dtype, operand.device, operand.requires_grad
