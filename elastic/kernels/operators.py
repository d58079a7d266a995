"""The operators' edge to torch.library: `Pattern` and `Ranges` become the flat arguments of a schema here, and back.

PyTorch's schemas hold numbers, strings and tensors, so the two travel through the dispatcher field by field, in the
order of `PATTERN` and `RANGES`. A call that needs no dispatcher (see `is_plain_cuda`) never takes them apart.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elastic.kernels.params import Pattern, Ranges

PATTERN = "int sink, int window, str granule, int block, float scale"
RANGES = "Tensor? begin_q, Tensor? end_q, Tensor? begin_k, Tensor? end_k, Tensor? row"
_FIELDS = len(Pattern._fields)
# torch.library's class has no annotations; as Any it may be called from typed code.
_Library: Any = torch.library.Library
_library = _Library("elastic", "FRAGMENT")


def flatten(pattern: Pattern, ranges: Ranges, head_dim: int) -> tuple[Any, ...]:
    """The arguments of `PATTERN` and `RANGES`, with the scale as a number."""
    return *pattern[:-1], pattern.scale_for(head_dim), *ranges


def unflattened(run: Callable[..., Any], operands: int) -> Callable[..., Any]:
    """`run(*operands, pattern, ranges, *others)` as the implementation of a schema in which `PATTERN` and `RANGES`
    follow so many operands.
    """
    middle = operands + _FIELDS
    end = middle + len(Ranges._fields)

    def flat(*args: Any) -> Any:
        return run(*args[:operands], Pattern(*args[operands:middle]), Ranges(*args[middle:end]), *args[end:])

    return flat


def define(schema: str, *, cuda: Callable[..., Any], cpu: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register `torch.ops.elastic.<name>` of a schema `name(arguments) -> results`.

    Args:
        cuda, cpu: what runs on tensors there.
        fake: results of the right shapes, types and devices, without values.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, cuda, "CUDA")
    _library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"elastic::{name}", fake, lib=_library)


def is_plain_cuda(tensor: Tensor) -> bool:
    """Whether the dispatcher would only pass the call on to the CUDA implementation: a caller can do that itself and
    save the microseconds. Not so for tensor subclasses and under torch.compile.
    """
    return tensor.is_cuda and type(tensor) is Tensor and not torch.compiler.is_compiling()
