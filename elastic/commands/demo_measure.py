"""The measuring part of `elastic demo`: level routers fitted to a calibration, scored on held-out samples beside the
dense model and the static order, and prompts answered in the way that they are scored.

Legend: L layers, N samples, K KV heads.
"""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from elastic.commands.demo_records import FAR, NEAR, DemoSettings, Rows
from elastic.console import table
from elastic.data.calibration_rows import RowSet
from elastic.data.packing import Batch, collate, tokenise
from elastic.data.prompts import EncodedPrompt
from elastic.data.records import Record
from elastic.inference.generate import Generation, answer_tokens
from elastic.model.attach import last_routes, override_routes
from elastic.model.logits import logit_head
from elastic.protocols import CausalLM, Tokenizer
from elastic.routing.calibration import Calibration, first_heads
from elastic.training.calibration import HeadNeed
from elastic.training.calibration_run import measure
from elastic.training.evaluation_module import packed_hidden_states
from elastic.training.intervals import wilson
from elastic.training.losses import answer_divergence, labelled_positions
from elastic.training.metrics import score_answers

DENSE, STATIC, LEVELS = "dense", "static order", "level routers"
EXACT = (FAR, NEAR, "fact_chain")  # kinds whose answer is right or wrong; others are scored by token
CHUNK = 1024  # positions whose logits exist at a time


@dataclass(frozen=True)
class Outcome:
    """What one way of routing did on a held-out sample.

    Attributes:
        source: kind of the sample.
        method: `DENSE`, `STATIC` or `LEVELS`.
        score: whether the whole answer is predicted (`EXACT`), or which share of its tokens is.
        kl: KL(dense || method) in nats per answer token.
        msr: share of heads that ran sparse.
    """

    source: str
    method: str
    score: float
    kl: float
    msr: float


def calibrated(
    settings: DemoSettings, rows: Rows, folder: Path, seed: int
) -> tuple[HeadNeed, Calibration, list[float]]:
    """Measure the order and what level routers are fitted to, and fit them: the module whose `model` has them, the
    calibration, and the share of the breaking level's variance that each layer's router explains on its own rows.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    partial, origin = folder / "calibration.partial", {"from": "elastic demo", "seed": seed}
    module = HeadNeed(
        settings.backbone, settings.sparse, settings.recipe, (rows.order, rows.cost), partial, origin,
        level_rows=rows.levels,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice of libraries that no user can act on
        found = measure(module)
    explained = module.fit(settings.budget)
    module.model.requires_grad_(False).eval()
    found.write(folder / "calibration.json")
    partial.unlink(missing_ok=True)
    return module, found, explained


@torch.no_grad()
def held_out(module: HeadNeed, found: Calibration, rows: RowSet) -> tuple[list[Outcome], Tensor]:
    """Every held-out sample under the three ways of routing, the static order at the level routers' mean MSR; and the
    routers' decisions [N, L, K], sample by sample.
    """
    model, outcomes, routes = module.model, [], []
    batches = [collate(batch) for batch in rows.batches]
    with tqdm(total=3 * len(batches), desc="held-out samples", unit="pass") as bar:
        dense = []
        for batch in batches:
            with override_routes(model, 0):
                dense.append(packed_hidden_states(model, batch))
            outcomes += _scored(model, batch, DENSE, dense[-1], dense[-1], torch.zeros(len(batch["source"])))
            bar.update()
        for batch, teacher in zip(batches, dense, strict=True):
            hidden = packed_hidden_states(model, batch)
            route_NLK = last_routes(model).route.transpose(0, 1)
            routes.append(route_NLK)
            outcomes += _scored(model, batch, LEVELS, hidden, teacher, route_NLK.mean((1, 2)))
            bar.update()
        route_NLK = torch.cat(routes)
        static_LK = first_heads(found.order, float(route_NLK.mean()), *route_NLK.shape[1:])
        for batch, teacher in zip(batches, dense, strict=True):
            with override_routes(model, static_LK):
                hidden = packed_hidden_states(model, batch)
            outcomes += _scored(model, batch, STATIC, hidden, teacher, static_LK.mean().expand(len(batch["source"])))
            bar.update()
    return outcomes, route_NLK


def _scored(
    model: CausalLM, batch: Batch, method: str, hidden_1SE: Tensor, dense_1SE: Tensor, msr_N: Tensor
) -> list[Outcome]:
    head, labels, bounds = logit_head(model), batch["labels"], batch["cu_seq_lens"]
    scores = score_answers(hidden_1SE, head, labels, bounds, CHUNK).scores
    dense_PE = labelled_positions(dense_1SE, labels)[0]
    kl_N = answer_divergence(hidden_1SE, dense_PE, head, labels, bounds, CHUNK)
    return [
        Outcome(
            source, method, float(scores["exact" if source in EXACT else "accuracy"][i]), float(kl_N[i]), float(msr)
        )
        for i, (source, msr) in enumerate(zip(batch["source"], msr_N.tolist(), strict=True))
    ]


def rows_of(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Means by kind and method, with their n and interval: one row of the printed table each."""
    found = []
    for source in dict.fromkeys(outcome.source for outcome in sorted(outcomes, key=lambda of: _place(of.source))):
        for method in (DENSE, STATIC, LEVELS):
            own = [outcome for outcome in outcomes if (outcome.source, outcome.method) == (source, method)]
            score, kl, msr = (sum(getattr(of, name) for of in own) / len(own) for name in ("score", "kl", "msr"))
            low, high = wilson(score, len(own))
            about = {"kind": source, "method": method, "n": len(own), "score": score, "low": low, "high": high}
            found.append({**about, "msr": msr, "kl": kl})
    return found


def _place(source: str) -> tuple[int, str]:
    return (EXACT.index(source), "") if source in EXACT else (len(EXACT), source)


def score_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `rows_of`."""
    header = ("kind", "n", "routing", "score", "95 % interval", "MSR", "KL to dense")
    lines = []
    for row in rows:
        first = row["method"] == DENSE
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        about = [row["kind"] if first else "", str(row["n"]) if first else "", row["method"]]
        lines.append([*about, f"{row['score']:.3f}", interval, f"{row['msr']:.2f}", f"{row['kl']:.3f}"])
    return table(header, lines)


def answers(model: CausalLM, tokenizer: Tokenizer, record: Record, new_tokens: int) -> tuple[Generation, Generation]:
    """The routed model's answer to a record and the dense model's, greedy, as they are scored: after the record's
    answer prefix, under the routes of the prompt alone.
    """
    sample = tokenise(record, tokenizer)
    prompt = [EncodedPrompt(sample.input_ids[: sample.answer_start], sample.user_span)]
    routed = answer_tokens(model, tokenizer, prompt, max_new_tokens=new_tokens)[0]
    with override_routes(model, 0):
        return routed, answer_tokens(model, tokenizer, prompt, max_new_tokens=new_tokens)[0]


def is_right(record: Record, answer: Generation, tokenizer: Tokenizer) -> bool:
    """Whether an answer begins with all tokens of the record's, as it is scored."""
    sample = tokenise(record, tokenizer)
    expected = sample.input_ids[sample.answer_start :]
    return answer.token_ids[: len(expected)] == expected
