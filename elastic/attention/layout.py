"""Where the samples lie in a batch: `Layout`, and how a batch, a packed row and a decode step get theirs.

Legend: N samples, B batch rows. A sample is a run of tokens of one row: the whole row, the row without its
padding, or one example of a packed row. Positions count keys, the cached ones included; the queries are the last Lq
positions of a row.
"""

from collections.abc import Callable, Hashable, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from elastic.kernels.params import WHOLE_ROWS, Ranges

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Samples of one forward pass.

    Attributes:
        row_N, begin_N, end_N: int64; the sample's row and its key positions [begin, end).
        prompt_end_N: int64; end of the prompt, after which answers begin.
        user_begin_N, user_end_N: int64; the part of the prompt that the user wrote, as far as known.
        rows, queries, keys: B, Lq and Lk, cache included.
        packed: several samples share a row (then Lq = Lk).
        padded: some position belongs to no sample.
        padded_right: some row ends in padding, so nothing can follow.
        bounds: the samples' boundaries in a packed row, known to the host.
        begun: key position where the prompt or turn begins of which these queries are a piece; None: it is all here.
    """

    row_N: Tensor
    begin_N: Tensor
    end_N: Tensor
    prompt_end_N: Tensor
    user_begin_N: Tensor
    user_end_N: Tensor
    rows: int
    queries: int
    keys: int
    packed: bool
    padded: bool
    padded_right: bool = False
    bounds: tuple[int, ...] = ()
    begun: int | None = None
    _memo: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    def memo(self, name: Hashable, build: Callable[[], T]) -> T:
        """`build()` of the first call with this name: what the layers of one forward pass share."""
        if name not in self._memo:
            self._memo[name] = build()
        shared: T = self._memo[name]
        return shared

    @property
    def past(self) -> int:
        """Keys that were in the cache before this forward pass."""
        return self.keys - self.queries

    @property
    def decoding(self) -> bool:
        """Whether this is one more token of samples whose routes are decided."""
        return self.queries == 1 and self.past > 0 and self.begun is None

    @property
    def turn_begin(self) -> int:
        """Key position where the present prompt or turn begins."""
        return self.past if self.begun is None else self.begun

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sample on the host; only padded or packed layouts must read them from a GPU."""
        if self.padded or self.packed:
            return [end - begin for _, begin, end in self.spans]
        return [self.keys] * self.rows

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(row, begin, end) of every sample on the host; unless they are packed, synchronises once per forward pass
        on a GPU.
        """
        if self.bounds:
            return [(0, begin, end) for begin, end in pairwise(self.bounds)]
        rows, begins, ends = torch.stack([self.row_N, self.begin_N, self.end_N]).tolist()
        return list(zip(rows, begins, ends, strict=True))

    @cached_property
    def kernel_ranges(self) -> Ranges:
        """The samples as the operators of `elastic.kernels` take them."""
        if not (self.packed or self.padded):
            return WHOLE_ROWS
        begin_q, end_q = ((cut - self.past).clamp(min=0) for cut in (self.begin_N, self.end_N))
        return Ranges(*(cut.to(torch.int32) for cut in (begin_q, end_q, self.begin_N, self.end_N, self.row_N)))

    @cached_property
    def dense_mask(self) -> Tensor | None:
        """Causal and padding mask as the stock SDPA path builds it: None, or bool [B, 1, Lq, Lk]."""
        if not self.padded and (self.past == 0 or self.queries == 1):
            return None
        key = torch.arange(self.keys, device=self.row_N.device)
        causal = key <= key[self.past :, None]
        valid = (key >= self.begin_N[:, None]) & (key < self.end_N[:, None])
        return (causal & valid[:, None, :])[:, None]


def batch_layout(
    rows: int,
    queries: int,
    past: int,
    device: torch.device,
    attention_mask: Tensor | None = None,
    prompt_end: Tensor | None = None,
    user_spans: Tensor | None = None,
    begun: int | None = None,
) -> Layout:
    """One sample per row.

    Args:
        attention_mask: [B, Lk] with 1 on valid tokens, which must be one run per row (left or right padding). Of one on
            the host nothing is read back from a GPU.
        prompt_end: [B], key positions; default the end of the valid tokens.
        user_spans: [B, 2], key positions; default the whole prompt.
        begun: of a piece of prompts, see `Layout`. A row may then hold no valid token yet; its sample will begin after
            these keys.

    Raises:
        ValueError: a mask of another shape, otherwise a row without valid tokens, or padding between valid tokens.
    """
    keys = past + queries
    row = torch.arange(rows, device=device)
    begin, end = torch.zeros_like(row), torch.full_like(row, keys)
    padded = padded_right = False
    spans: list[tuple[int, int, int]] | None = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < keys:
            raise _bad_mask(attention_mask, rows, keys)
        valid = attention_mask[:, :keys].bool()
        count = valid.sum(1)
        begin = torch.where(count > 0, valid.int().argmax(1), keys)
        end = begin + count
        padded = bool((count < keys).any())
        if padded:
            if begun is None and bool((count == 0).any()):
                raise ValueError(
                    f"row {int(count.argmin())} of attention_mask has no valid token; drop empty prompts from the batch"
                )
            last = keys - 1 - valid.flip(1).int().argmax(1)
            if bool((last + 1 != end).any()):
                raise ValueError("attention_mask has padding between valid tokens; pad on one side only")
            padded_right = bool((end < keys).any())
        if valid.device.type == "cpu":
            spans = list(zip(range(rows), begin.tolist(), end.tolist(), strict=True))
        begin, end = sent(torch.stack([begin, end]), device).unbind(0)
    prompt_end = end if prompt_end is None else prompt_end.to(device)
    user = _user(user_spans, begin, prompt_end)
    made = Layout(row, begin, end, prompt_end, *user, rows, queries, keys, False, padded, padded_right, begun=begun)
    if spans is not None:
        vars(made)["spans"] = spans  # known already
    return made


def decode_layout(
    prefill: Layout, rows: int, past: int, attention_mask: Tensor | None = None, queries: int = 1
) -> Layout:
    """The layout of one more token, or of several candidates, on top of `past` cached ones. Nothing is read back from a
    GPU: there the mask must continue the prompt's, which is checked on the CPU only.

    Raises:
        ValueError: a prompt that cannot be continued so, see `check_continued`, or a mask of another shape than its.
    """
    check_continued(prefill, rows)
    keys, begin = past + queries, prefill.begin_N
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < keys:
            raise _bad_mask(attention_mask, rows, keys)
        if attention_mask.device.type == "cpu":
            expected = torch.arange(keys) >= begin.cpu()[:, None]
            if not torch.equal(attention_mask[:, :keys].bool(), expected):
                raise _other_mask()
    return Layout(
        prefill.row_N, begin, torch.full_like(begin, keys), torch.full_like(begin, keys), prefill.user_begin_N,
        prefill.user_end_N, rows, queries, keys, packed=False, padded=prefill.padded,
    )  # fmt: skip


def turn_layout(earlier: Layout, turn: Layout, masked: bool, user: bool) -> Layout:
    """The layout of a later turn, or of a prompt's next piece: padding is where it was, and so do the users' words
    begin; rows of which nothing but padding was read begin where the mask says.

    Args:
        earlier: of the prompt or turn before.
        turn: of the new tokens, as `batch_layout` made it.
        masked: whether it was made from a mask.
        user: whether the call said where the users' words are.

    Raises:
        ValueError: a turn that cannot continue the prompt, see `check_continued`, or a mask with other padding.
    """
    check_continued(earlier, turn.rows)
    begun = earlier.begin_N < earlier.end_N
    if not user:
        turn = replace(turn, user_begin_N=torch.where(begun, earlier.user_begin_N, turn.user_begin_N))
    if not earlier.padded and not turn.padded:
        return turn
    begin = torch.where(begun, earlier.begin_N, turn.begin_N)
    if masked and not torch.equal(turn.begin_N, begin):
        raise _other_mask()
    return replace(turn, begin_N=begin, padded=True)


def check_continued(earlier: Layout, rows: int) -> None:
    """Whether new tokens can follow a prompt.

    Raises:
        ValueError: another number of rows than the prompt's, or a prompt padded on the right, where they would follow
            padding.
    """
    if earlier.begin_N.shape[0] != rows:
        raise ValueError(
            f"new tokens for {rows} rows came with a cache of {earlier.begin_N.shape[0]}; was it filled by another "
            "batch? For beams, repeat it by batch_repeat_interleave"
        )
    if earlier.padded_right:
        raise right_padding()


def right_padding() -> ValueError:
    """What to say of prompts that tokens are to follow."""
    return ValueError("the prompt is padded on the right, so new tokens would follow padding; pad prompts on the left")


def _other_mask() -> ValueError:
    return ValueError(
        "attention_mask does not continue the prompt's: padding on its left, then valid tokens only; pad prompts on "
        "the left"
    )


def plain_mask(mask: Any) -> Tensor | None:
    """The batch's mask where it came by layer type, as some families are handed it with a compileable cache.

    Raises:
        ValueError: a mapping without a mask of full attention, or something else than a tensor.
    """
    if isinstance(mask, dict):
        if "full_attention" not in mask:
            raise ValueError(
                f"attention_mask is a dict of {', '.join(map(str, mask)) or 'nothing'}; expected one mask of "
                "full_attention: pass the tokenizer's 2D mask"
            )
        mask = mask["full_attention"]
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError(f"attention_mask is a {type(mask).__name__}; pass the tokenizer's 2D mask")
    return mask


def packed_bounds(
    kwargs: MutableMapping[str, Any], position_ids: Tensor | None, mask: Tensor | None, queries: int
) -> Tensor | None:
    """Boundaries [N + 1] of the samples of a packed row, wherever the batch says them; None: it is not packed.

    Args:
        kwargs: of the decoder; what says boundaries is taken out of it: this project's `cu_seq_lens`, transformers'
            `cu_seq_lens_q` and `cu_seq_lens_k` with their lengths, and its `seq_idx` [1, S], the sample of every token.
        position_ids: [1 or B, S], or [4, 1 or B, S] with those of text first; without boundaries and mask, a sample
            begins where they do not grow by one, which is how `DataCollatorWithFlattening` says it. Those of a slice of
            a row (then S < `queries`) are not looked at.

    Raises:
        ValueError: boundaries that contradict each other, or positions that begin again in several rows.
    """
    named = {name: kwargs.pop(name, None) for name in ("cu_seq_lens", "cu_seq_lens_q", "cu_seq_lens_k")}
    lengths = [kwargs.pop(name, None) for name in ("max_length_q", "max_length_k")]
    seq_idx = kwargs.pop("seq_idx", None)
    given = {name: bounds for name, bounds in named.items() if bounds is not None}
    if given:
        first = next(iter(given.values()))
        if any(bounds.tolist() != first.tolist() for bounds in given.values()):
            raise ValueError(f"{' and '.join(given)} differ; expected the same boundaries of the same samples")
        return cast(Tensor, first)
    if any(length is not None for length in lengths):
        raise ValueError("max_length_q and max_length_k came without cu_seq_lens_q; pass the samples' boundaries too")
    if position_ids is not None and position_ids.dim() == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]  # of text, time, height and width (Qwen3.5)
    told, step = (position_ids, 1) if seq_idx is None else (seq_idx, 0)
    if told is None or mask is not None or told.dim() != 2 or queries < 2:
        return None
    begins = told.diff(dim=1) != step
    if told.shape[1] != queries or not bool(begins.any()):
        return None
    if told.shape[0] != 1:
        raise ValueError(
            f"position_ids begin again within {told.shape[0]} rows, so they hold several samples each; expected "
            "one packed row, or an attention_mask that says which tokens are padding"
        )
    inner = begins[0].nonzero().flatten() + 1
    return torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), queries)])


def _user(spans: Tensor | None, begin_N: Tensor, prompt_end_N: Tensor) -> tuple[Tensor, Tensor]:
    """Begin and end of what the user wrote; the whole prompt where nobody says."""
    if spans is None:
        return begin_N, prompt_end_N
    begin, end = sent(spans.to(torch.int64), begin_N.device).unbind(1)
    return begin, end


def sent(values: Tensor, device: torch.device) -> Tensor:
    """The values on a device; from the host to a GPU without waiting for it. Any other way is waited for, as on the way
    to the host they would be read before they are there.
    """
    if values.device.type == "cpu" and device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def _bad_mask(mask: Tensor, rows: int, keys: int) -> ValueError:
    return ValueError(
        f"attention_mask has shape {list(mask.shape)}, expected [{rows}, {keys}] (rows, cached + new tokens); "
        "pass the tokenizer's 2D mask"
    )


def packed_layout(
    cu_seq_lens: Tensor, prompt_end: Tensor | None, length: int, device: torch.device, user_spans: Tensor | None = None
) -> Layout:
    """Samples packed into one row of `length` tokens; `cu_seq_lens` [N + 1] holds their boundaries from 0 to `length`.

    Raises:
        ValueError: boundaries that do not start at 0, end at `length` and increase.
    """
    bounds = cu_seq_lens.to(device=device, dtype=torch.int64)
    host = bounds.tolist()
    if bounds.dim() != 1 or len(host) < 2 or host[0] != 0 or host[-1] != length or sorted(set(host)) != host:
        raise ValueError(
            f"cu_seq_lens={host} is not an increasing run of boundaries from 0 to the row's {length} tokens; "
            "elastic.data.packing.collate builds it"
        )
    begin, end = bounds[:-1], bounds[1:]
    prompt_end = end if prompt_end is None else prompt_end.to(device)
    row = torch.zeros_like(begin)
    user = _user(user_spans, begin, prompt_end)
    return Layout(row, begin, end, prompt_end, *user, 1, length, length, packed=True, padded=False, bounds=tuple(host))
