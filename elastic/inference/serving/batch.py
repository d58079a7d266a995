"""Answers that decode together, a token each at a time; any of them may leave, and others join, between two steps.

Legend: B rows, V vocabulary.
"""

import torch
from torch import Tensor

from elastic.cache.elastic_cache import ElasticCache
from elastic.cache.route_record import route_of
from elastic.inference.decode_graph import RowGraphs, can_graph
from elastic.inference.serving.rows import Row
from elastic.inference.stepwise import draw_each
from elastic.model.loading import architecture
from elastic.protocols import CausalLM


class Batch:
    """Rows over one KV cache.

    Args:
        model: an attached model.
        rows: the first of them.
        token_B1: int64; their last tokens.
        cache: filled by their prompts.
    """

    def __init__(self, model: CausalLM, rows: list[Row], token_B1: Tensor, cache: ElasticCache) -> None:
        self.rows, self.token_B1, self.cache = rows, token_B1, cache
        self._decode, self._device = RowGraphs(model, cache), model.device
        self._graphed = can_graph(model, architecture(model)["head_dim"])

    def takes(self, other: "Batch") -> bool:
        """Whether the rows of another batch may join. A seeded answer decodes alone: it must repeat to the bit, and how
        sums are rounded depends on the number of rows. RoPE of two factors rotates a batch by those of its longest row.
        """
        if not self.rows:
            return True
        alike = route_of(self.cache).rotation == route_of(other.cache).rotation
        return alike and all(row.job.sampling.seed is None for row in self.rows + other.rows)

    def join(self, other: "Batch") -> None:
        """Take in the rows of another batch."""
        self.cache.join(other.cache)
        self.rows += other.rows
        self.token_B1 = torch.cat([self.token_B1, other.token_B1])

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every row."""
        if self._graphed:
            with torch.cuda.device(self._device):  # whose stream is captured
                logits_B1V = self._decode.step(self.token_B1)
        else:
            logits_B1V = self._decode.run(self.token_B1)
        self.token_B1 = draw_each([row.drawing for row in self.rows], logits_B1V[:, -1])
        self.tell()

    def tell(self) -> None:
        """Give every row its last token."""
        for row, token in zip(self.rows, self.token_B1.flatten().tolist(), strict=True):
            row.take(token)

    def leave(self) -> list[Row]:
        """Let the rows that are done go; returns them. A batch that is left by all takes in any other."""
        kept = [at for at, row in enumerate(self.rows) if row.reason is None]
        done = [row for row in self.rows if row.reason is not None]
        if done:
            self.cache.keep(kept)
            self.rows, self.token_B1 = [self.rows[at] for at in kept], self.token_B1[kept]
        return done
