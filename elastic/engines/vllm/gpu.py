"""The routed engine on vLLM's CUDA platform: attention by the paged kernels, as the backend `CUSTOM`.

Decisions are PyTorch on the GPU and do not wait for it (the line of the log does, once a prompt); steps that only
decode are replayed as CUDA graphs.
Legend: S tokens of a step, K KV heads, D head dim, N pages, T tokens of a page, E = 2 D.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from elastic.engines.vllm.backend import RoutedBackend, RoutedImpl
from elastic.engines.vllm.engine import RoutedWorker
from elastic.engines.vllm.options import OPTION
from elastic.kernels import unsupported_reason
from elastic.kernels.checks import HEAD_DIMS
from elastic.kernels.devices import MAX_GROUP


class GpuImpl(RoutedImpl):
    """Attention of a layer by the paged kernels."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Put the step's keys and values [S, K, D] into the pages [N, K, T, E], in one launch that a graph may hold."""
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        scales = layer._k_scale, layer._v_scale
        ops.reshape_and_cache_flash(key, value, keys, values, slot_mapping, self.kv_cache_dtype, *scales)


class GpuBackend(RoutedBackend, AttentionBackend):
    """What the kernels take; vLLM refuses other models by these answers before it loads weights."""

    impl: ClassVar = GpuImpl
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(*spec: Any) -> list[Any]:
        return [16, 32, 64, 128]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return bool(capability >= DeviceCapability(8, 0))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        from vllm.v1.kv_cache_layout import KVCacheLayout  # not in 0.24, which asks for the shape below instead

        return (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)  # a layer's pages together: the kernels count from its first

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        del cache_dtype_str
        return num_blocks, num_kv_heads, block_size, 2 * head_size


class GpuWorker(RoutedWorker, Worker):
    """vLLM's GPU worker with routers."""

    replaces: ClassVar = AttentionBackendEnum.CUSTOM
    backend: ClassVar = GpuBackend

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """`RoutedWorker.load_model`, where the kernels run.

        Raises:
            ValueError: they do not; said before weights are loaded.
        """
        model, parallel = self.vllm_config.model_config, self.vllm_config.parallel_config
        reason = unsupported_reason(self.device, model.dtype, model.get_head_size())
        heads, kv_heads = model.get_num_attention_heads(parallel), model.get_num_kv_heads(parallel)
        if reason is None and heads // kv_heads > MAX_GROUP:
            reason = f"{heads} query heads for {kv_heads} KV heads: the decode kernel takes {MAX_GROUP} for each"
        if reason is not None:
            raise ValueError(f"{OPTION} cannot run here: {reason}; see `elastic doctor`, or leave {OPTION} out")
        super().load_model(*args, **kwargs)
