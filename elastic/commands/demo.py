"""`elastic demo`: what routing does, on a small real model and the CPU: the shipped checkpoint, then a calibration with
level routers, prompts, held-out figures and pictures.
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elastic.commands.catalogue import COMMANDS
from elastic.console import Parser, complain, say
from elastic.files import check_place, sole_writer

if TYPE_CHECKING:
    from elastic.commands.demo_measure import Outcome
    from elastic.commands.demo_records import DemoSettings

MIN_SEPARATION = 0.05  # an MSR gap below this is called no separation
TRIES = 4  # held-out texts, of which one is printed


def main(argv: list[str]) -> int:
    """Run the command."""
    parser = Parser(prog="elastic demo", description=COMMANDS["demo"])
    parser.add_argument("--tiny", action="store_true", help="the shipped 1 MB backbone instead of SmolLM2-135M")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default runs/demo, or runs/demo-tiny")
    parser.add_argument("--question", metavar="TEXT", help="your own, to open with (default: one about a lighthouse)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="what --question is about (default: a lighthouse's log)"
    )
    more = "records of each kind that level routers are fitted to (default: what fits into the time)"
    parser.add_argument("--samples", type=int, metavar="N", help=more)
    parser.add_argument("--seed", type=int, default=0, help="of records and random routes (default 0)")
    args = parser.parse_args(argv)
    # Threads that spin while they wait make a shared machine many times slower; torch must not be loaded before this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        if args.samples is not None and args.samples < 2:
            raise ValueError(f"--samples {args.samples} is below 2; routers cannot be fitted to less")
        if args.tiny and (args.question or args.text):
            raise ValueError("--question and --text ask SmolLM2's shipped checkpoint, which --tiny does not have")
        if args.text is not None and args.question is None:
            raise ValueError("--text needs a --question about it")
        out = args.out or Path("runs/demo-tiny" if args.tiny else "runs/demo")
        check_place("--out", out, folder=True)
        with sole_writer(out):
            run(out, args.tiny, args.samples, args.seed, args.question, args.text)
    except (ValueError, OSError, ArithmeticError) as error:
        return complain("demo", error)
    return 0


def run(out: Path, tiny: bool, samples: int | None, seed: int, question: str | None, text: Path | None) -> None:
    """All parts of the demo, one after the other; writes a calibration, pictures and a checkpoint into `out`."""
    from elastic.commands import demo_records
    from elastic.commands.demo_opening import opening

    began = time.perf_counter()
    settings = demo_records.SMALLEST if tiny else demo_records.SMALL
    settings = settings if samples is None else replace(settings, levels=samples)
    out.mkdir(parents=True, exist_ok=True)

    def step(number: int, what: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - began), 60)
        say(f"{number}/4 {what} [{minutes}:{seconds:02d}]")

    say(f"{settings.backbone}: {settings.minutes} on two idle cores; bars show what is left of a step")
    step(1, "A question for the shipped checkpoint")
    if tiny:
        say("    left out: there is none for the tiny backbone")
    else:
        opening(question, text)
    step(2, "Calibration: what each head is needed for, and how far down the order an input may go")
    checkpoint = measured(settings, out, seed, step)
    step(4, "The checkpoint, loaded again: three held-out prompts")
    three_prompts(settings, checkpoint, seed)
    say(f"\nDone in {(time.perf_counter() - began) / 60:.1f} minutes.")
    prompt, answer = own_question(settings, checkpoint, seed)
    say(f"Next: {program()} generate --checkpoint {shlex.quote(str(checkpoint))} --prompt {shlex.quote(prompt)}")
    if answer:
        say(f"    a held-out question; the right answer is {answer}")


def measured(settings: "DemoSettings", out: Path, seed: int, step: Any) -> Path:
    """Calibrate, fit, score and write everything; the checkpoint."""
    from elastic.commands.calibration_report import cost_table, describe, draw
    from elastic.commands.demo_measure import calibrated, held_out, rows_of, score_table
    from elastic.commands.demo_records import build_rows
    from elastic.model.checkpoint import save_elastic
    from elastic.model.loading import load_tokenizer

    rows = build_rows(settings, load_tokenizer(settings.backbone), seed)
    say("\n".join(f"    {describe(name, of)}" for name, of in zip(("order", "cost", "levels"), rows, strict=False)))
    sparse = settings.sparse
    say(f"    sparse heads see {sparse.sink} first and {sparse.window} last tokens ({sparse.name})")
    module, found, explained = calibrated(settings, rows, out, seed)
    say(f"\n{cost_table(found)}\n")
    step(3, "Held-out samples: dense, level routers, and the static order at their mean MSR, in whole heads")
    outcomes, _ = held_out(module, found, rows.held_out)
    figures = rows_of(outcomes)
    say(f"\n{score_table(figures)}")
    say("score: whole answers right of needles and fact_chain, answer tokens right of the others, both greedy after")
    say("the record's own first words; MSR: share of heads that run sparse; KL: nats per answer token")
    say(f"\n{verdict(figures, settings.budget)}\n")
    recipe = {"command": "elastic demo", "seed": seed, "explained variance by layer": explained, **asdict(settings)}
    checkpoint = save_elastic(out / "checkpoint", module.model, settings.backbone, None, recipe, {"held out": figures})
    pictures = draw(found, out / "heatmap.png"), draw_levels(settings, outcomes, out / "levels.png")
    say(f"Written: {', '.join(map(str, (checkpoint, out / 'calibration.json', *pictures)))}\n")
    return checkpoint


def verdict(rows: Sequence[dict[str, Any]], budget: float) -> str:
    """What the figures say, also where they are disappointing."""
    from elastic.commands.demo_measure import DENSE, LEVELS, STATIC
    from elastic.commands.demo_records import FAR

    by = {(row["kind"], row["method"]): row for row in rows}
    kinds = list(dict.fromkeys(row["kind"] for row in rows))

    def mean(method: str, name: str) -> float:
        return sum(float(by[kind, method][name]) for kind in kinds) / len(kinds)

    missed = [f"{kind} {by[kind, LEVELS]['kl']:.3f}" for kind in kinds if by[kind, LEVELS]["kl"] > budget]
    lines = [
        f"Budget {budget:g} nats: " + (f"missed by {', '.join(missed)}; " if missed else "")
        + f"met by {len(kinds) - len(missed)} of {len(kinds)} kinds.",
        f"Means over kinds: level routers {mean(LEVELS, 'score'):.3f} at MSR {mean(LEVELS, 'msr'):.2f}, static order "
        f"{mean(STATIC, 'score'):.3f} at MSR {mean(STATIC, 'msr'):.2f}, dense {mean(DENSE, 'score'):.3f}.",
    ]  # fmt: skip
    far = by[FAR, LEVELS]["msr"]
    others = sum(by[kind, LEVELS]["msr"] for kind in kinds if kind != FAR) / (len(kinds) - 1)
    lines.append(f"{FAR} runs {far:.0%} of its heads sparse, the other kinds {others:.0%}.")
    if others - far < MIN_SEPARATION:
        lines.append("So level routers cannot tell inputs apart at this scale; more --samples may help.")
    lines.append(f"n = {min(row['n'] for row in rows)} a kind: differences within the intervals may be chance.")
    return "\n".join(lines)


def three_prompts(settings: "DemoSettings", checkpoint: Path, seed: int) -> None:
    """Answer a far question, a near one and a request for a summary, of the first held-out text of `TRIES` on which the
    dense model answers both questions; of the first one where there is none.
    """
    from elastic.commands.demo_measure import answers, is_right
    from elastic.commands.demo_records import SUMMARY, shared_context
    from elastic.inference.generate import load

    model, tokenizer = load(checkpoint)
    about = ("the answer is far", "the answer is in the window", "a pattern" if settings.tiny else "a summary")
    for number, three in enumerate(texts := shared_context(settings, tokenizer, seed, TRIES)):
        found = [answers(model, tokenizer, record, settings.new_tokens) for record in three]
        if all(is_right(record, dense, tokenizer) for record, (_, dense) in list(zip(three, found, strict=True))[:2]):
            say(f"    the first of {len(texts)} texts whose two questions the dense model answers: number {number + 1}")
            break
    else:
        say(f"    the last of {len(texts)} texts; the dense model answers both questions of none")
    same = "one text, its fact moved into the window for the second prompt; the third has a pattern of its own"
    say(f"    {same if settings.tiny else 'the same text before each'}\n")
    for what, record, (routed, dense) in zip(about, three, found, strict=True):
        report = routed.report
        say(f"{what}: … {record.question}")
        given = f"; the answer was begun with: {record.answer_prefix}" if record.answer_prefix else ""
        say(f"  MSR {report.msr:.2f}{given}")
        judged = record.question != SUMMARY  # of a summary there are many right ones
        if judged:
            say(f"  expected: {shorten(record.answer)}")
        for name, answer in (("dense", dense), ("routed", routed)):
            mark = (" (right)" if is_right(record, answer, tokenizer) else " (wrong)") if judged else ""
            say(f"  {name + ':':9} {shorten(answer.text)}{mark}")
        say()


def draw_levels(settings: "DemoSettings", outcomes: Sequence["Outcome"], path: Path) -> Path:
    """Draw the level of every held-out sample, by kind."""
    from elastic.commands.demo_measure import LEVELS
    from elastic.plots import Panel, panels_figure, save_png

    lines = {}
    for kind in dict.fromkeys(outcome.source for outcome in outcomes):
        levels = sorted(of.msr for of in outcomes if of.source == kind and of.method == LEVELS)
        lines[kind] = [((place + 0.5) / len(levels), level) for place, level in enumerate(levels)]
    title = f"{settings.backbone}: levels of held-out samples"
    panel = Panel(title, lines, "share of the samples, sorted", "MSR", marker="o")
    return save_png(panels_figure([[panel]]), path)


def own_question(settings: "DemoSettings", checkpoint: Path, seed: int) -> tuple[str, str]:
    """A short prompt in the backbone's language, on one line, for the user to begin with; and its answer, or "" where
    there are many. Of questions in the tiny language the first that the routed model answers, if there is one: its
    backbone does not answer all of them.
    """
    from elastic.commands.data_prep import part
    from elastic.inference.generate import generate, load

    if not settings.tiny:
        return "Name three oceans.", ""
    model, tokenizer = load(checkpoint)
    short = part("tiny_language").build_records("single_qa", "test", 16, 48, seed)
    asked = [(" ".join(record.prompt.split()), record.answer) for record in short]
    right = (
        (prompt, answer)
        for prompt, answer in asked
        if generate(model, tokenizer, prompt, max_new_tokens=8)[0].text.strip() == answer
    )
    return next(right, asked[0])


def program() -> str:
    """How this program is called from the user's shell: `elastic`, where it is on the path."""
    return "elastic" if shutil.which("elastic") else f"{shlex.quote(sys.executable)} -m elastic"


def shorten(text: str, limit: int = 100) -> str:
    """One line of at most `limit` characters."""
    text = " ".join(text.split())
    return text if len(text) <= limit else f"{text[: limit - 2]} …"
