"""The test rows of packed data as benchmarks of `elastic eval`: a task for each kind of source, answers teacher-forced,
as `elastic test` judges them. `exact` counts, or `accuracy` where answers are running text, which no model has exactly.

Legend: N samples of a batch.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from elastic.data.context_length import context_length
from elastic.data.packing import PackedRow, collate, sample_alone
from elastic.data.shards import open_corpus, verify
from elastic.data.source_names import kind_of, length_of
from elastic.data.tasks import ROBUST, SENSITIVE, TASKS, bound_score
from elastic.evaluation.benchmark import Found, Request, Routed, Share
from elastic.evaluation.scores import slug
from elastic.model.attach import last_routes, override_routes
from elastic.model.logits import logit_head
from elastic.routing.sparsity import esr, msr
from elastic.training.evaluation_module import packed_hidden_states
from elastic.training.metrics import score_answers
from elastic.training.resume import check_tokenizer

SPLIT = "test"
SETS = {"sensitive": SENSITIVE, "robust": ROBUST}
LOSS_CHUNK = 1024  # positions whose logits exist at a time


@dataclass(frozen=True)
class Place:
    """Where a sample lies, and what is known of it without reading it.

    Attributes:
        corpus, row, index: as in `samples_test.jsonl`.
        source, task: its names.
        tokens: of prompt and answer.
    """

    corpus: str
    row: int
    index: int
    source: str
    task: str
    tokens: int

    @property
    def kind(self) -> str:
        """Of the source, fit to be part of a file's name."""
        return slug(kind_of(self.source))

    @property
    def length(self) -> int:
        """Of the cell of the table that it belongs to."""
        return length_of(self.source) or 1 << (self.tokens - 1).bit_length()


class TestRows:
    """What a data folder holds for tests.

    Args:
        data: packed data with a test split.

    Raises:
        FileNotFoundError, ValueError: no such data, damaged data, or data without a test split.
    """

    __test__ = False  # not a test of pytest

    def __init__(self, data: Path) -> None:
        self.data, self.manifest = data, verify(data)
        if SPLIT not in self.manifest["splits"]:
            splits = ", ".join(self.manifest["splits"])
            raise ValueError(f"{data} has no split {SPLIT!r}, only {splits}; build the data with it")

    @cached_property
    def classes(self) -> dict[str, set[str]]:
        """Task classes of every kind of source."""
        found: dict[str, set[str]] = {}
        for place in self.places:
            found.setdefault(place.kind, set()).add(place.task)
        return found

    @cached_property
    def places(self) -> list[Place]:
        """All samples of the split, in order."""
        found = []
        for corpus in self.manifest["splits"][SPLIT]:
            rows = open_corpus(self.data, SPLIT, corpus).select_columns(["cu_seq_lens", "source", "task_id"])
            for number, row in enumerate(rows):
                parts = zip(row["source"], row["task_id"], pairwise(row["cu_seq_lens"]), strict=True)
                for index, (source, task, (begin, end)) in enumerate(parts):
                    found.append(Place(corpus, number, index, source, TASKS[task], end - begin))
        return found

    def read(self, place: Place) -> PackedRow:
        """A sample as a row of its own."""
        return sample_alone(self._corpora[place.corpus][place.row], place.index)

    @cached_property
    def _corpora(self) -> dict[str, Any]:
        return {corpus: open_corpus(self.data, SPLIT, corpus) for corpus in self.manifest["splits"][SPLIT]}


class PackedRows:
    """The sensitive or the robust tasks of a data folder, as the runner sees them.

    Args:
        name: of the data.
        of: a key of `SETS`.
        rows: the data.
    """

    usual_samples: int | None = None
    protocol: str = (
        "teacher-forced on the test rows of packed data; score: all answer tokens right, or the share of them where "
        "answers are running text; length: what the source names, else the next power of two from the tokens on"
    )
    corrections: tuple[str, ...] = ()

    def __init__(self, name: str, of: str, rows: TestRows) -> None:
        self.name, self.rows = f"{name}_{of}", rows
        self.skipped: list[str] = []
        self.kinds: dict[str, list[Place]] = {}
        for place in rows.places:
            if place.task in SETS[of]:
                several = len(rows.classes[place.kind]) > 1
                kind = f"{place.kind}_{place.task}" if several else place.kind
                self.kinds.setdefault(f"{name}_{kind.removeprefix(f'{name}_')}", []).append(place)

    def tasks(self) -> tuple[str, ...]:
        """A task for each kind of source, for each of its task classes where it has several."""
        return tuple(sorted(self.kinds))

    def left_out(self) -> dict[str, str]:
        """None: what is not in the data has no name."""
        return {}

    def lengths(self, task: str, asked: Sequence[int], /) -> tuple[int, ...]:
        """Those of the asked lengths that some sample has."""
        found = {place.length for place in self.kinds[task]}
        return tuple(length for length in asked if length in found)

    def takes_chat(self, _task: str, /) -> bool:
        """Rows went through the chat template when they were packed."""
        return False

    def identity(self, _task: str, /) -> Any:
        """Checksums of the data."""
        corpora = self.rows.manifest["splits"][SPLIT]
        return {"split": SPLIT, "sha256": {corpus: entry["sha256"] for corpus, entry in corpora.items()}}

    def chosen(self, request: Request) -> list[Place]:
        """The samples that a request is for: the first of each source in turn, so that few are of all sources."""
        found = [place for place in self.kinds[request.task] if place.length == request.length]
        seen: Counter[str] = Counter()
        turns = []
        for place in found:
            turns.append((seen[place.source], place))
            seen[place.source] += 1
        turns.sort(key=lambda turn: turn[0])  # stable: within a turn in the data's order
        return [place for _, place in turns[: request.samples]]

    def measure(self, routed: Routed, requests: Sequence[Request], share: Share) -> list[Found]:
        """Scores of the answers, `batch_size` samples packed together; `prefill_seconds` are those of the batch's whole
        forward pass.
        """
        check_tokenizer(self.rows.manifest, routed.tokenizer, routed.backbone)
        chosen, limit = [self.chosen(request) for request in requests], context_length(routed.model.config)
        longest = max(place.tokens for places in chosen for place in places)
        if longest > limit:
            raise ValueError(f"{self.name} has samples of {longest} tokens, but {routed.backbone} reads {limit} here")
        return [self._measured(routed, places, share) for places in chosen]

    def _measured(self, routed: Routed, places: Sequence[Place], share: Share) -> Found:
        mine = share(range(len(places)))
        batches = (mine[i : i + routed.batch_size] for i in range(0, len(mine), routed.batch_size))
        return [
            (at, {"index": at, **line})
            for batch in batches
            for at, line in zip(batch, self._batch(routed, [places[at] for at in batch]), strict=True)
        ]

    @torch.no_grad()
    def _batch(self, routed: Routed, places: Sequence[Place]) -> Iterator[dict[str, Any]]:
        model, sparse = routed.model, routed.sparse
        batch = collate([self.rows.read(place) for place in places])
        on_device: Any = {k: v.to(model.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        started = time.perf_counter()
        with override_routes(model, routed.route, sparse):
            hidden_1SE = packed_hidden_states(model, on_device)
        state = last_routes(model)
        route_LNK = state.route.double().cpu()  # waits for the GPU
        seconds = time.perf_counter() - started
        density_LNK = None if state.density is None else state.density.cpu()
        last_N, all_N = esr(route_LNK, state.lengths.cpu(), sparse, density_LNK)
        answers = score_answers(
            hidden_1SE, logit_head(model), on_device["labels"], on_device["cu_seq_lens"], LOSS_CHUNK
        )
        told = {name: value.tolist() for name, value in answers.scores.items()}
        for n, place in enumerate(places):
            scores = {name: values[n] for name, values in told.items()}
            yield {
                "id": f"{place.corpus}/{place.row}/{place.index}",
                "source": place.source,
                "score": scores["accuracy" if bound_score(place.task) == "loss" else "exact"],
                **scores,
                "msr": float(msr(route_LNK)[n]),
                "esr_last": float(last_N[n]),
                "esr_all": float(all_N[n]),
                "prefill_seconds": seconds,
                "tokens": place.tokens,
            }


def of_folder(name: str, data: Path) -> list[PackedRows]:
    """The benchmarks of a data folder: its sensitive tasks and its robust ones, those that it has.

    Raises:
        FileNotFoundError, ValueError: as `TestRows`, or a name that cannot be part of a task's.
    """
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ValueError(f"--rows {name}={data}: {name!r} is not a name; use letters, digits and _")
    rows = TestRows(data)
    return [made for of in SETS if (made := PackedRows(name, of, rows)).kinds]
