"""A batch on which routes are judged by their divergence from the dense model, and by its gradient.

Legend: N samples, P judged positions, E hidden size, L layers, K KV heads, C tried routes, D random draws.
"""

from functools import cached_property

import torch
from torch import Tensor

from elastic.attention.head_plan import HeadPlan
from elastic.attention.prompt_reach import prompt_reach
from elastic.attention.routed import Routed
from elastic.attention.row_slice import RowSlice
from elastic.config import SparseConfig
from elastic.data.packing import Batch
from elastic.kernels import Reach
from elastic.model.attach import override_routes, set_row_slice
from elastic.model.logits import logit_head
from elastic.protocols import CausalLM
from elastic.training.evaluation_module import packed_hidden_states
from elastic.training.losses import answer_divergence, labelled_positions


class _Watch(RowSlice):
    """Attention as ever; on the side, the reach of every layer."""

    def __init__(self) -> None:
        self.reach: list[Reach] = []

    def attend(
        self, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, route_NK: Tensor, plan: HeadPlan, scale: float
    ) -> Routed:
        self.reach.append(prompt_reach(q_BHSD, k_BKSD, plan.layout, plan.sparse, scale))
        return super().attend(q_BHSD, k_BKSD, v_BKSD, route_NK, plan, scale)


class JudgedBatch:
    """A packed batch that the dense model has read (`elastic.training.head_need.Judged`).

    Args:
        model: an attached model.
        batch: on the model's device.
        dense: sizes under which routes of 0 are the dense model.
        loss_chunk: positions whose logits exist at a time.
    """

    def __init__(self, model: CausalLM, batch: Batch, dense: SparseConfig, loss_chunk: int) -> None:
        self.model, self.batch, self.dense, self.loss_chunk = model, batch, dense, loss_chunk

    @cached_property
    def dense_answers(self) -> Tensor:
        """Final hidden states [P, E] of the dense model at the judged positions."""
        with torch.no_grad(), override_routes(self.model, 0, self.dense):
            return labelled_positions(packed_hidden_states(self.model, self.batch), self.batch["labels"])[0]

    def divergences(self, routes_CLK: Tensor) -> Tensor:
        """KL(dense || routes) of each sample under each of C routes, [N, C]."""
        with torch.no_grad():
            return torch.stack([self._divergence(route_LK) for route_LK in routes_CLK], dim=1)

    def gradients(self, routes_NDLK: Tensor) -> Tensor:
        """d KL / d route of each sample under D routes of its own, [N, D, L, K]."""
        found = []
        for route_NLK in routes_NDLK.unbind(1):
            route = route_NLK.transpose(0, 1).to(self.batch["labels"].device).requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(self._divergence(route).sum(), route)
            found.append(gradient.transpose(0, 1))
        return torch.stack(found, dim=1)

    def reach(self, route_LK: Tensor) -> Tensor:
        """Largest and recent reach of each sample's heads under a route, [N, L, 2, K]."""
        watch = _Watch()
        previous = set_row_slice(self.model, watch)
        try:
            with torch.no_grad(), override_routes(self.model, route_LK):
                packed_hidden_states(self.model, self.batch)
        finally:
            set_row_slice(self.model, previous)
        return torch.stack([torch.stack(found, 1) for found in watch.reach], 1)

    def _divergence(self, route: Tensor) -> Tensor:
        dense_PE = self.dense_answers
        with override_routes(self.model, route):
            hidden = packed_hidden_states(self.model, self.batch)
        head, labels, bounds = logit_head(self.model), self.batch["labels"], self.batch["cu_seq_lens"]
        return answer_divergence(hidden, dense_PE, head, labels, bounds, self.loss_chunk)
