"""Train the tiny backbone that ships with the package: a 3-layer Qwen3 of 0.5 M parameters on the tiny language.

Run once by a maintainer (`python -m data_prep.make_tiny`); CI only uses the result. Accuracies with all heads full and
all heads streaming are written beside the weights, as measured on held-out records.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from data_prep.tiny_language import TASKS, VOCABULARY, build_records, build_tokenizer
from elastic.backbone import attach, detach, override_routes
from elastic.config import ElasticConfig, SparseConfig
from elastic.packed import Sample, tokenise

ASSET = Path(__file__).parent.parent / "elastic" / "assets" / "tiny"
STREAMING = SparseConfig(sink=4, window=32, block=4)
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


def train(model: Any, tokenizer: Any, steps: int, seed: int, lr: float) -> float:
    """AdamW with cosine decay over the curriculum; the loss is on answers, for patterns on whole texts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    stages = [stage for share, *stage in CURRICULUM for _ in range(round(share * steps))]
    rng = random.Random(seed)
    smoothed = math.nan
    bar = tqdm(stages, desc="tiny backbone", unit="step")
    for step, (words, rows) in enumerate(bar):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / len(stages)))
        tasks = ["single_qa"] * (rows // 2) + ["in_context"] * (rows // 2)
        samples = [tokenise(build_records(t, "train", 1, words, rng.getrandbits(60))[0], tokenizer) for t in tasks]
        ids, labels = padded(samples)
        labels[rows // 2 :] = ids[rows // 2 :].masked_fill(ids[rows // 2 :] == 0, -100)
        logits = model(ids).logits
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
def accuracy(model: Any, tokenizer: Any, task: str, words: int, count: int = 64) -> float:
    """Share of held-out records whose answer tokens are all predicted (teacher forcing)."""
    samples = [tokenise(r, tokenizer) for r in build_records(task, "test", count, words, seed=0)]
    ids, labels = padded(samples)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(s.input_ids)] for s in samples])
    predicted = model(ids, attention_mask=mask.long()).logits[:, :-1].argmax(-1)
    wanted = labels[:, 1:]
    return ((predicted == wanted) | (wanted == -100)).all(1).float().mean().item()


def measure(model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
    """Held-out accuracy per task and context length with all heads full and all heads streaming."""
    attach(model.eval(), ElasticConfig(sparse=STREAMING))
    results: dict[str, dict[str, float]] = {}
    for name, route in (("full", 0), ("streaming", 1)):
        with override_routes(model, route):
            results[name] = {f"{t}/{w}": accuracy(model, tokenizer, t, w) for t in TASKS for w in (112, 240, 480)}
    detach(model)
    return results


def save(model: Any, tokenizer: Any, out: Path, facts: dict[str, Any]) -> None:
    """bf16 weights, tokenizer and the training facts."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ASSET, help="folder of the backbone (default: the package's asset)")
    parser.add_argument("--steps", type=int, default=800, help="optimiser steps (default 800)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data (default 0)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    args = parser.parse_args(argv)
    model, tokenizer = new_model(args.seed), build_tokenizer()
    loss = train(model, tokenizer, args.steps, args.seed, args.lr)
    model.to(torch.bfloat16).float()  # measured as shipped
    results = measure(model, tokenizer)
    facts = {"steps": args.steps, "seed": args.seed, "lr": args.lr, "loss": loss, "torch": torch.__version__}
    save(model, tokenizer, args.out, {**facts, "accuracy": results})
    sys.stdout.write(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
