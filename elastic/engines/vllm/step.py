"""A step of the engine as its layers see it: rows that read their prompt, one by one, and rows that decode, all in one
call with tables made once a step. No import of vLLM.

A prompt that comes in one piece is routed from its first token. One that comes in chunks runs dense until the chunk in
which it ends, where the decision is made and from where the routes hold.
Legend: S tokens of a step, R rows, P pages of a row, H query heads, K KV heads, D head dim, N pages, T tokens of a
page, E = 2 D, Q queries of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.engines.vllm.decide import LayerRouter
from elastic.engines.vllm.decoding import Decoding, attend_rows
from elastic.engines.vllm.paged import Pages, attend_pages
from elastic.engines.vllm.table import RoutedRequest, RouteTable, streams
from elastic.routing.router import StaticRouter


@dataclass(frozen=True)
class Row:
    """A request in a step: its tokens there are [first, stop), the last of `length`."""

    request: RoutedRequest
    first: int
    stop: int
    length: int
    page: Tensor

    @property
    def past(self) -> int:
        """Tokens before those of this step."""
        return self.length - (self.stop - self.first)


@dataclass(frozen=True)
class Step:
    """What all layers of a step share."""

    reading: list[Row]
    decoding: Decoding | None

    @classmethod
    def of(cls, table: RouteTable, bounds: Sequence[int], length_R: Tensor, page_RP: Tensor) -> "Step":
        """The step that begins; requests whose routes are not known yet note what it brings them.

        Args:
            bounds: place of each row's first token, and the end of the last row.
            length_R: tokens of each row, those of this step included.
            page_RP: pages of all rows.
        """
        requests, lengths, reading, decoding = table.take_step(), length_R.tolist(), [], []
        for n, request in enumerate(requests):
            first, stop, length = bounds[n], bounds[n + 1], lengths[n]
            if request.layers and stop - first == 1 and length > request.prompt_tokens:
                decoding.append(n)
                continue
            if not (request.layers or table.fixed):
                request.begin_chunk(length - (stop - first), length)
            reading.append(Row(request, first, stop, length, page_RP[n]))
        if not decoding:
            return cls(reading, None)
        by_layer = table.decoding([requests[n] for n in decoding])
        if not reading:
            return cls([], Decoding(None, page_RP[: len(requests)], length_R[: len(requests)], by_layer))
        token_R = torch.tensor([bounds[n] for n in decoding])
        return cls(reading, Decoding(token_R, page_RP[decoding], length_R[decoding], by_layer))


def run_layer(
    layer: LayerRouter, step: Step, q_SHD: Tensor, cache_NKTE: Tensor, output_SHD: Tensor
) -> list[RoutedRequest]:
    """Decide for prompts that end in this step, and attend for all of its tokens, into `output_SHD`.

    Args:
        cache_NKTE: pages, with the step's keys and values in them.

    Returns:
        requests that the layer has just decided for.
    """
    if step.decoding is not None:
        _decode(layer, step.decoding, q_SHD, cache_NKTE, output_SHD)
    decided = []
    for row in step.reading:
        pages, q_QHD = Pages(cache_NKTE, row.page, row.length), q_SHD[row.first : row.stop]
        request = row.request
        if len(request.layers) <= layer.number:
            if row.length < request.prompt_tokens and not isinstance(layer.router, StaticRouter):
                layer.look(request, q_QHD, pages)
            else:
                layer.route(request, q_QHD, pages)
                decided.append(request)
        output_SHD[row.first : row.stop] = _read(layer, row, q_QHD, pages)
    return decided


def _decode(layer: LayerRouter, rows: Decoding, q_SHD: Tensor, cache_NKTE: Tensor, output_SHD: Tensor) -> None:
    place = slice(len(rows.length_R)) if rows.token_R is None else rows.token_R
    output_SHD[place] = attend_rows(q_SHD[place], cache_NKTE, rows, layer.number, layer.config.sparse, layer.scale)


def _read(layer: LayerRouter, row: Row, q_QHD: Tensor, pages: Pages) -> Tensor:
    """[Q, H, D]. Tokens before the decision run dense; with `dense_decode`, those after the prompt as route 0."""
    request, config = row.request, layer.config
    dense = torch.zeros(layer.kv_heads, dtype=torch.bool)
    if len(request.layers) <= layer.number:
        parts = [(row.length, dense)]
    else:
        route_K = request.layers[layer.number]
        after = torch.zeros_like(route_K) if config.dense_decode else route_K
        parts = [
            (request.dense_until, dense),
            (request.prompt_tokens, streams(route_K, config.sparse)),
            (row.length, streams(after, config.sparse)),
        ]
    outputs, begin = [], row.past
    for end, streaming_K in parts:
        end = min(end, row.length)
        if begin < end:
            q = q_QHD[begin - row.past : end - row.past]
            part = Pages(pages.cache_NKTE, pages.page, end)
            outputs.append(attend_pages(q, part, streaming_K.tolist(), config.sparse, layer.scale))
            begin = end
    return torch.cat(outputs)
