"""Run a `Case` on an attached model and beside it the reference in fp64 (tests/helpers/masked64.py): `equal`,
`refused: why`, or `DIFFERENT: where`.

python -m tests.robustness.run_case [family or all] [cases] [first]
"""

import copy
import functools
import re
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import elastic
from elastic.cache.elastic_cache import ElasticCache
from elastic.config import ElasticConfig, RouterConfig, SparseConfig
from elastic.inference.generate import route_report
from elastic.model.attach import attach, last_routes, override_routes, routers
from elastic.model.layer_types import stock_layers
from tests.helpers.masked64 import Reference, Sample
from tests.helpers.models import FAMILIES, KV_HEADS, LAYERS, tiny_model, varied_routers
from tests.robustness.batch import ROOM, Batch
from tests.robustness.cases import Case, case_of

PACKAGE = Path(elastic.__file__).parent
PIECE = 8  # tokens of a prompt that is read in pieces
TOLERANCE = 5e-3  # of logits, whose deviation is 2.4; rounding stays below 1e-3
UNDECIDED = 1e-3  # margin of a decision that rounding may turn


@functools.cache
def stock(family: str, seed: int = 0) -> Any:
    return tiny_model(family, seed, eos_token_id=None, initializer_range=0.3)


@functools.cache
def reference_of(family: str) -> Reference:
    return Reference(stock(family))


def attached(family: str, case: Case) -> tuple[Any, ElasticConfig]:
    """A routed model as the case wants it."""
    sink, window, block = case.sizes
    config = ElasticConfig(
        RouterConfig(pool_tokens=8, kind=case.kind),
        SparseConfig(sink=sink, window=window, block=block, granule=case.granule),
        sparsity_bias=case.bias, dense_decode=case.dense_decode, chunk_tokens=case.chunk_tokens,
        kv_cache=case.cache if case.cache == "elastic" else "full",
    )  # fmt: skip
    torch.manual_seed(case.number)  # what routers begin with
    model = attach(copy.deepcopy(stock(family)), config)
    if case.kind == "paper":
        varied_routers(model, case.number % 5)
        return model, config
    for router in routers(model) if case.kind == "level" else ():
        router.update_statistics(torch.rand(32, router.weight.shape[0]))
        torch.nn.init.normal_(router.weight, std=0.2)
    return model, config


class Run:
    """A case under way. Its steps raise what the model raises, or AssertionError where model and reference part."""

    def __init__(self, family: str, case: Case) -> None:
        self.family, self.case, self.batch = family, case, Batch(family, case)
        self.model, self.config = attached(family, case)
        self.reference, self.worst = reference_of(family), 0.0
        self.override = torch.tensor(case.route) if isinstance(case.route, tuple) else case.route
        self.routes = None if case.route == "own" else torch.as_tensor(self.override).expand(LAYERS, KV_HEADS)
        self.given: Tensor | None = None  # in force
        self.cache: Any = None
        if case.cache == "dynamic":
            self.cache = DynamicCache(config=self.model.config)
        elif case.cache == "static":
            self.cache = StaticCache(config=self.model.config, max_cache_len=ROOM)
        elif case.cache in ("full", "elastic"):
            self.cache = ElasticCache(
                self.model.config.num_hidden_layers, self.config, step=8, windows=stock_layers(self.model.config)
            )

    @torch.no_grad()
    def __call__(self) -> None:
        """All steps; without a cache only the first, which may leave one."""
        if self.case.padding == "packed":
            return self.packed()
        begin, end = self.case.forced
        for place, (name, *arguments) in enumerate(self.case.steps):
            if self.cache is None and self.batch.seen:
                return
            if self.override == "own" or not begin <= place < end:
                self.given = None
                getattr(self, name)(*arguments)
                continue
            self.given = self.routes
            with override_routes(self.model, self.override):
                getattr(self, name)(*arguments)

    # -- steps

    def packed(self) -> None:
        """All prompts in one row."""
        self.batch.begin(self.config.sparse, self.given)
        self.cache = None
        logits = self.model(**self.batch.packed(), use_cache=False).logits[0]
        self.judge(list(logits.split([len(sample.ids) for sample in self.batch.samples])), True)

    def read(self, count: int) -> None:
        """A turn of so many new tokens."""
        self.batch.append(count)
        if self.batch.unread:
            turn = self.batch.reads_turn
            self.judge(self.forward(), turn)

    def tokens(self, count: int) -> None:
        """So many decode steps."""
        self.read(0)
        found = []
        for _ in range(count):
            self.batch.append(1)
            found.append(self.forward())
        self.judge([torch.cat(row) for row in zip(*found, strict=True)], False)

    def forward(self) -> list[Tensor]:
        """One pass over the unread tokens; the logits of every sample's, [S, V] each."""
        batch, (ids, mask) = self.batch, self.batch.grid()
        width = batch.unread
        batch.begin(self.config.sparse, self.given)
        options = {**batch.mask(mask), **batch.positions(mask), **batch.user_spans()}
        cached = {"past_key_values": self.cache, "use_cache": self.cache is not None}
        logits = self.model(ids[:, -width:], **cached, **options).logits
        batch.seen, batch.unread = ids.shape[1], 0
        return [found[kept] for found, kept in zip(logits, mask[:, -width:].bool(), strict=True)]

    def generate(self, new: int, steps: int, how: str) -> None:
        """`model.generate` after a turn of so many new tokens."""
        batch = self.batch
        batch.append(new if batch.seen else 0)
        turn, (ids, mask) = batch.reads_turn, batch.grid()
        options: dict[str, Any] = {
            "greedy": {},
            "lookup": {"prompt_lookup_num_tokens": 3},
            "assistant": {"assistant_model": stock(self.family, 7)},
            "beams": {"num_beams": 3, "output_scores": True},
            "chunks": {"prefill_chunk_size": PIECE},
        }[how]
        if self.case.cache == "static by name":
            options["cache_implementation"] = "static"
        if how == "beams" and batch.seen and self.case.number % 4 and self.case.cache != "static":
            self.cache.batch_repeat_interleave(3)  # without, it is refused
        batch.begin(self.config.sparse, self.given, PIECE if how == "chunks" else ROOM)
        found = self.model.generate(
            ids, past_key_values=self.cache, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **options, **batch.mask(mask),
        )  # fmt: skip
        self.cache = found.past_key_values
        if turn:
            self.take_routes(3 if how == "beams" else 1)
        if how == "beams":
            return self.judge_beams(found, turn, steps)
        logits = torch.stack(found.logits, 1)  # [B, steps, V]
        assert torch.equal(logits.argmax(-1), found.sequences[:, ids.shape[1] :]), "tokens are not the likeliest"
        batch.answered(found.sequences.tolist(), ids.shape[1])
        self.judge(list(logits), turn)

    def crop(self, count: int) -> None:
        """Take back so many tokens."""
        self.cache.crop(-count)
        self.batch.crop(count)

    def reorder(self, order: tuple[int, ...]) -> None:
        """Rows become copies of others."""
        self.cache.reorder_cache(torch.tensor(order))
        self.batch.choose(list(order))

    def select(self, rows: tuple[int, ...]) -> None:
        """Keep some rows."""
        self.cache.batch_select_indices(torch.tensor(rows))
        self.batch.choose(list(rows))

    def repeat(self, times: int) -> None:
        """Every row so many times."""
        self.cache.batch_repeat_interleave(times)
        self.batch.choose([row for row in range(len(self.batch.samples)) for _ in range(times)])

    def copy(self) -> None:
        """Continue on a copy of the cache."""
        self.cache = copy.deepcopy(self.cache)

    # -- judgement

    def take_routes(self, beams: int = 1) -> None:
        """The routes that the report states, into the samples' last turns."""
        samples = self.batch.samples
        if self.cache is None:
            routes = [route.long() for route in last_routes(self.model).route.unbind(1)]
        else:
            reports = route_report(self.model, self.cache)[::beams]
            routes = [torch.tensor(report.route) for report in reports]
            lengths = [report.prompt_tokens for report in reports]
            assert lengths == [sample.turns[-1].end for sample in samples], f"the report states lengths {lengths}"
        for sample, route in zip(samples, routes, strict=True):
            sample.turns[-1].route = route

    def judge(self, logits: list[Tensor], turn: bool) -> None:
        """Compare the logits after every sample's last tokens, [S, V] each; after a turn its routes, too."""
        if self.cache is not None:
            held = int(self.cache.get_seq_length())
            assert held == self.batch.seen, f"the cache holds {held} tokens, not {self.batch.seen}"
        if turn:
            self.take_routes()
        for row, (sample, found) in enumerate(zip(self.batch.samples, logits, strict=True)):
            self.reference.prepare(self.config, routers(self.model), sample, turn)
            right = self.reference.logits()[-len(found) :]
            error = (found - right).abs().amax(1)
            self.worst = max(self.worst, float(error.max()))
            off = (~(error < TOLERANCE)).nonzero().flatten().tolist()
            assert not off, f"row {row}: logits of {len(off)} in {len(found)} tokens are off by up to {error.max():.2g}"
            if turn:
                self.judge_route(row, sample)

    def judge_beams(self, found: Any, turn: bool, steps: int) -> None:
        """Compare with the reference's own search; two best beams may be as good as each other."""
        for row, sample in enumerate(self.batch.samples):
            self.reference.prepare(self.config, routers(self.model), sample, turn)
            tokens, score = self.reference.beams(steps, 3, self.batch.other_routes(sample))
            off = abs(float(found.sequences_scores[row]) - score)
            assert off < TOLERANCE, f"row {row}: the best beam's score is off by {off:.2g}"
            assert found.sequences[row, -steps:].tolist() == tokens[-steps:] or off < 1e-5, f"row {row}: another beam"
            if turn:
                self.judge_route(row, sample)

    def judge_route(self, row: int, sample: Sample) -> None:
        """Whether the last turn's routes [L, K] are those that its keys, or the override, ask for."""
        turn, margin = sample.turns[-1], torch.stack(self.reference.margin)
        assert turn.route is not None
        asked, sure = (margin > 0).long(), margin.abs() > UNDECIDED
        if self.given is not None:
            asked, sure = self.given, torch.ones_like(sure)
        if turn.dropped:
            before = sample.turns[-2].route == 1
            asked, sure = torch.where(before, 1, asked), sure | before
        wrong = ((asked != turn.route) & sure).nonzero().tolist()
        assert not wrong, f"row {row}: routes of (layer, head) {wrong} are not what the keys ask for"


def outcome(family: str, number: int) -> str:
    """What comes of a case. A refusal is an error that the package raises; any other error is a difference."""
    try:
        Run(family, case_of(number))()
    except AssertionError as error:
        return f"DIFFERENT: {error}"
    except Exception as error:  # noqa: BLE001
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if isinstance(error, ValueError) and Path(frame.filename).is_relative_to(PACKAGE):
            return f"refused: {error}"
        return f"DIFFERENT: raised {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    return "equal"


def main() -> None:
    """Run cases of families and count what comes of them."""
    family, count, first = (*sys.argv[1:4], *("all", "500", "0")[len(sys.argv) - 1 :])
    for name in FAMILIES if family == "all" else [family]:
        found = {number: outcome(name, number) for number in range(int(first), int(first) + int(count))}
        kinds = Counter(re.sub(r"\[?-?\d[\d., \[\]-]*", "# ", what)[:100] for what in found.values())
        lines = [f"{times:6} {kind}" for kind, times in kinds.most_common()]
        lines += [f"case {number}: {what}" for number, what in found.items() if what.startswith("DIFFERENT")]
        sys.stdout.write("\n".join([name, *lines]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
