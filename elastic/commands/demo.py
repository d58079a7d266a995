"""`elastic demo`: train routers on a small real model on the CPU, compare with dense, save, load, generate."""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic.commands.catalogue import COMMANDS
from elastic.console import Parser, complain, say, side_by_side, supports_unicode, table
from elastic.data.tasks import ROBUST, SENSITIVE

MIN_SEPARATION = 0.05  # an MSR gap below this is called no separation


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(prog="elastic demo", description=COMMANDS["demo"])
    parser.add_argument("--tiny", action="store_true", help="the shipped 1 MB backbone instead of SmolLM2-135M")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default runs/demo, or runs/demo-tiny")
    parser.add_argument("--steps", type=int, metavar="N", help="optimiser steps (default: what fits into the time)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, noise and initial weights (default 0)")
    args = parser.parse_args(argv)
    # Threads that spin while they wait make a shared machine many times slower; torch must not be loaded before this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if args.steps is not None and args.steps < 5:
            raise ValueError(f"--steps {args.steps} is below 5; the feature statistics need a few steps")
        run(args.out or Path("runs/demo-tiny" if args.tiny else "runs/demo"), args.tiny, args.steps, args.seed)
    except (ValueError, OSError, ArithmeticError) as error:
        return complain("demo", error)
    return 0


def run(out: Path, tiny: bool, steps: int | None, seed: int) -> None:
    """All parts of the demo, one after the other; writes pictures and a checkpoint into `out`."""
    from elastic.commands import demo_training as training
    from elastic.model.checkpoint import save_elastic
    from elastic.plots import save_png, share_figure

    began = time.perf_counter()
    settings = training.SMALLEST if tiny else training.SMALL
    settings = settings if steps is None else replace(settings, steps=steps)
    out.mkdir(parents=True, exist_ok=True)
    say(f"1/4 Offline data for {settings.backbone}: {settings.language} records, rows of {settings.seq_length} tokens")
    data, left_out = training.build_data(settings, out, seed)
    if left_out:
        say(f"    {left_out} records did not fit into a row and were left out")
    sparse = settings.sparse
    say(f"2/4 Training routers: {settings.steps} steps, {sparse.name}, sink {sparse.sink}, window {sparse.window}")
    module, follow = training.train(settings, data, seed)
    say("3/4 Held-out records, every head full (dense) against the routers' choice (elastic)\n")
    say(score_table(module.results))
    say(f"\n{verdict(module.results)}\n")
    checkpoint = save_elastic(
        out / "checkpoint",
        module.model,
        settings.backbone,
        module.multipliers,
        training.recipe(settings, seed),
        module.results,
    )
    title = f"{settings.backbone}: share of held-out inputs on SA, {settings.steps} training steps"
    heatmap = save_png(share_figure(module.route_maps, title), out / "heatmap.png")
    curves = save_png(follow.figure(), out / "curves.png")
    say(f"Written: {checkpoint}, {heatmap}, {curves}\n")
    say("4/4 Loading the checkpoint and answering two held-out prompts")
    say("    in the model's own words, which a small backbone often gets wrong, dense too; the table is the measure\n")
    answer_two(checkpoint, out / "records" / "test", settings.prompts, settings.new_tokens)
    minutes = (time.perf_counter() - began) / 60
    prompt, answer = training.question(settings, seed)
    say(f'\nDone in {minutes:.1f} minutes. Next: elastic generate --checkpoint {checkpoint} --prompt "{prompt}"')
    if answer:
        say(f"    a held-out question; the right answer is {answer}")


def score_table(results: dict[str, dict[str, float]]) -> str:
    """One line per task: answer-token accuracy and loss of both, and the two sparsity ratios."""
    header = ("task", "n", "dense acc", "elastic acc", "dense loss", "elastic loss", "MSR", "ESR last", "ESR all")
    names = (
        "dense_accuracy",
        "elastic_accuracy",
        "dense_loss",
        "elastic_loss",
        "msr",
        "esr_last",
        "esr_all",
    )
    rows = [[task, f"{row['n']:.0f}", *(f"{row[name]:.3f}" for name in names)] for task, row in results.items()]
    return table(header, rows)


def verdict(results: dict[str, dict[str, float]]) -> str:
    """What the figures say, also where they are disappointing."""

    def mean(name: str, tasks: tuple[str, ...]) -> float:
        values = [results[task][name] for task in tasks if task in results]
        return sum(values) / len(values)

    sensitive, robust = mean("msr", SENSITIVE), mean("msr", ROBUST)
    every = (*SENSITIVE, *ROBUST)
    change = mean("elastic_accuracy", every) - mean("dense_accuracy", every)
    lines = [f"Sensitive tasks run {sensitive:.0%} of their heads sparse, robust tasks {robust:.0%}."]
    if robust - sensitive < MIN_SEPARATION:
        lines.append("The routers hardly tell the tasks apart after this short run; more --steps may help.")
    n = min(row["n"] for row in results.values())
    lines.append(f"Answer-token accuracy changes by {change:+.3f} on average over tasks (n = {n:.0f} a task: rough).")
    return "\n".join(lines)


def answer_two(checkpoint: Path, records: Path, tasks: tuple[str, str], new_tokens: int) -> None:
    """Answer one held-out prompt of each task, and show how their routes differ."""
    from elastic.inference.generate import generate, load
    from elastic.inference.report import heads_that_differ
    from elastic.model.attach import override_routes

    model, tokenizer = load(checkpoint)
    reports = []
    for task in tasks:
        record = first_record(records / f"{task}.jsonl")
        result = generate(model, tokenizer, record.prompt, max_new_tokens=new_tokens)[0]
        with override_routes(model, 0):
            dense = generate(model, tokenizer, record.prompt, max_new_tokens=new_tokens)[0]
        reports.append(result.report)
        say(f"{task}: … {record.question}")
        say(f"  expected: {shorten(record.answer)}")
        say(f"  dense:    {shorten(dense.text)}")
        say(f"  elastic:  {shorten(result.text)}\n")
    unicode = supports_unicode(sys.stdout)
    one, two = (f"{task}\n{report.render(unicode)}" for task, report in zip(tasks, reports, strict=True))
    say(side_by_side(one, two))
    differ, total = heads_that_differ(*reports), sum(map(len, reports[0].route))
    say(f"\n{differ} of {total} heads are routed differently for the two prompts.")
    if differ < MIN_SEPARATION * total:
        say("That is next to nothing: for these two prompts the routers act like one fixed pattern.")


def first_record(file: Path) -> Any:
    """The first record of a file that `data_prep` wrote."""
    from elastic.data.records import Record

    with open(file, encoding="utf-8") as lines:
        return Record.from_dict(json.loads(next(lines)))


def shorten(text: str, limit: int = 100) -> str:
    """One line of at most `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 2]} …"
