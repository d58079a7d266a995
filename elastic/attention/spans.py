"""Where prompts and the users' words lie, as a call says it: their shape, and whether they fit the samples."""

import torch
from torch import Tensor

from elastic.attention.layout import Layout


def pairs(name: str, spans: Tensor) -> Tensor:
    """The spans as int64 [samples, 2]; ValueError for another shape."""
    if spans.dim() != 2 or spans.shape[1] != 2:
        raise ValueError(f"{name} has shape {list(spans.shape)}, expected [samples, 2] (start and end of each prompt)")
    return spans.to(torch.int64)


def check_user(layout: Layout, spans: Tensor) -> None:
    """Users' words must be non-empty parts of the prompts, one each. Checked where the spans are on the CPU."""
    samples = layout.row_N.shape[0]
    if spans.shape[0] != samples:
        raise ValueError(f"user_spans has {spans.shape[0]} parts for {samples} samples; expected one each")
    if spans.device.type != "cpu":
        return
    if layout.prompt_end_N is not layout.end_N:
        limits = torch.stack([layout.begin_N, layout.prompt_end_N], 1).tolist()
    elif layout.padded or layout.packed:
        limits = [[begin, end] for _, begin, end in layout.spans]
    else:
        limits = [[0, layout.keys]] * samples  # known here: nothing is read back from a GPU
    for n, ((start, stop), (begin, end)) in enumerate(zip(spans.tolist(), limits, strict=True)):
        if not begin <= start < stop <= end:
            raise ValueError(
                f"user span [{start}, {stop}) of sample {n} is not a part of its prompt, the tokens [{begin}, {end}), "
                "of at least one token"
            )


def check_prompts(layout: Layout, spans: Tensor) -> None:
    """Prompts must be the non-empty heads of their samples, one each."""
    samples = layout.row_N.shape[0]
    if spans.shape[0] != samples:
        raise ValueError(f"prompt_spans has {spans.shape[0]} prompts for {samples} samples; expected one each")
    for n, ((_, begin, end), (start, stop)) in enumerate(zip(layout.spans, spans.tolist(), strict=True)):
        if start != begin or not begin < stop <= end:
            raise ValueError(
                f"prompt span [{start}, {stop}) of sample {n} does not fit; its tokens are [{begin}, {end}), and a "
                "prompt "
                "starts with its sample and holds at least one token"
            )
