"""Answers that decode together, a token each at a time; any of them may leave, and others join, between two steps.

Legend: B rows, V vocabulary.
"""

import torch

from elastic.cache.elastic_cache import ElasticCache
from elastic.cache.route_record import route_of
from elastic.inference.decode_graph import DecodeGraph, can_graph
from elastic.inference.serving.rows import Row
from elastic.model.loading import architecture
from elastic.protocols import CausalLM


class Batch:
    """Rows over one KV cache.

    Args:
        model: an attached model.
        row: the first of them, whose first token is drawn.
        cache: filled by its prompt.
    """

    def __init__(self, model: CausalLM, row: Row, cache: ElasticCache) -> None:
        self.rows, self.cache = [row], cache
        self._decode, self._device = DecodeGraph(model, cache), model.device
        self._graphed = can_graph(model, architecture(model)["head_dim"])

    def takes(self, other: "Batch") -> bool:
        """Whether the rows of another batch may join. A seeded answer decodes alone: it must repeat to the bit, and how
        sums are rounded depends on the number of rows. RoPE of two factors rotates a batch by those of its longest row.
        """
        alike = route_of(self.cache).rotation == route_of(other.cache).rotation
        return alike and all(row.job.sampling.seed is None for row in self.rows + other.rows)

    def join(self, other: "Batch") -> None:
        """Take in the rows of another batch."""
        self.cache.join(other.cache)
        self.rows += other.rows

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every row."""
        token_B1 = torch.cat([row.drawing.ids_1S[:, -1:] for row in self.rows])
        if self._graphed:
            with torch.cuda.device(self._device):  # whose stream is captured
                logits_B1V = self._decode.step(token_B1)
        else:
            logits_B1V = self._decode.run(token_B1)
        drawn = [row.drawing.draw(logits) for row, logits in zip(self.rows, logits_B1V[:, -1].split(1), strict=True)]
        for row, token in zip(self.rows, torch.cat(drawn).flatten().tolist(), strict=True):
            row.take(token)

    def leave(self) -> list[Row]:
        """Let the rows that are done go; returns them."""
        kept = [at for at, row in enumerate(self.rows) if row.reason is None]
        if 0 < len(kept) < len(self.rows):
            self.cache.batch_select_indices(torch.tensor(kept))
        done = [row for row in self.rows if row.reason is not None]
        self.rows = [self.rows[at] for at in kept]
        return done
