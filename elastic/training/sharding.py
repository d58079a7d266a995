"""Training on several processes: what is replicated, what is sharded, which gradients are averaged (docs/design.md
section 5).

DDP replicates everything and averages gradients by itself. `ShardedBackbone` (FSDP2) shards the frozen decoder layers;
routers and multipliers are a few MB and stay replicated, so that checkpoints are the same files under every strategy.
Under either, groups of C neighbouring processes may share their rows (`elastic.training.context_parallel`): D x C
processes then read as many rows as D, and since every member of a group computes the loss of its whole rows, the mean
of the gradients over all processes is still that of one process.
"""

from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from elastic.model.attach import routers
from elastic.model.checkpoint import is_trainable
from elastic.protocols import CausalLM


def row_groups(processes: int, size: int) -> Any:
    """The group of this process among groups of `size` neighbouring ones that share their rows; called once by all
    processes. None where every process has rows of its own.

    Raises:
        ValueError: a size that does not divide the number of processes.
    """
    if size < 1 or processes % size:
        raise ValueError(
            f"context_parallel={size} does not divide the {processes} processes (trainer.devices x trainer.num_nodes); "
            "give it one of their divisors"
        )
    return dist.new_subgroups(size)[0] if size > 1 else None


class ContextParallel(DDPStrategy):
    """DDP whose groups of neighbouring processes share their rows.

    Attributes:
        row_group: the process group of those that share this process's rows; None outside a run, or where nobody does.

    Args:
        context_parallel: processes of a group; divides the KV heads and the number of processes.
        process_group_backend: `nccl` or `gloo`; default by device.
    """

    row_group: Any = None

    def __init__(self, context_parallel: int = 2, process_group_backend: str | None = None) -> None:
        super().__init__(process_group_backend=process_group_backend)
        self.context_parallel = context_parallel

    def setup_environment(self) -> None:
        """The groups too, once."""
        super().setup_environment()
        self.row_group = self.row_group or row_groups(self.world_size, self.context_parallel)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Which share of the rows this process's group reads."""
        size = self.context_parallel
        return {"num_replicas": self.world_size // size, "rank": self.global_rank // size}


class ShardedBackbone(ModelParallelStrategy):
    """FSDP2 over all processes: every process holds its share of each frozen decoder layer.

    Embedding, final norm and output head stay whole on every process: they are used outside the decoder layers, and
    their weights may be tied.

    Args:
        process_group_backend: `nccl` or `gloo`; default by device.
        context_parallel: neighbouring processes that share their rows, see `ContextParallel`; 1: each has its own.
    """

    row_group: Any = None

    def __init__(self, process_group_backend: str | None = None, context_parallel: int = 1) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend)
        self.context_parallel = context_parallel

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimiser states come from the ordinary checkpoint."""
        return True

    def setup_environment(self) -> None:
        """Layers are sharded over all processes, whichever of them share rows."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        self.row_group = self.row_group or row_groups(self.world_size, self.context_parallel)

    distributed_sampler_kwargs = ContextParallel.distributed_sampler_kwargs

    def setup(self, trainer: Any) -> None:
        """As in DDP, all processes start from the first one's routers."""
        super().setup(trainer)
        for name, value in self.lightning_module_state_dict().items():
            if is_trainable(name):
                dist.broadcast(value, src=0)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Everything that training changes; the frozen shards are nobody's to save."""
        state = Strategy.lightning_module_state_dict(self)
        return {name: value for name, value in state.items() if is_trainable(name)}

    # What is saved is replicated, so saving and loading are those of any other strategy.
    optimizer_state = Strategy.optimizer_state
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    load_model_state_dict = Strategy.load_model_state_dict
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict


def shard_backbone(model: CausalLM, mesh: Any) -> None:
    """Shard the decoder layers of an attached model over a one-dimensional device mesh, in place."""
    from torch.distributed.fsdp import fully_shard

    decoder = cast(nn.Module, model.get_decoder())
    whole = {parameter for router in routers(model) for parameter in router.parameters()}
    for layer in decoder.get_submodule("layers").children():
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    outside = {p for name, p in decoder.named_parameters() if not name.startswith("layers.")}
    fully_shard(decoder, mesh=mesh, ignored_params=whole | outside)  # orders the layers' gathering


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one message. A missing gradient counts as zero."""
    gradients: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
