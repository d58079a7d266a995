"""All that depends on a version of vLLM (0.32): the engine's configuration, its scheduler's cap on shared prefixes, its
worker with the table of routes, and the attention backend.

What the plugin builds on: `EngineArgs.create_engine_config`, the settings `worker_cls` and `scheduler_cls`,
`register_backend`, and of the V1 model runner `_update_states`, `requests` and `input_batch.req_ids`.
Legend: S tokens of a step, H query heads, K KV heads, D head dim, N pages, T tokens of a page, E = 2 D.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionMetadataBuilder, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.cpu_worker import CPUWorker

from elastic.engines.vllm.decide import LayerRouter, Rotation
from elastic.engines.vllm.options import OPTION, Options
from elastic.engines.vllm.paged import write_pages
from elastic.engines.vllm.routers import Routing, load_routing
from elastic.engines.vllm.shards import Shard, check_heads
from elastic.engines.vllm.spans import ChatMarks, user_span
from elastic.engines.vllm.step import Step, run_layer
from elastic.engines.vllm.table import RoutedRequest, RouteTable

# Below vLLM's own loggers, whose handlers and levels it then has.
logger = init_logger("vllm.elastic")
_STOCK_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


def routed_config(arguments: Any, options: Options, make: Callable[[], Any]) -> Any:
    """The configuration of an engine that routes. Nothing is loaded but the routers, which are checked.

    Args:
        arguments: the engine's `EngineArgs`.
        make: the stock `create_engine_config`.

    Raises:
        ValueError: a setting or model without support, or routers that do not fit.
        FileNotFoundError: no such routers.
    """
    _check_process()
    arguments.enable_chunked_prefill = bool(arguments.enable_chunked_prefill)  # vLLM's own default is to chunk
    os.environ[_RUNNER] = "0"  # read by the engine's other processes, which inherit it
    made = make()
    _check_settings(made)
    routing = load_routing(options, made.model_config.hf_text_config)
    check_heads(routing.routers[0].kv_heads, made.parallel_config.tensor_parallel_size)
    made.parallel_config.worker_cls = f"{__name__}.{RoutedWorker.__name__}"
    made.scheduler_config.scheduler_cls = f"{__name__}.{RoutedScheduler.__name__}"
    logger.info(
        "elastic: %s routes %d layers of %d KV heads as %s (sparsity_bias %g)",
        *(options.checkpoint, len(routing.routers), routing.routers[0].kv_heads),
        *(routing.config.sparse.name, routing.config.sparsity_bias),
    )
    return made


def _check_process() -> None:
    """Refuse devices and runners that the plugin does not know."""
    if not current_platform.is_cpu():
        raise ValueError(
            f"{OPTION} was asked for on {current_platform.device_name or current_platform.device_type}, but the plugin "
            "runs vLLM's CPU build only, paged CUDA kernels are not written yet; use `elastic serve` on a GPU"
        )
    if os.environ.get(_RUNNER, "0") not in ("0", ""):
        raise ValueError(
            f"{_RUNNER}={os.environ[_RUNNER]} was set, but {OPTION} knows the V1 model runner only; leave it out"
        )


def _check_settings(made: Any) -> None:
    """Refuse by name what was not made for routed heads, or not tested with them."""
    parallel, cache, scheduler, model = (
        getattr(made, f"{name}_config") for name in ("parallel", "cache", "scheduler", "model")
    )
    sizes = ("pipeline_parallel", "data_parallel", "prefill_context_parallel", "decode_context_parallel")
    given = {f"{name}_size": getattr(parallel, f"{name}_size") for name in sizes}
    refused = {name: size for name, size in given.items() if size > 1}
    chunk = 0 if scheduler.enable_chunked_prefill else scheduler.long_prefill_token_threshold
    dtypes = ("auto", str(model.dtype).removeprefix("torch."))
    refused |= {
        name: value
        for name, value, usual in (
            ("runner", model.runner_type, ("generate",)),
            ("kv_cache_dtype", cache.cache_dtype, dtypes),
            ("long_prefill_token_threshold", chunk, (0,)),
            ("worker_cls", parallel.worker_cls, (_STOCK_WORKER,)),
            ("scheduler_cls", scheduler.scheduler_cls, (None,)),
            ("speculative_config", made.speculative_config, (None,)),
            ("kv_transfer_config", made.kv_transfer_config, (None,)),
            ("model_impl", model.model_impl, ("auto", "vllm")),
            ("enable_prompt_embeds", model.enable_prompt_embeds, (False,)),
            ("sliding_window", model.get_sliding_window(), (None,)),
        )
        if value not in usual
    }
    if refused:
        name, value = next(iter(refused.items()))
        raise ValueError(f"{name}={value!r} does not go together with {OPTION} yet; leave it at its default")


class RoutedScheduler(Scheduler):
    """vLLM's scheduler, which lets requests share no longer a prefix than is the same under all routes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        most, coordinator = _routing(self.vllm_config).shared_prefix, self.kv_cache_manager.coordinator
        if most is not None:
            find = coordinator.find_longest_cache_hit
            coordinator.find_longest_cache_hit = lambda hashes, longest: find(hashes, min(longest, most))


class RoutedWorker(CPUWorker):
    """vLLM's CPU worker with routers, and a table of routes that follows the requests of its model runner."""

    table: RouteTable

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the backbone with layers of the routed backend, then give them their routers."""
        routing = _routing(self.vllm_config)
        self.table = _new_table(self.vllm_config.model_config, routing)
        with _routed_backend():
            super().load_model(*args, **kwargs)
        runner, group = self.model_runner, get_tp_group()
        shard = Shard(group.rank_in_group, group.world_size, group.all_gather)
        for name, layer in runner.compilation_config.static_forward_context.items():
            number = int(name.split(".layers.")[1].split(".")[0])
            rotary = _rotary(runner.get_model().get_submodule(name.rpartition(".")[0]))
            decides = LayerRouter(
                number, shard.router(routing.routers[number]), Rotation(rotary.cos_sin_cache, rotary.is_neox_style),
                routing.config, layer.num_kv_heads, layer.impl.scale, shard,
            )  # fmt: skip
            layer.impl.bind(decides, number == len(routing.routers) - 1, self.table)
        stock = runner._update_states

        def update_states(scheduled: Any) -> Any:
            self.table.forget(scheduled.finished_req_ids)
            after = stock(scheduled)
            names = runner.input_batch.req_ids
            self.table.begin_step((name, runner.requests[name].prompt_token_ids) for name in names)
            return after

        runner._update_states = update_states

    def routes(self) -> dict[str, list[list[int]]]:
        """Routes [L][K] of the requests that have not ended, by name, for this process's KV heads; for
        `collective_rpc` and tests.
        """
        return {name: [of.int().tolist() for of in found.layers] for name, found in self.table.requests.items()}


def _rotary(attention: Any) -> Any:
    """The rotary embedding of an attention module, whatever the model's file calls it."""
    found = [module for module in attention.children() if hasattr(module, "cos_sin_cache")]
    if len(found) != 1:
        raise ValueError(
            f"{type(attention).__name__} has {len(found)} rotary embeddings with tables of cosines, expected one; "
            f"{OPTION} cannot rotate its keys back"
        )
    return found[0]


def _routing(vllm_config: Any) -> Routing:
    options = Options.of(vllm_config.additional_config)
    assert options is not None  # `routed_config` chose these classes because of it
    return load_routing(options, vllm_config.model_config.hf_text_config)


def _new_table(model_config: Any, routing: Routing) -> RouteTable:
    from elastic.model.loading import load_tokenizer

    if model_config.skip_tokenizer_init:
        logger.warning(
            "elastic: skip_tokenizer_init leaves no tokenizer to find users' words with; routers see whole prompts"
        )
        return RouteTable(lambda ids: (0, len(ids)), routing.config, routing.fixed)
    tokenizer = load_tokenizer(model_config.tokenizer)
    marks = ChatMarks.of(tokenizer)
    if marks is None:
        logger.warning("elastic: %s has no chat template with marks around users' words, so routers see whole prompts",
                       model_config.tokenizer)  # fmt: skip
    return RouteTable(lambda ids: user_span(ids, tokenizer, marks), routing.config, routing.fixed)


@contextmanager
def _routed_backend() -> Iterator[None]:
    """The CPU platform has one attention backend and asks nobody; what it names is another class meanwhile."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{RoutedBackend.__name__}")
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()


class RoutedBackend(CPUAttentionBackend):
    """Attention under routes, over pages of the stock backend's shape with plain keys and values in them."""

    @staticmethod
    def get_supported_kernel_block_sizes(*spec: Any) -> list[Any]:
        return [16, *CPUAttentionBackend.get_supported_kernel_block_sizes(*spec)]  # 0.24 has no argument

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []

    @staticmethod
    def get_impl_cls() -> type["RoutedImpl"]:
        return RoutedImpl

    @staticmethod
    def get_builder_cls() -> type["RoutedMetadataBuilder"]:
        return RoutedMetadataBuilder


class RoutedMetadataBuilder(AttentionMetadataBuilder[Step]):
    """Joins the engine's batch with the table of routes."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.table: RouteTable = vllm_config.compilation_config.static_forward_context[layer_names[0]].impl.table

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Step:
        """The rows of a step. `common_prefix_len` and `fast_build` make no difference here."""
        del common_prefix_len, fast_build
        common = common_attn_metadata
        return Step.of(self.table, common.query_start_loc_cpu.tolist(), common.seq_lens, common.block_table_tensor)


class RoutedImpl(AttentionImpl[Step]):
    """Attention of one layer: decides where a prompt ends in this step, then runs every head in its mode."""

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

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Put the step's keys and values [S, K, D] into the pages [N, K, T, E]."""
        del layer
        write_pages(kv_cache, key, value, slot_mapping)

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor,
        attn_metadata: Step | None, output: Tensor, output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Attention of the step's queries [S, H, D] into `output`. A step of the engine's own has no metadata."""
        del layer, key, value, output_scale, output_block_scale
        if attn_metadata is not None:
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
