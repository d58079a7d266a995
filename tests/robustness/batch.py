"""What a batch of conversations should hold while a random case runs, and how it is passed to a model."""

import copy
import random
from typing import Any

import torch
from torch import Tensor

from elastic.config import SparseConfig
from tests.helpers.masked64 import Sample, Turn
from tests.helpers.models import KV_HEADS, LAYERS, VOCAB
from tests.robustness.cases import Case

ROOM = 400  # tokens of a conversation, at most
MASKS_BY_LAYER_TYPE = ("qwen2", "qwen3")  # families of transformers that take them


class Batch:
    """The samples of a case with their padding.

    Attributes:
        samples: in the order of the rows.
        pads: padding of each row.
        seen: columns that the cache holds.
        unread: columns after them.
    """

    def __init__(self, family: str, case: Case) -> None:
        self.family, self.case, self.draw = family, case, random.Random(case.number)
        longest = max(case.lengths)
        self.samples = [Sample(self.tokens(length)) for length in case.lengths]
        self.pads = [longest - length for length in case.lengths]
        self.seen, self.unread = 0, longest

    def tokens(self, count: int) -> list[int]:
        """Random ones."""
        return [self.draw.randrange(1, VOCAB) for _ in range(count)]

    def append(self, count: int) -> None:
        """So many new tokens in every row."""
        for sample in self.samples:
            sample.ids += self.tokens(count)
        self.unread += count

    @property
    def reads_turn(self) -> bool:
        """Whether the unread tokens are a prompt or a turn; a single one is an answer's."""
        return self.seen == 0 or self.unread > 1

    def begin(self, sparse: SparseConfig, given: Tensor | None, piece: int = ROOM) -> None:
        """The unread tokens are read now, under routes [L, K] that are given, if any are, and in pieces of so many."""
        self.given, early = given, self.seen + (self.unread - 1) // piece * piece
        for sample, pad in zip(self.samples, self.pads, strict=True):
            begin, end = len(sample.answer), len(sample.ids)
            if self.reads_turn:
                start = sample.turns[-1].user[0] if sample.turns else 0
                dropped = self.case.cache == "elastic" and begin > sparse.sink + sparse.window
                sample.turns.append(Turn(begin, end, (start, end), dropped, given))
            self.was_read(sample, answer=not self.reads_turn)
            if self.reads_turn and given is None:  # pieces before the last attend in full, where keys are there
                full = torch.zeros(LAYERS, KV_HEADS, dtype=torch.int64)
                if sample.turns[-1].dropped:
                    full = sample.turns[-2].route
                before = max(begin, early - pad)
                sample.given[begin:before] = [full] * (before - begin)

    def was_read(self, sample: Sample, answer: bool) -> None:
        """All tokens of the sample have been read, in its last turn."""
        new = len(sample.ids) - len(sample.answer)
        sample.of_turn += [len(sample.turns) - 1] * new
        sample.answer += [answer] * new
        sample.given += [self.other_routes(sample) if answer else None] * new

    def other_routes(self, sample: Sample) -> Tensor | None:
        """Routes that are given to answers now, and were not to their turn."""
        of_turn = sample.turns[-1].given
        same = self.given is not None and of_turn is not None and torch.equal(self.given, of_turn)
        return None if same else self.given

    def answered(self, sequences: list[list[int]], columns: int) -> None:
        """Take the tokens after so many columns; the last has not been read yet."""
        for sample, row in zip(self.samples, sequences, strict=True):
            *read, last = row[columns:]
            sample.ids += read
            self.was_read(sample, answer=True)
            sample.ids.append(last)
        self.seen, self.unread = len(sequences[0]) - 1, 1

    def crop(self, count: int) -> None:
        """Take back so many columns of those that were read; if none is left, begin with a prompt of 9 tokens."""
        self.seen, self.unread = max(0, self.seen - count), 0
        for sample in self.samples:
            kept = max(0, len(sample.answer) - count)
            assert kept > 0 or not self.seen, "the cache has let a sample without tokens be"
            del sample.ids[kept:], sample.of_turn[kept:], sample.answer[kept:], sample.given[kept:]
            for turn in sample.turns:
                turn.user = (turn.user[0], min(turn.user[1], kept))
            if not self.seen:
                sample.turns.clear()
        if not self.seen:
            self.pads = [0] * len(self.samples)
            self.append(9)

    def choose(self, rows: list[int]) -> None:
        """Row n becomes a copy of row `rows[n]`."""
        self.samples = [copy.deepcopy(self.samples[row]) for row in rows]
        self.pads = [self.pads[row] for row in rows]

    # -- how it is passed

    def grid(self) -> tuple[Tensor, Tensor]:
        """Tokens [B, S] of all samples with their padding, and the mask."""
        left, rows, valid = self.case.padding == "left", [], []
        for sample, pad in zip(self.samples, self.pads, strict=True):
            zeros, ones = [0] * pad, [1] * len(sample.ids)
            rows.append([*zeros, *sample.ids] if left else [*sample.ids, *zeros])
            valid.append([*zeros, *ones] if left else [*ones, *zeros])
        return torch.tensor(rows), torch.tensor(valid)

    def mask(self, mask: Tensor) -> dict[str, Any]:
        """The mask [B, S] as the case passes it."""
        kind, width = self.case.mask, self.unread
        if kind == "none" or (kind == "first" and self.seen):
            return {}
        forms = {
            "bool": mask.bool(),
            "float": mask.float(),
            "wide": torch.cat([mask, torch.ones_like(mask[:, :1])], 1),
            "dict": {"full_attention": mask} if self.family in MASKS_BY_LAYER_TYPE else mask,
            "4d": mask.bool()[:, None, None].expand(-1, 1, width, -1),
            "new": mask[:, -width:],
        }
        return {"attention_mask": forms.get(kind, mask)}

    def positions(self, mask: Tensor) -> dict[str, Tensor]:
        """Positions of the unread columns."""
        return {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -self.unread :]} if self.case.positions else {}

    def user_spans(self) -> dict[str, Tensor]:
        """The last two thirds of first prompts are the user's."""
        if not self.case.user or self.seen:
            return {}
        spans = []
        for sample, pad in zip(self.samples, self.pads, strict=True):
            turn = sample.turns[-1]
            turn.user = (turn.end // 3, turn.end)
            spans.append([edge + pad * (self.case.padding == "left") for edge in turn.user])
        return {"user_spans": torch.tensor(spans)}

    def packed(self) -> dict[str, Tensor]:
        """All prompts in one row, by one of two doors."""
        lengths = [len(sample.ids) for sample in self.samples]
        batch = {
            "input_ids": torch.tensor([[token for sample in self.samples for token in sample.ids]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
        if not self.case.positions or len(lengths) == 1:
            batch["cu_seq_lens"] = torch.tensor([0, *lengths]).cumsum(0)
        return batch
