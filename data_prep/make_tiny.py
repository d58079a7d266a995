"""Train the tiny backbone that ships with the package: a 3-layer Qwen3 of 0.45 M parameters on the tiny language.

Run once by a maintainer (`python -m data_prep.make_tiny`); CI only uses the result. Accuracies with all heads full and
all heads streaming are written beside the weights, as measured on held-out records.
"""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from elastic.console import Parser
from elastic.data.packing import Sample, tokenise
from elastic.data.tasks import ROBUST
from elastic.files import shipped

from .tiny_language import TASKS, VOCABULARY, build_records, build_tokenizer

ASSET = shipped("assets") / "tiny"
SINK, WINDOW = 4, 32  # tokens, of the measured streaming attention
LENGTHS = (112, 240, 480)  # longest contexts measured, in words
# (share of the steps, context words, rows a step): short contexts teach copying, long ones teach reach
CURRICULUM = ((0.35, 48, 64), (0.3, 112, 32), (0.2, 240, 16), (0.15, 480, 8))


def new_model(seed: int) -> Any:
    """Randomly initialised backbone."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY.index("<pad>"),
        eos_token_id=VOCABULARY.index("<eos>"),
        bos_token_id=None,
    )
    config.max_window_layers = config.num_hidden_layers
    return Qwen3ForCausalLM(config)


def padded(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, S] and answer labels [B, S] with -100 elsewhere."""
    length = max(len(s.input_ids) for s in samples)
    ids = torch.zeros(len(samples), length, dtype=torch.int64)
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        tokens = torch.tensor(sample.input_ids)
        ids[row, : len(tokens)] = tokens
        labels[row, sample.prompt_length : len(tokens)] = tokens[sample.prompt_length :]
    return ids, labels


def visible(length: int, window: int | None) -> torch.Tensor:
    """Boolean mask [1, 1, S, S]: causal, or sink and window only. Right padding needs no mask of its own."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = key <= query
    if window is not None:
        mask &= (key < SINK) | (key > query - window)
    return mask[None, None]


def training_batch(rng: random.Random, tokenizer: Any, words: int, rows: int) -> tuple[torch.Tensor, ...]:
    """Ids, labels [B, S] and mask [B, 1, S, S]; half of the rows hide needles.

    The robust rows are learned as whole texts and, half of them, through a window: without that the model answers them
    from anywhere in the context, and they would not be robust.
    """
    tasks = ["single_qa"] * (rows // 2) + ["in_context"] * (rows // 4) + ["code"] * (rows // 4)
    samples = [tokenise(build_records(t, "train", 1, words, rng.getrandbits(60))[0], tokenizer) for t in tasks]
    ids, labels = padded(samples)
    mask = visible(ids.shape[1], None).repeat(rows, 1, 1, 1)
    narrow = visible(ids.shape[1], rng.choice([16, 24, WINDOW]))
    for row, task in enumerate(tasks):
        if task in ROBUST:
            labels[row] = ids[row].masked_fill(ids[row] == 0, -100)
            if rng.random() < 0.5:
                mask[row] = narrow[0]
    return ids, labels, mask


def train(model: Any, tokenizer: Any, steps: int, seed: int, lr: float) -> float:
    """AdamW with cosine decay over the curriculum; returns the smoothed loss, every row weighing the same."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    stages = [stage for share, *stage in CURRICULUM for _ in range(round(share * steps))]
    rng = random.Random(seed)
    smoothed = math.nan
    bar = tqdm(stages, desc="tiny backbone", unit="step", mininterval=5)
    for step, (words, rows) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / len(stages)))
        ids, labels, mask = training_batch(rng, tokenizer, words, rows)
        logits = model(ids, attention_mask=mask).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
        weight = (labels[:, 1:] != -100).float()
        loss = ((losses * weight).sum(1) / weight.sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        smoothed = loss.item() if math.isnan(smoothed) else 0.95 * smoothed + 0.05 * loss.item()
        bar.set_postfix(loss=f"{smoothed:.3f}", words=words)
    return smoothed


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, task: str, words: int, window: int | None, count: int = 64) -> float:
    """Share of held-out records whose answer tokens, end included, are all predicted (teacher forcing).

    All heads see everything (`window` None) or only the sink and the `window` latest tokens.
    """
    samples = [tokenise(r, tokenizer) for r in build_records(task, "test", count, words, seed=0)]
    correct = 0
    for start in range(0, count, 16):
        ids, labels = padded(samples[start : start + 16])
        predicted = model(ids, attention_mask=visible(ids.shape[1], window)).logits[:, :-1].argmax(-1)
        wanted = labels[:, 1:]
        correct += int(((predicted == wanted) | (wanted == -100)).all(1).sum())
    return correct / count


def measure(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Held-out accuracy per task and longest context with all heads full and all heads streaming."""
    model.eval()
    return {
        name: {f"{t}/{w}": accuracy(model, tokenizer, t, w, window) for t in TASKS for w in LENGTHS}
        for name, window in (("full", None), ("streaming", WINDOW))
    }


def save(model: Any, tokenizer: Any, out: Path, training: dict[str, Any]) -> None:
    """bf16 weights, tokenizer and a record of the training, readable by everyone."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    for file in out.iterdir():
        file.chmod(0o644)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = Parser(prog="python -m data_prep.make_tiny", description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSET, help="folder of the backbone (default: the package's asset)")
    parser.add_argument("--steps", type=int, default=900, help="optimiser steps (default 900)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default 0)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    args = parser.parse_args(argv)
    import transformers

    model, tokenizer = new_model(args.seed), build_tokenizer()
    loss = train(model, tokenizer, args.steps, args.seed, args.lr)
    model.to(torch.bfloat16).float()  # measured as shipped
    training: dict[str, Any] = {"steps": args.steps, "seed": args.seed, "lr": args.lr, "loss": loss}
    training |= {"torch": torch.__version__, "transformers": transformers.__version__, "sink": SINK, "window": WINDOW}
    training["accuracy"] = measure(model, tokenizer)
    save(model, tokenizer, args.out, training)
    sys.stdout.write(json.dumps(training["accuracy"], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
