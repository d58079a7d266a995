"""Packed examples: tokenise records with the backbone's chat template, pack them into rows, collate rows into batches.

Samples of a row never see each other: `cu_seq_lens` marks their boundaries and `position_ids` restart. Labels are
aligned with the inputs (the loss shifts them) and -100 on prompts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from elastic.data.prompts import encode_prompt
from elastic.data.records import Record
from elastic.data.tasks import task_index
from elastic.protocols import Tokenizer

IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """One tokenised record: the first `prompt_length` tokens are the prompt, of which `user` [first, last) is what the
    user wrote (None: all of it), which routers see; then `prefix_length` tokens with which the assistant's turn begins,
    which nobody has to predict; the rest is the answer. `source` names the generator or data set, so that results can
    be told apart by it.
    """

    input_ids: list[int]
    prompt_length: int
    task_id: int
    source: str = "unknown"
    prefix_length: int = 0
    user: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not (0 < self.prompt_length <= self.answer_start < len(self.input_ids)):
            raise ValueError(
                f"a sample of {len(self.input_ids)} tokens has a prompt of {self.prompt_length} and "
                f"{self.prefix_length} given ones after it; it needs at least one prompt token and one answer token"
            )
        first, last = self.user_span
        if not 0 <= first < last <= self.prompt_length:
            raise ValueError(
                f"the user's words are [{first}, {last}) of a prompt of {self.prompt_length} tokens; give a part of it"
            )

    @property
    def user_span(self) -> tuple[int, int]:
        """Tokens [first, last) of what the user wrote."""
        return self.user or (0, self.prompt_length)

    @property
    def answer_start(self) -> int:
        """Place of the first token that counts as the answer."""
        return self.prompt_length + self.prefix_length


class PackedRow(TypedDict):
    """Samples in one row; S tokens, N samples. `cu_seq_lens` has N + 1 boundaries, `prompt_spans` and `user_spans` N
    pairs. Rows packed before there were `user_spans` lack them: the whole prompt then is the user's.
    """

    input_ids: list[int]
    labels: list[int]
    cu_seq_lens: list[int]
    prompt_spans: list[list[int]]
    user_spans: NotRequired[list[list[int]]]
    task_id: list[int]
    source: list[str]


class Batch(TypedDict):
    """Ids, labels and positions: int64 [1, S]; cu_seq_lens: int32 [N + 1]; prompt_spans, user_spans: int64 [N, 2];
    task_id: [N]; source: N names; row_samples: how many of the samples each of the joined rows has.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    cu_seq_lens: Tensor
    prompt_spans: Tensor
    user_spans: Tensor
    task_id: Tensor
    source: list[str]
    row_samples: list[int]


def tokenise(record: Record, tokenizer: Tokenizer) -> Sample:
    """Prompt through the chat template with its generation prompt; then the answer and the end-of-sequence token.

    An answer with a prefix completes a sentence, which may continue, so no end-of-sequence token is required. The
    prefix is not part of the prompt: routes have to follow from what was asked, as in use, where nobody begins the
    answer.

    Raises:
        ValueError: a tokenizer without a chat template or end-of-sequence token.
    """
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        raise ValueError(
            f"{type(tokenizer).__name__} {tokenizer.name_or_path!r} lacks a chat template or an end-of-sequence token; "
            "use an instruction-tuned backbone"
        )
    prompt = encode_prompt(record.messages, tokenizer)
    prefix, gap = record.answer_prefix, "" if record.answer_prefix[-1:].isspace() else " "
    given = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    answer = tokenizer(f"{gap if prefix else ''}{record.answer}", add_special_tokens=False)["input_ids"]
    end = [] if prefix else [tokenizer.eos_token_id]
    task = task_index(record.task)
    ids = [*prompt.ids, *given, *answer, *end]
    return Sample(ids, len(prompt), task, record.source_name, len(given), prompt.user)


def pack(samples: Iterable[Sample], seq_length: int, buffer: int = 1024) -> Iterator[PackedRow]:
    """Best-fit decreasing within a buffer of samples: deterministic, no sample split, lost or repeated.

    Raises:
        ValueError: a sample longer than a row.
    """
    waiting: list[Sample] = []
    for sample in samples:
        if len(sample.input_ids) > seq_length:
            raise ValueError(
                f"a sample has {len(sample.input_ids)} tokens but rows hold {seq_length}; "
                "raise --seq-length or build shorter contexts"
            )
        waiting.append(sample)
        if len(waiting) >= buffer:
            yield from map(packed_row, best_fit(waiting, seq_length))
            waiting = []
    yield from map(packed_row, best_fit(waiting, seq_length))


def best_fit(samples: Iterable[Sample], seq_length: int) -> list[list[Sample]]:
    """Samples by row: the longest first, each into the row that it leaves the least room in; none may be longer than a
    row.
    """
    rows: list[list[Sample]] = []
    room: list[int] = []
    for sample in sorted(samples, key=lambda s: -len(s.input_ids)):
        size = len(sample.input_ids)
        fits = [i for i, free in enumerate(room) if free >= size]
        if fits:
            best = min(fits, key=lambda i: room[i])
            rows[best].append(sample)
            room[best] -= size
        else:
            rows.append([sample])
            room.append(seq_length - size)
    return rows


def packed_row(samples: list[Sample]) -> PackedRow:
    """Samples one after the other in one row."""
    row = PackedRow(input_ids=[], labels=[], cu_seq_lens=[0], prompt_spans=[], user_spans=[], task_id=[], source=[])
    for sample in samples:
        start = len(row["input_ids"])
        row["input_ids"] += sample.input_ids
        row["labels"] += [IGNORE] * sample.answer_start + sample.input_ids[sample.answer_start :]
        row["cu_seq_lens"].append(len(row["input_ids"]))
        row["prompt_spans"].append([start, start + sample.prompt_length])
        row["user_spans"].append([start + place for place in sample.user_span])
        row["task_id"].append(sample.task_id)
        row["source"].append(sample.source)
    return row


def sample_alone(row: PackedRow, index: int) -> PackedRow:
    """One sample of a row, in a row of its own."""
    begin, end = row["cu_seq_lens"][index : index + 2]

    def moved(spans: list[list[int]]) -> list[list[int]]:
        return [[place - begin for place in spans[index]]]

    return PackedRow(
        input_ids=row["input_ids"][begin:end],
        labels=row["labels"][begin:end],
        cu_seq_lens=[0, end - begin],
        prompt_spans=moved(row["prompt_spans"]),
        user_spans=moved(row.get("user_spans") or row["prompt_spans"]),
        task_id=row["task_id"][index : index + 1],
        source=row["source"][index : index + 1],
    )


def collate(rows: list[PackedRow]) -> Batch:
    """Join rows into one batch of one long row; samples stay apart.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no rows to collate; a batch needs at least one")
    bounds, positions = [0], []
    prompts: list[list[int]] = []
    users: list[list[int]] = []
    for row in rows:
        start = bounds[-1]
        bounds += [start + end for end in row["cu_seq_lens"][1:]]
        prompts += [[start + begin, start + end] for begin, end in row["prompt_spans"]]
        users += [[start + begin, start + end] for begin, end in row.get("user_spans") or row["prompt_spans"]]
        positions += [torch.arange(e - b) for b, e in zip(row["cu_seq_lens"], row["cu_seq_lens"][1:], strict=False)]

    def joined(key: str) -> Tensor:
        return torch.cat([torch.as_tensor(row[key], dtype=torch.int64) for row in rows])  # type: ignore[literal-required]

    return Batch(
        input_ids=joined("input_ids")[None],
        labels=joined("labels")[None],
        position_ids=torch.cat(positions)[None],
        cu_seq_lens=torch.tensor(bounds, dtype=torch.int32),
        prompt_spans=torch.tensor(prompts, dtype=torch.int64),
        user_spans=torch.tensor(users, dtype=torch.int64),
        task_id=joined("task_id"),
        source=[name for row in rows for name in row["source"]],
        row_samples=[len(row["task_id"]) for row in rows],
    )
