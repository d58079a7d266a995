"""The routed engine on vLLM's CPU platform: attention in PyTorch, in place of the platform's only backend.

Legend: S tokens of a step, K KV heads, D head dim, N pages, T tokens of a page, E = 2 D.
"""

from typing import Any, ClassVar

from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_worker import CPUWorker

from elastic.engines.vllm.backend import RoutedBackend, RoutedImpl
from elastic.engines.vllm.engine import RoutedWorker
from elastic.engines.vllm.paged import write_pages


class CpuImpl(RoutedImpl):
    """Attention of a layer over pages of the stock backend's shape with plain keys and values in them."""

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Put the step's keys and values [S, K, D] into the pages [N, K, T, E]."""
        del layer
        write_pages(kv_cache, key, value, slot_mapping)


class CpuBackend(RoutedBackend, CPUAttentionBackend):
    """Attention under routes."""

    impl: ClassVar = CpuImpl

    @staticmethod
    def get_supported_kernel_block_sizes(*spec: Any) -> list[Any]:
        return [16, *CPUAttentionBackend.get_supported_kernel_block_sizes(*spec)]  # 0.24 has no argument

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []


class CpuWorker(RoutedWorker, CPUWorker):
    """vLLM's CPU worker with routers."""

    replaces: ClassVar = AttentionBackendEnum.CPU_ATTN
    backend: ClassVar = CpuBackend
