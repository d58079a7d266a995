"""A step of the engine as its layers see it: spans of tokens under the same routes, and the requests whose routes are
decided in it. No import of vLLM.

A prompt that comes in one piece is routed from its first token. One that comes in chunks runs dense until the chunk in
which it ends, where the decision is made and from where the routes hold.
Legend: S tokens of a step, R requests, P pages of a request, H query heads, K KV heads, D head dim, L layers, B spans,
N pages, T tokens of a page, E = 2 D, Q queries of a request.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from elastic.engines.vllm.decide import LayerRouter
from elastic.engines.vllm.modes import ModeTable
from elastic.engines.vllm.paged import PagedStep, Pages, attend_step
from elastic.engines.vllm.table import RoutedRequest, RouteTable
from elastic.routing.router import StaticRouter

MOST_SPANS = 3  # of a request in a step: dense, under its routes, after its prompt


class Batch(NamedTuple):
    """The engine's own tensors of a step, int32 on the device of its pages; rows after the last request are padding.

    Attributes:
        page_RP: pages of each request.
        start_R1: where each request's tokens begin, and their number.
        length_R: tokens of each, those of this step included.
    """

    page_RP: Tensor
    start_R1: Tensor
    length_R: Tensor


class Span(NamedTuple):
    """Tokens [first, stop) of a step: the last of the first `end` of their request, which has place `row` in the batch.
    `routed`: under its routes, else dense; `after`: they come after its prompt.
    """

    request: RoutedRequest | None
    row: int
    first: int
    stop: int
    end: int
    routed: bool
    after: bool = False


@dataclass(frozen=True)
class Step:
    """What all layers of a step share.

    Attributes:
        reading: spans whose request's routes are not known yet, each with its place among all.
        paged: all spans.
        modes: the table that holds theirs.
        mode_LBK: those of this step in it.
    """

    reading: list[tuple[int, Span]]
    paged: PagedStep
    modes: ModeTable
    mode_LBK: Tensor

    @classmethod
    def of(
        cls, table: RouteTable, modes: ModeTable, bounds: Sequence[int], lengths: Sequence[int], batch: Batch
    ) -> "Step":
        """The step that begins; requests whose routes are not known yet note what it brings them. A step of the
        engine's own, such as those that are captured, has no requests: all its heads are full.

        Args:
            bounds, lengths: `batch.start_R1` and `batch.length_R` on the host.
        """
        requests: Sequence[RoutedRequest | None] = table.take_step() or [None] * len(lengths)
        spans: list[Span] = []
        for row, request in enumerate(requests):
            spans += _spans(table, request, row, bounds[row], bounds[row + 1], lengths[row])
        reading = [(n, span) for n, span in enumerate(spans) if span.request is not None and not span.request.layers]
        waits = {n for n, _ in reading}
        keys = [(span.request if span.routed and n not in waits else None, span.after) for n, span in enumerate(spans)]
        return cls(reading, _paged(spans, batch, modes.kv_heads), modes, modes.fill(keys))


def _spans(
    table: RouteTable, request: RoutedRequest | None, row: int, first: int, stop: int, length: int
) -> Iterator[Span]:
    """A request's tokens of the step, where its mode changes in several spans."""
    if request is None:
        yield Span(None, row, first, stop, length, False)
        return
    past = length - (stop - first)
    if not (request.layers or table.fixed):
        request.begin_chunk(past, length)
    prompt = request.prompt_tokens if table.config.dense_decode else length
    begin = past
    for end, routed, after in ((request.dense_until, False, False), (prompt, True, False), (length, True, True)):
        end = min(end, length)
        if begin < end:
            yield Span(request, row, first + begin - past, first + end - past, end, routed, after)
            begin = end


def _paged(spans: Sequence[Span], batch: Batch, kv_heads: int) -> PagedStep:
    """The spans over the engine's own tensors where each request is one, so that a captured graph finds them again."""
    bounds, ends = [*(span.first for span in spans), spans[-1].stop], [span.end for span in spans]
    page, start, length = batch
    rows = [span.row for span in spans]
    if rows != list(range(len(rows))):
        device = page.device
        page = page[torch.tensor(rows, device=device)]
        start, length = (torch.tensor(x, dtype=torch.int32, device=device) for x in (bounds, ends))
    return PagedStep.of(page, start, length, bounds, ends, kv_heads)


def run_layer(
    layer: LayerRouter, step: Step, q_SHD: Tensor, cache_NKTE: Tensor, output_SHD: Tensor
) -> list[RoutedRequest]:
    """Decide for prompts that end in this step, and attend for all of its tokens, into `output_SHD`.

    Args:
        cache_NKTE: pages, with the step's keys and values in them.

    Returns:
        requests that the layer has just decided for.
    """
    decided = []
    for n, span in step.reading:
        request, q_QHD = span.request, q_SHD[span.first : span.stop]
        assert request is not None
        pages = Pages(cache_NKTE, step.paged.table[n], span.end)
        if span.end < request.prompt_tokens and not isinstance(layer.router, StaticRouter):
            layer.look(request, q_QHD, pages)
            continue
        layer.route(request, q_QHD, pages)
        step.modes.decided(layer.number, n, request.layers[-1])
        decided.append(request)
    mode_BK, sparse = step.mode_LBK[layer.number], layer.config.sparse
    attend_step(q_SHD, cache_NKTE, step.paged, mode_BK, sparse, layer.scale, output_SHD)
    return decided
