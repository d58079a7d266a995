"""By how much more MSR routers keep dense quality than static heads, sample by sample: records and a table of
a study whose runs have `samples_test.jsonl`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from elastic.bench.records import Measurement
from elastic.bench.studies.bounds import KEPT
from elastic.bench.studies.equal_quality import PARTS, Comparison, Family, family
from elastic.bench.studies.routing_tables import AT_LEAST, PAIRED
from elastic.bench.studies.runs import RIVALS, Run, Study, by_bias
from elastic.bench.studies.samples import Samples
from elastic.routing.methods import parse_method
from elastic.training.paired import Interval, Resamples, over_seeds

CRITERIA = {  # name: share of dense retrieval that is kept, whether other sources' bounds are left out
    "97 % of retrieval": (KEPT, True),
    "95 % of retrieval": (0.95, True),
    "all bounds": (KEPT, False),
}
AT_MOST = "at_most"  # as AT_LEAST, for a lead whose rival's sparsest point keeps the share still
Draws = dict[str, Tensor]  # by part of the tasks, [R]


def paired_records(study: Study) -> Iterator[Measurement]:
    """MSR at each criterion of every family, over its seeds, and the lead over each seed's strongest static rival.

    Raises:
        ValueError: runs that were tested on different samples.
    """
    judged = [run for run in study.runs if run.samples is not None and run.test is not None]
    with_dense = [run.samples for run in judged if run.samples and "dense_exact" in run.samples.columns]
    if not with_dense:
        return
    base = with_dense[0]
    comparison = Comparison(base, Resamples(base.sources))
    trained = {run.name: _trained(run, base.ids) for run in judged}
    fixed = [rival for run in judged for rival in _fixed(run, base.ids)]
    for criterion in CRITERIA:
        for (router, objective), runs in study.groups().items():
            group = [run for run in runs if run.name in trained]
            if group:
                families = [trained[run.name] for run in group]
                yield from _reached(comparison, criterion, f"{router}, {objective}", families, group)
        for rival in fixed:
            yield from _reached(comparison, criterion, rival.name, [rival], [])
        yield from _leads(study, comparison, criterion, trained, fixed)


def _trained(run: Run, ids: tuple[str, ...]) -> Family:
    """A run's own operating points."""
    assert run.samples is not None and run.test is not None
    return family(run.name, run.samples.reordered(ids), [point.method for point in by_bias(run.test)])


def _fixed(run: Run, ids: tuple[str, ...]) -> Iterator[Family]:
    """Pattern files that were measured beside a run, each with its levels."""
    assert run.samples is not None and run.test is not None
    files: dict[str, list[str]] = {}
    for name in run.test["methods"]:
        method = parse_method(name)
        if method.kind == "static":
            files.setdefault(f"static:{method.file}", []).append(name)
    samples: Samples = run.samples.reordered(ids)
    yield from (family(name, samples, methods) for name, methods in files.items())


def _reached(
    comparison: Comparison, criterion: str, who: str, families: Sequence[Family], runs: Sequence[Run]
) -> Iterator[Measurement]:
    found = [comparison.reached(of, *CRITERIA[criterion]) for of in families]
    about = {"seeds": [run.seed for run in runs], AT_LEAST: any(one.open_ended for one in found), AT_MOST: False}
    yield from _of_draws(criterion, who, [one.msr_R for one in found], about)


def _leads(
    study: Study, comparison: Comparison, criterion: str, trained: dict[str, Family], fixed: Sequence[Family]
) -> Iterator[Measurement]:
    for (router, objective), group in study.groups().items():
        if router in RIVALS:
            continue
        against = [run for kind in RIVALS for run in study.rivals(kind, objective) if run.name in trained]
        rivals = {
            run.name: [*fixed, *(trained[other.name] for other in against if other.seed == run.seed)] for run in group
        }
        runs = [run for run in group if run.name in trained and rivals[run.name]]
        found = [comparison.lead(trained[run.name], rivals[run.name], *CRITERIA[criterion]) for run in runs]
        if found:
            about = {"seeds": [run.seed for run in runs], "rivals": [lead.rival for lead in found]}
            about |= {AT_LEAST: any(x.at_least for x in found), AT_MOST: any(x.at_most for x in found)}
            yield from _of_draws(
                criterion, f"{router} - strongest static, {objective}", [x.msr_R for x in found], about
            )


def _of_draws(criterion: str, who: str, by_seed: Sequence[Draws], about: dict[str, Any]) -> Iterator[Measurement]:
    """A record for each part of the tasks: the mean over seeds, its bootstrap interval, and Student's over seeds."""
    for part in by_seed[0]:
        draws = torch.stack([of_seed[part] for of_seed in by_seed])
        found, values = Interval.of(draws.mean(0)), draws[:, 0].tolist()
        _, half = over_seeds(values)
        record = {"case": PAIRED, "who": who, "metric": part, "value": found.value, "unit": "share"}
        yield {**record, "criterion": criterion, "low": found.low, "high": found.high, "half": half,
               "by_seed": values, **about}  # fmt: skip


def paired_cells(found: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a line per criterion and family, a column per part of the tasks."""
    value = {(r["criterion"], r["who"], r["metric"]): r for r in found if r["case"] == PAIRED}
    parts = [part for part in PARTS if any(metric == part for _, _, metric in value)]
    rows = []
    for criterion, who in dict.fromkeys((criterion, who) for criterion, who, _ in value):
        of = [value.get((criterion, who, part)) for part in parts]
        first = next(record for record in of if record is not None)
        rows.append([criterion, who, str(max(1, len(first["seeds"]))), *map(_cell, of)])
    return ["kept", "router, objective", "seeds", *parts], rows


def _cell(record: Measurement | None) -> str:
    if record is None:
        return ""
    half = "" if record["half"] is None else f" ± {record['half']:.3f}"
    sign = {(False, False): "", (True, False): "≥ ", (False, True): "≤ ", (True, True): "≈ "}
    sign_of = sign[record[AT_LEAST], record[AT_MOST]]
    return f"{sign_of}{record['value']:.3f} [{record['low']:.3f}, {record['high']:.3f}]{half}"
