"""The mode of every head in every span of a step, in one table that stays where it is: a captured CUDA graph reads what
it holds when it is replayed.

Legend: L layers, B spans of a step, K KV heads here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from elastic.config import ElasticConfig
from elastic.engines.vllm.table import RoutedRequest, streams

Key = tuple[RoutedRequest | None, bool]


class ModeTable:
    """Modes of the step that runs.

    Args:
        layers: L.
        spans: the most that a step has.
        kv_heads: K.
        config: settings of the routers.
        device: of the attention that reads it.
    """

    def __init__(self, layers: int, spans: int, kv_heads: int, config: ElasticConfig, device: torch.device) -> None:
        self.kv_heads, self.config = kv_heads, config
        self._table_LBK = torch.zeros((layers, spans, kv_heads), dtype=torch.int32, device=device)
        self._dense_LK = torch.zeros((layers, kv_heads), dtype=torch.int32, device=device)
        self._rows: list[Tensor] = []

    def fill(self, spans: Sequence[Key]) -> Tensor:
        """Take in the spans of a step; no work where they have the modes of the step before.

        Args:
            spans: each with the request whose routes it runs under, None for dense ones, and whether its tokens come
                after the prompt.

        Returns:
            int32 [L, B, K], 1 where a head runs streaming: a view of the table.
        """
        rows = [self._dense_LK if request is None else self._row(request, after) for request, after in spans]
        here = self._table_LBK[:, : len(rows)]
        if len(rows) != len(self._rows) or any(a is not b for a, b in zip(rows, self._rows, strict=True)):
            here.copy_(torch.stack(rows, dim=1))
            self._rows = rows
        return here

    def decided(self, layer: int, span: int, route_K: Tensor) -> None:
        """Put in what a layer has decided for a span of the step that runs."""
        self._table_LBK[layer, span] = streams(route_K, self.config.sparse).int()
        self._rows = []  # the table is not what `fill` left

    def _row(self, request: RoutedRequest, after: bool) -> Tensor:
        """[L, K], the same tensor as long as the request lives; with `dense_decode`, tokens after the prompt run as
        route 0.
        """
        dense = after and self.config.dense_decode
        if dense not in request.modes:
            route_LK = torch.stack(request.layers)
            route_LK = torch.zeros_like(route_LK) if dense else route_LK
            request.modes[dense] = streams(route_LK, self.config.sparse).int()
        return request.modes[dense]
