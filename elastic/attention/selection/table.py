"""The table of methods that choose key blocks: a row is a mode of `SparseConfig`."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from elastic.attention.selection import flashprefill, flexprefill, infllm, moba, nsa
from elastic.attention.selection.sample import AttentionSample


class Selection(NamedTuple):
    """A method: its choice and its oracle, both from a sample to [h, M, N] as `sample` says.

    Attributes:
        choose: on the sample's device.
        oracle: slow and readable.
    """

    choose: Callable[[AttentionSample], Tensor]
    oracle: Callable[[AttentionSample], Tensor]


SELECTIONS: dict[str, Selection] = {
    "moba": Selection(moba.choose, moba.oracle),
    "nsa": Selection(nsa.choose, nsa.oracle),
    "infllm": Selection(infllm.choose, infllm.oracle),
    "flexprefill": Selection(flexprefill.choose, flexprefill.oracle),
    "flashprefill": Selection(flashprefill.choose, flashprefill.oracle),
}
