"""How many decisions of routers another system prompt changes, and what it costs: the same questions of the foreign
test split with the chat template's own system prompt, with none, a short and a long one, dense and routed.

    python tests/bench/system_prompts.py level=runs/routing/level-calibrated-0/checkpoint --out tests/bench/results
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file, its neighbours are found too

from data_prep.draw import token_count
from data_prep.foreign import FOREIGN, generate_foreign
from data_prep.foreign_instructions import LONG_SYSTEM, SHORT_SYSTEM
from elastic.bench.records import Measurement, save, stamp
from elastic.bench.tables import terminal
from elastic.console import say
from elastic.data.calibration_rows import batches_of
from elastic.data.packing import collate, tokenise
from elastic.data.records import Record
from elastic.data.tasks import SENSITIVE
from elastic.inference.generate import load
from elastic.model.attach import biased, elastic_config, last_routes, override_routes
from elastic.training.evaluation_module import packed_hidden_states
from elastic.training.metrics import score_answers

TEST = 1  # place of the test split's half of the wording
SYSTEMS = {"own": None, "none": "", "short": SHORT_SYSTEM[TEST][0], "long": LONG_SYSTEM[TEST][0]}
LENGTHS = (1000, 2000, 4000)


def records(count: int, tokenizer: Any) -> list[Record]:
    """`count` of each kind and length."""
    measure = token_count(tokenizer)
    return [
        record
        for name in FOREIGN
        for length in LENGTHS
        for record in generate_foreign(name, "test", count, length, 0, measure, shortest=length - 100, system="none")
    ]


@torch.no_grad()
def judged(model: Any, tokenizer: Any, found: Sequence[Record], batch_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Routes [M, L, K], exact answers routed and dense [M], in the order of the records."""
    samples = [replace(tokenise(record, tokenizer), source=str(i)) for i, record in enumerate(found)]
    rows, device = batches_of(samples, batch_tokens), next(model.parameters()).device
    routes, routed, dense = [], [], []
    for of_batch in rows.batches:
        batch: Any = {name: to_device(value, device) for name, value in collate(of_batch).items()}
        routed.append(exact(model, batch))
        routes.append(last_routes(model).route.transpose(0, 1))
        with override_routes(model, 0, elastic_config(model).sparse.dense):
            dense.append(exact(model, batch))
    place = torch.tensor([int(source) for source in rows.sources]).argsort()
    return tuple(torch.cat(parts).cpu()[place] for parts in (routes, routed, dense))  # type: ignore[return-value]


def exact(model: Any, batch: Any) -> Tensor:
    """Whether each answer is right, [N]."""
    hidden = packed_hidden_states(model, batch)
    head = model.get_output_embeddings()
    return score_answers(hidden, head, batch["labels"], batch["cu_seq_lens"], 1024).scores["exact"]


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a batch where the model is."""
    return value.to(device) if isinstance(value, Tensor) else value


def compared(name: str, model: Any, tokenizer: Any, found: Sequence[Record], tokens: int) -> Iterator[Measurement]:
    """The figures of one checkpoint at its own operating point."""
    facts = torch.tensor([record.task in SENSITIVE for record in found])
    seen = {
        system: judged(model, tokenizer, [replace(record, system=text) for record in found], tokens)
        for system, text in SYSTEMS.items()
    }
    usual = seen["own"][0]
    for system, (routes, routed, dense) in seen.items():
        about = {"case": f"system prompt {system}", "who": name, "n": len(found)}
        yield {**about, "metric": "MSR", "value": float(routes.mean()), "unit": "share"}
        changed = float((routes != usual).float().mean())
        yield {
            **about,
            "metric": "decisions that differ from own",
            "value": changed,
            "unit": "share",
        }
        for what, right in (("routed", routed), ("dense", dense)):
            value = float(right[facts].mean())
            yield {**about, "metric": f"exact answers, {what}", "value": value, "unit": "share", "n": int(facts.sum())}


def main(argv: Sequence[str]) -> int:
    """Measure every checkpoint, write the records, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME[@BIAS]=FOLDER", help="name in the records, and routers")
    parser.add_argument("--count", type=int, default=8, help="of each kind and length (default 8)")
    parser.add_argument("--batch-tokens", type=int, default=65536, help="in a forward pass (default 65536)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", help="of the backbone (default bfloat16)")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--tag", default="system-prompts", help="name of the file")
    parser.add_argument("--commit", help="commit to state where git is not at hand")
    args = parser.parse_args(argv)
    named = [word.partition("=") for word in args.checkpoints]
    words = ["python tests/bench/system_prompts.py", *(f"{name}=CHECKPOINT" for name, _, _ in named)]
    made_by = stamp(" ".join([*words, "--count", str(args.count)]), args.commit, torch.device(args.device))
    found: list[Measurement] = []
    for name, _, folder in named:
        model, tokenizer = load(folder, device=args.device, dtype=args.dtype)
        drawn = records(args.count, tokenizer)
        with biased(model, float(name.partition("@")[2] or elastic_config(model).sparsity_bias)):
            found += compared(name, model, tokenizer, drawn, args.batch_tokens)
    found = [{**record, **made_by} for record in found]
    say(terminal(found))
    say(f"wrote {save(args.out / f'{args.tag}.json', found)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
