"""What vLLM (0.24 and 0.32) calls for attention, on any device: the metadata of a step, and a layer's attention.
`cpu.py` and `gpu.py` say how it is plugged in there.

What it builds on: the fields of `CommonAttentionMetadata` that `RoutedMetadataBuilder.build` reads, a cache for each
layer [N, K, T, E], and batches with single queries first (`reorder_batch_threshold`).
Legend: S tokens of a step, H query heads, K KV heads, D head dim, N pages, T tokens of a page, E = 2 D, L layers.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from elastic.engines.vllm.decide import LayerRouter
from elastic.engines.vllm.modes import ModeTable
from elastic.engines.vllm.options import OPTION
from elastic.engines.vllm.step import MOST_SPANS, Batch, Step, run_layer
from elastic.engines.vllm.table import RoutedRequest, RouteTable

# Below vLLM's own loggers, whose handlers and levels it then has.
logger = init_logger("vllm.elastic")


class RoutedMetadataBuilder(AttentionMetadataBuilder[Step]):
    """Joins the engine's batch with the table of routes. Steps in which every request decodes under routes that it has
    may be captured: their attention reads the engine's own tensors and a `ModeTable`, which `build` refills.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        first: RoutedImpl = layers[layer_names[0]].impl
        spans = MOST_SPANS * vllm_config.scheduler_config.max_num_seqs
        self.table = first.table
        self.modes = ModeTable(len(layer_names), spans, first.num_kv_heads, first.decides.config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """The rows of a step. `common_prefix_len` and `fast_build` make no difference here."""
        del common_prefix_len, fast_build
        common = common_attn_metadata
        # Without speculation the bound is the length itself, and the device is not waited for.
        bounds, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist()
        batch = Batch(common.block_table_tensor, common.query_start_loc, common.seq_lens)
        return Step.of(self.table, self.modes, bounds, lengths, batch)


class RoutedImpl(AttentionImpl[Step]):
    """Attention of one layer: decides where a prompt ends in this step, then runs every head in its mode. A device adds
    `do_kv_cache_update`.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: Any = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None, **others: Any,
    ) -> None:  # fmt: skip
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        given = {"alibi_slopes": alibi_slopes, "sliding_window": sliding_window, "logits_soft_cap": logits_soft_cap,
                 "kv_sharing_target_layer_name": kv_sharing_target_layer_name, **others}  # fmt: skip
        strange = [name for name, value in given.items() if value]
        if strange or attn_type != "decoder":
            raise ValueError(
                f"the model's attention has {', '.join(strange) or attn_type}, which {OPTION} does not know"
            )

    def bind(self, decides: LayerRouter, last: bool, table: RouteTable) -> None:
        """Tell the layer what decides in it, whether it is the last, and the worker's table."""
        self.decides, self.last, self.table = decides, last, table

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: Step | None, output: Tensor, output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of the step's queries [S, H, D] into `output`. A step that measures memory has no metadata."""
        del layer, key, value, output_scale, output_block_scale
        if attn_metadata is None:
            return output.zero_()
        decided = run_layer(self.decides, attn_metadata, query, kv_cache, output)
        for request in decided if self.last else []:
            self._tell(request)
        return output

    def _tell(self, request: RoutedRequest) -> None:
        """A line of the log for a request that all layers have decided for."""
        shard, sparse = self.decides.shard, self.decides.config.sparse
        route_LK = shard.gather(torch.stack(request.layers))
        if shard.rank == 0:
            chunks = f", the first {request.dense_tokens} ran dense" if request.dense_tokens else ""
            logger.info("elastic: request %s of %d prompt tokens runs at MSR %.3f, ESR %.3f%s",
                        request.name, request.prompt_tokens, float(route_LK.mean()),
                        request.esr(sparse, route_LK), chunks)  # fmt: skip


class RoutedBackend:
    """What the backends of all devices answer.

    Attributes:
        impl: attention of a layer there.
    """

    impl: ClassVar[type[RoutedImpl]]

    @classmethod
    def get_impl_cls(cls) -> type[RoutedImpl]:
        return cls.impl

    @classmethod
    def get_builder_cls(cls) -> type[RoutedMetadataBuilder]:
        return RoutedMetadataBuilder
