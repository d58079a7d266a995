"""Several processes of one command, started by Lightning unless torchrun or a cluster has done so, and what they tell
each other.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from subprocess import Popen
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class Processes:
    """The processes that share a command's work: all of the process group, or only this one without a group.

    Attributes:
        rank, count: which of them this is, and how many there are.
        device: where this one computes.

    Args:
        started: those that this process has started.
    """

    def __init__(self, device: torch.device, started: Sequence["Popen[Any]"] = ()) -> None:
        self.device, self._started, several = device, started, dist.is_available() and dist.is_initialized()
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)

    @contextmanager
    def ending_together(self) -> Iterator[None]:
        """Inside, an error or a stop of this process stops those that it started. They end after it, without a word;
        otherwise each would say at length that it has lost its connection.
        """
        try:
            yield
        except BaseException:
            for process in self._started:
                process.terminate()
            raise

    def agree(self, decide: Callable[[], T]) -> T:
        """What the first process decides, on all of them."""
        told = [decide() if self.rank == 0 else None]
        if self.count > 1:
            dist.broadcast_object_list(told, src=0, device=self.device)
        return told[0]  # type: ignore[return-value]

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's items: each belongs to one process, as equally many as can be."""
        return list(items[self.rank :: self.count])

    def gather(self, work: Callable[[], list[T]]) -> list[T]:
        """What all processes made, on all of them.

        Raises:
            ValueError: of the work of any process, on all of them.
        """
        made: list[T] | ValueError
        try:
            made = work()
        except ValueError as error:
            if self.count == 1:
                raise
            made = error
        parts: list[Any] = [made] * self.count
        if self.count > 1:
            dist.all_gather_object(parts, made)
        for part in parts:
            if isinstance(part, ValueError):
                raise part
        return [item for part in parts for item in part]


def launch(device: str, devices: int) -> Processes:
    """Start so many processes of this command, which all run it from its beginning, and put them in one group.

    Args:
        device: `cpu` or `cuda`; where there is one process, any device.
        devices: processes, a GPU each with `cuda`.

    Raises:
        ValueError: devices below 1, a numbered device for several processes, or fewer GPUs than processes.
    """
    place = torch.device(device)
    if devices < 1 or (devices > 1 and place.index is not None):
        raise ValueError(
            f"--devices {devices} --device {device}: expected one device or more, and with several of them cpu or cuda "
            "without a number"
        )
    if devices == 1:
        return Processes(place)
    if place.type == "cuda" and torch.cuda.device_count() < devices:
        raise ValueError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs")
    from lightning import Fabric  # slow to import

    fabric = Fabric(accelerator="gpu" if place.type == "cuda" else place.type, devices=devices, strategy="ddp")
    fabric.launch()
    if place.type == "cuda":
        torch.cuda.set_device(fabric.device)
    return Processes(fabric.device, getattr(fabric.strategy.launcher, "procs", ()))
