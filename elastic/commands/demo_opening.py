"""How `elastic demo` opens: the shipped checkpoint on one question about a long text, beside the dense model."""

from pathlib import Path

import elastic
from elastic.console import say

SHIPPED = Path("checkpoints") / "smollm2-135m-fa-ssa"
LINE, FACT = (
    "The night watch wrote down every ship that passed the lighthouse.",
    "The secret number of the harbour is 4711.",
)
QUESTION, ANSWER = "What is the secret number of the harbour mentioned in the text above?", "4711"
NEW_TOKENS = 16


def shipped() -> Path | None:
    """The shipped checkpoint, in the working directory or in the clone that this package is run from."""
    places = (SHIPPED, Path(elastic.__file__).parents[1] / SHIPPED)
    return next((place for place in places if (place / "elastic.json").is_file()), None)


def lighthouse() -> str:
    """About 1,500 tokens with one fact in their first third."""
    lines = [LINE] * 120
    return " ".join([*lines[:40], FACT, *lines[40:]])


def opening(question: str | None, text: Path | None) -> None:
    """Ask the shipped checkpoint, and print its answer, its level and the dense model's answer.

    Args:
        question: the user's own; default one about `lighthouse()`, whose answer is known.
        text: file that the question is about; default `lighthouse()`.

    Raises:
        FileNotFoundError: a question of the user's own, but no shipped checkpoint.
        ValueError: a text that is not UTF-8 or longer than the backbone reads.
    """
    from elastic.inference.generate import generate, load
    from elastic.model.attach import override_routes

    place = shipped()
    if place is None:
        if question or text:
            raise FileNotFoundError(f"--question and --text ask the checkpoint {SHIPPED}, which only a clone has")
        say(f"    left out: the checkpoint {SHIPPED} is part of a clone, not of an installed package")
        return
    try:
        context = lighthouse() if text is None else text.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {text} is not UTF-8 (byte {error.start}); convert it") from error
    model, tokenizer = load(place)
    asked = question or QUESTION
    prompt = f"{context}\n\n{asked}"
    routed = generate(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS)[0]
    report = routed.report
    full, heads = sum(map(len, report.route)) - sum(map(sum, report.route)), sum(map(len, report.route))
    say(f"    {report.prompt_tokens} tokens, then: {asked}")
    say(f"    routed:  {' '.join(routed.text.split())}")
    say(f"             MSR {report.msr:.2f}: {full} of {heads} heads full, the others see {report.sink} first and "
        f"{report.window} last tokens")  # fmt: skip
    with override_routes(model, 0):
        dense = generate(model, tokenizer, prompt, max_new_tokens=NEW_TOKENS)[0]
    say(f"    dense:   {' '.join(dense.text.split())}")
    if question is None and text is None:
        kept = [name for name, answer in (("routed", routed), ("dense", dense)) if ANSWER in answer.text]
        say(f"    {ANSWER} is right: {' and '.join(kept) or 'neither'} found it")
