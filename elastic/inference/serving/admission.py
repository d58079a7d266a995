"""Which waiting requests begin, and which of them are read in one pass."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from elastic.cache.elastic_cache import STEP
from elastic.inference.serving.jobs import Job
from elastic.model.fused_parts import hidden_tokens
from elastic.model.loading import architecture
from elastic.model.long_rope import rotation, switch_lengths
from elastic.protocols import CausalLM

TOGETHER = 8192  # tokens of a pass over several prompts, padding included; longer ones keep most devices busy alone
MOST_PADDING = 1 / 3  # of such a pass


class Admission:
    """Lets requests begin while the device has room for their keys and values.

    Half of the memory that is free once the model is loaded is for them; the rest is for reading prompts and for moving
    rows. One request is always let in.

    Args:
        model: an attached model.
        max_batch: answers at a time, whatever the memory.
        room: bytes for keys and values; default as above.
        piece: tokens of a prompt that are read at a time; longer prompts are read alone. None: prompts are read whole.

    Attributes:
        hidden: tokens of a pass that take no more time than its launches, padding included; 0 without a GPU.
    """

    def __init__(self, model: CausalLM, max_batch: int, room: int | None = None, piece: int | None = None) -> None:
        shape = architecture(model)
        self._layers = len(model.get_decoder().layers)
        heads = shape["num_layers"] * shape["num_kv_heads"]
        self.bytes_per_token: int = 2 * heads * shape["head_dim"] * model.dtype.itemsize
        self.max_batch, self.room = max_batch, free_bytes(model.device) // 2 if room is None else room
        self._switches, self._piece = switch_lengths(model.config), piece
        self.hidden = hidden_tokens(model.get_decoder()) if model.device.type == "cuda" else 0

    def choose(self, waiting: Iterable[Job], running: int, held: int, longest: float) -> list[Job]:
        """The oldest request whose prompt has no more tokens than `longest`, and those after it that are read with it,
        as far as there is room; none where there is none.

        Args:
            running: answers that are being made.
            held: bytes of their keys and values.
        """
        left, chosen = self.room - held, list[Job]()
        for job in waiting:
            if running + len(chosen) == self.max_batch:
                break
            if len(job.prompt) > longest or (chosen and not self._together(chosen, job)):
                continue
            left -= self.bytes_of(job)
            if left < 0 and running + len(chosen):  # who comes first is not overtaken by those who need less
                break
            chosen.append(job)
        return chosen

    def meanwhile(self, reading: Sequence[Job]) -> float:
        """Tokens of the longest prompts that may begin within a pause of prompts that are being read: as many as are
        read within the time of one layer of theirs. 0 where a GPU hides their pass: any pass then takes the host as
        long as theirs, so those who come wait for the next one and are read together.
        """
        longest = max(len(job.prompt) for job in reading)
        hides = longest <= TOGETHER and longest * len(reading) <= self.hidden
        return 0.0 if hides else longest / self._layers

    def bytes_of(self, job: Job) -> int:
        """What a request needs where all heads are full."""
        return -(-(len(job.prompt) + job.limit) // STEP) * STEP * self.bytes_per_token

    def _together(self, chosen: list[Job], job: Job) -> bool:
        """Whether a prompt may be read with others: under one `sparsity_bias`, rotated by the same factors, with
        little or hidden padding, and no seed, as how sums are rounded depends on the rows of a pass.
        """
        first, lengths = chosen[0], [len(one.prompt) for one in (*chosen, job)]
        padded = max(lengths) * len(lengths)
        return (
            first.sampling.seed is None
            and job.sampling.seed is None
            and first.sampling.sparsity_bias == job.sampling.sparsity_bias
            and rotation(self._switches, lengths[0]) == rotation(self._switches, lengths[-1])
            and padded <= max(TOGETHER, self.hidden)
            and (self._piece is None or max(lengths) <= self._piece)
            and padded - sum(lengths) <= max(MOST_PADDING * padded, self.hidden)
        )


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nothing uses."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    told = Path("/proc/meminfo")
    if told.exists():
        return int(told.read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
