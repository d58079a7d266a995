"""Rows of a cache, told by tensors that keep their place, so that a CUDA graph of a decode step outlives the rows.

Legend: L layers, B samples, K KV heads.
"""

import copy
from collections.abc import Sequence

from elastic.cache.elastic_cache import ElasticCache
from elastic.cache.kv_pool import heads_of, upload
from elastic.cache.route_record import keep_record, route_of


class Frame(ElasticCache):
    """Shows so many rows of another cache, over its storage. A step over the frame appends to that storage but does not
    count in the other cache, whose `count_step` does.

    Args:
        cache: has read prompts, and has no sliding layers.
        rows: of the cache. A row that comes twice is one row: both append the same.
    """

    def __init__(self, cache: ElasticCache, rows: Sequence[int]) -> None:
        super().__init__(len(cache.layers), cache.config, cache.reserve, cache.step)
        index, record = upload(rows, cache.count_B.device), copy.copy(route_of(cache))
        record.select(index)
        keep_record(self, record)
        self._modes_LBK = record.modes(None, self.config.dense_decode, self.config.sparse)
        self.base_LBK, self.ring_LBK = heads_of([layer.held() for layer in cache.routed], rows)
        self.count_B, self.begin_B = cache.count_B[index], cache.begin_B[index]
        self.show(cache, rows)

    def shares(self, cache: ElasticCache) -> bool:
        """Whether the other cache's storage is still the one that it was made for."""
        return all(
            mine.held().keys is theirs.held().keys for mine, theirs in zip(self.routed, cache.routed, strict=True)
        )

    def show(self, cache: ElasticCache, rows: Sequence[int]) -> None:
        """Show these rows from now on, as many as before."""
        index, pools = upload(rows, cache.count_B.device), [layer.held() for layer in cache.routed]
        for mine, told in zip((self.base_LBK, self.ring_LBK), heads_of(pools, rows), strict=True):
            mine.copy_(told)
        modes_LBK = route_of(cache).modes(None, self.config.dense_decode, self.config.sparse)
        self._modes_LBK.copy_(modes_LBK[:, index])
        self.count_B.copy_(cache.count_B[index])
        self.begin_B.copy_(cache.begin_B[index])
        self.counts, route_of(self).rotation = [cache.counts[row] for row in rows], route_of(cache).rotation
        for layer, pool in zip(self.routed, pools, strict=True):
            layer.seen, layer.pool = cache.seen, pool.view(list(rows))
