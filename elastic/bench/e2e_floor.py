"""What a whole model cannot beat: the time of its layers' matrix products in a prompt, and the bytes that a decode step
must read.

Legend: S tokens, E and F widths of a projection.
"""

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from elastic.bench.timing import measure
from elastic.cache.elastic_cache import ElasticCache
from elastic.protocols import CausalLM, KVCache

_REPEATS = 3


def has_experts(model: CausalLM) -> bool:
    """Whether tokens go to experts: what a prompt multiplies and a step reads then depends on the tokens."""
    return any("experts" in name for name, _ in model.get_decoder().named_modules())


def products_ms(model: CausalLM, length: int, chunk: int) -> float:
    """Milliseconds of the matrix products of all decoder layers over a prompt, one after the other, as the model runs
    them: MLPs in chunks of tokens, everything else at once. For models without experts.
    """
    device, dtype = model.device, model.dtype
    inputs, outputs = dict[int, Tensor](), dict[int, Tensor]()
    work = list[tuple[Tensor, Tensor, Tensor]]()
    for layer in model.get_decoder().layers:
        for name, linear in layer.named_modules():
            if not isinstance(linear, nn.Linear) or "router" in name:
                continue
            wide, high = linear.in_features, linear.out_features
            size = min(length, chunk or length) if ".self_attn" not in f".{name}" else length
            if wide not in inputs:
                inputs[wide] = torch.randn(length, wide, device=device, dtype=dtype)
            if high not in outputs:
                outputs[high] = torch.empty(length, high, device=device, dtype=dtype)
            parts = zip(inputs[wide].split(size), outputs[high].split(size), strict=True)
            work += [(part, linear.weight.t(), place) for part, place in parts]

    def all_of_them() -> None:
        for part, weight_EF, place in work:
            torch.mm(part, weight_EF, out=place)

    with torch.no_grad():
        all_of_them()
        return statistics.median(_once(all_of_them) for _ in range(_REPEATS))


def _once(call: Any) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def step_bytes(model: CausalLM, cache: KVCache) -> int:
    """Bytes that a decode step must read: the layers' weights, the output head's, and the keys and values that its
    queries see.
    """
    layers = model.get_decoder().layers
    weights = sum(p.nbytes for layer in layers for name, p in layer.named_parameters() if "router" not in name)
    return int(weights + model.get_output_embeddings().weight.nbytes + _seen_bytes(cache))


def _seen_bytes(cache: KVCache) -> int:
    if not isinstance(cache, ElasticCache):
        return sum(int(layer.keys.nbytes + layer.values.nbytes) for layer in cache.layers)
    assert cache.visible_LBK is not None, "a step must have run"
    sink, begin, end = (part.long() for part in cache.visible_LBK)
    rows = (end - (begin - sink).clamp_min(0)).sum()
    row = cache.routed[0].held().keys[0]
    return 2 * int(rows) * row.nbytes


def bytes_per_second(device: torch.device) -> float:
    """What a copy of 1 GiB reaches, read and written bytes counted."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source)).ms * 1e3
