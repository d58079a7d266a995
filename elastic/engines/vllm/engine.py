"""An engine of vLLM (0.24 and 0.32) that routes: its configuration, its scheduler's cap on shared prefixes, and its
worker with the table of routes. Its attention is in `backend.py`, what differs by device in `cpu.py` and `gpu.py`;
nothing else depends on vLLM's version.

What it builds on: `EngineArgs.create_engine_config`, the settings `worker_cls`, `scheduler_cls` and
`attention_config.backend`, `register_backend`, and of the V1 model runner `_update_states`, `_is_uniform_decode`,
`requests` and `input_batch.req_ids`.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import vllm
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from elastic.engines.vllm.backend import logger
from elastic.engines.vllm.decide import LayerRouter, Rotation
from elastic.engines.vllm.options import OPTION, Options
from elastic.engines.vllm.routers import Routing, load_routing
from elastic.engines.vllm.shards import Shard, check_heads
from elastic.engines.vllm.spans import ChatMarks, user_span
from elastic.engines.vllm.table import RouteTable
from elastic.engines.vllm.versions import untested_on_gpu

# By platform: vLLM's own worker, and ours.
_WORKERS = {
    "cpu": ("vllm.v1.worker.cpu_worker.CPUWorker", f"{__package__}.cpu.CpuWorker"),
    "cuda": ("vllm.v1.worker.gpu_worker.Worker", f"{__package__}.gpu.GpuWorker"),
}
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
    stock, own = _WORKERS[_platform()]
    arguments.enable_chunked_prefill = bool(arguments.enable_chunked_prefill)  # vLLM's own default is to chunk
    os.environ[_RUNNER] = "0"  # read by the engine's other processes, which inherit it
    made = make()
    _check_settings(made, stock)
    routing = load_routing(options, made.model_config.hf_text_config)
    check_heads(routing.routers[0].kv_heads, made.parallel_config.tensor_parallel_size)
    made.parallel_config.worker_cls = own
    if current_platform.is_cuda():
        made.attention_config.backend = AttentionBackendEnum.CUSTOM  # the CPU has one backend, which is replaced
        if untested := untested_on_gpu(vllm.__version__, made.parallel_config.tensor_parallel_size):
            logger.warning("elastic: %s", untested)
    scheduler = RoutedAsyncScheduler if made.scheduler_config.async_scheduling else RoutedScheduler
    made.scheduler_config.scheduler_cls = f"{__name__}.{scheduler.__name__}"
    logger.info(
        "elastic: %s routes %d layers of %d KV heads as %s (sparsity_bias %g)",
        *(options.checkpoint, len(routing.routers), routing.routers[0].kv_heads),
        *(routing.config.sparse.name, routing.config.sparsity_bias),
    )
    return made


def _platform() -> str:
    """The key of `_WORKERS`. Devices and runners that the plugin does not know are refused."""
    device = current_platform.device_name or current_platform.device_type
    found = "cpu" if current_platform.is_cpu() else "cuda" if current_platform.is_cuda() else None
    if found is None:
        raise ValueError(f"{OPTION} was asked for on {device}; it runs on {' and '.join(_WORKERS)}")
    if os.environ.get(_RUNNER, "0") not in ("0", ""):
        raise ValueError(
            f"{_RUNNER}={os.environ[_RUNNER]} was set, but {OPTION} knows the V1 model runner only; leave it out"
        )
    return found


def _check_settings(made: Any, worker: str) -> None:
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
            ("worker_cls", parallel.worker_cls, (worker,)),
            ("ubatch_size", parallel.ubatch_size, (0, 1)),
            ("enable_dbo", parallel.enable_dbo, (False,)),
            ("attention_backend", made.attention_config.backend, (None, AttentionBackendEnum.CPU_ATTN)),
            ("scheduler_cls", scheduler.scheduler_cls, (None,)),
            ("speculative_config", made.speculative_config, (None,)),
            ("kv_transfer_config", made.kv_transfer_config, (None,)),
            ("model_impl", model.model_impl, ("auto", "vllm")),
            ("enable_prompt_embeds", model.enable_prompt_embeds, (False,)),
            ("enable_sleep_mode", model.enable_sleep_mode, (False,)),  # waking leaves garbage in the table of modes
            ("sliding_window", model.get_sliding_window(), (None,)),
        )
        if value not in usual
    }
    if refused:
        name, value = next(iter(refused.items()))
        raise ValueError(f"{name}={value!r} does not go together with {OPTION} yet; leave it at its default")


class _ShortPrefixes:
    """Lets requests share no longer a prefix than is the same under all routes."""

    vllm_config: Any
    kv_cache_manager: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        most, coordinator = _routing(self.vllm_config).shared_prefix, self.kv_cache_manager.coordinator
        if most is not None:
            find = coordinator.find_longest_cache_hit
            coordinator.find_longest_cache_hit = lambda hashes, longest: find(hashes, min(longest, most))


class RoutedScheduler(_ShortPrefixes, Scheduler):
    """vLLM's scheduler that waits for each step, as on the CPU."""


class RoutedAsyncScheduler(_ShortPrefixes, AsyncScheduler):
    """vLLM's scheduler that plans a step while the one before runs: on a GPU its default."""


class RoutedWorker:
    """What `CpuWorker` and `GpuWorker` add to vLLM's workers: routers, and a table of routes that follows the requests
    of the model runner.

    Attributes:
        replaces, backend: attention backend of vLLM whose place ours takes while the model loads.
    """

    table: RouteTable
    replaces: ClassVar[AttentionBackendEnum]
    backend: ClassVar[type]
    vllm_config: Any
    model_runner: Any

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the backbone with layers of the routed backend, then give them their routers."""
        routing = _routing(self.vllm_config)
        self.table = _new_table(self.vllm_config.model_config, routing)
        with _instead_of(self.replaces, self.backend):
            super().load_model(*args, **kwargs)  # type: ignore[misc]
        runner, group = self.model_runner, get_tp_group()
        shard = Shard(group.rank_in_group, group.world_size, group.all_gather)
        for name, layer in runner.compilation_config.static_forward_context.items():
            number = int(name.split(".layers.")[1].split(".")[0])
            rotary = _rotary(runner.get_model().get_submodule(name.rpartition(".")[0]))
            decides = LayerRouter(
                number, shard.router(routing.routers[number]).to(runner.device),
                Rotation(rotary.cos_sin_cache, rotary.is_neox_style), routing.config, layer.num_kv_heads,
                layer.impl.scale, shard,
            )  # fmt: skip
            layer.impl.bind(decides, number == len(routing.routers) - 1, self.table)
        self._follow(runner)

    def _follow(self, runner: Any) -> None:
        """Let the table hear of every step before it runs, and let no step in which layers decide be the replay of a
        graph, which would not ask them: a prompt of one token looks like decoding.
        """
        update, is_uniform = runner._update_states, runner._is_uniform_decode

        def update_states(scheduled: Any) -> Any:
            self.table.forget(scheduled.finished_req_ids)
            after = update(scheduled)
            names = runner.input_batch.req_ids
            self.table.begin_step((name, runner.requests[name].prompt_token_ids) for name in names)
            return after

        def is_uniform_decode(*args: Any, **kwargs: Any) -> bool:
            return bool(is_uniform(*args, **kwargs)) and not self.table.undecided()

        runner._update_states, runner._is_uniform_decode = update_states, is_uniform_decode

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
def _instead_of(stock: AttentionBackendEnum, backend: type) -> Iterator[None]:
    """What `stock` names is our backend meanwhile."""
    register_backend(stock, f"{backend.__module__}.{backend.__qualname__}")
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        stock.clear_override()
        _cached_get_attn_backend.cache_clear()
