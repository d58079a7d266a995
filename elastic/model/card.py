"""The model card of a checkpoint: what the hub shows of a repository, written from the checkpoint's provenance."""

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

from elastic.config import ElasticConfig
from elastic.files import text_sha256
from elastic.model.loading import SMOLLM2, is_hub_id

PAPER = "https://arxiv.org/abs/2601.17367"
TAGS = ("elastic-attention", "attention-router", "sparse-attention", "long-context")
_MARK = "<!-- written by elastic push; sha256 of the lines above: "
_LONGEST = 400  # characters of a value that the card shows
_ORIGINS = {SMOLLM2: "HuggingFaceTB/SmolLM2-135M-Instruct"}  # of backbones with names of their own


def model_card(metadata: Mapping[str, Any], place: str, license_id: str | None = None) -> str:
    """Markdown with YAML front matter, in UTF-8.

    Args:
        metadata: what `read_elastic` returns.
        place: what to load the checkpoint by, such as owner/name.
        license_id: of the routers, as the hub names it (apache-2.0); None: the card names none.
    """
    from huggingface_hub import ModelCardData

    shape, name = metadata["architecture"], metadata["backbone"]
    base = _ORIGINS.get(name, name if is_hub_id(name) else None)
    front = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="elastic-attention",
        license=license_id,
        pipeline_tag="text-generation",
        tags=[*TAGS, str(shape.get("model_type", "transformers"))],
    )
    backbone = f"[{base}](https://huggingface.co/{base})" if base else _cell(name)
    parts = (
        f"---\n{front.to_yaml().strip()}\n---",
        f"# {_cell(place.rstrip('/').split('/')[-1])}",
        f"Attention routers of [Elastic Attention]({PAPER}) for {backbone}: for every prompt and KV head they decide "
        f"between {_modes(metadata)} attention. No weights of the backbone are in this repository.",
        f"## Use\n\n{_use(place)}",
        f"## Routers\n\n{_table(_facts(metadata))}",
        f"## How they were made\n\n{_table(_flat(metadata['recipe']))}",
        f"## Measured\n\n{_table(_flat(metadata['metrics']))}",
    )
    text = "\n\n".join(parts) + "\n\n"
    return f"{text}{_MARK}{text_sha256(text.strip())} -->\n"


def is_written_here(text: str) -> bool:
    """Whether a card is as `model_card` of this or another version wrote it, to the letter."""
    above, mark, last = text.replace("\r\n", "\n").rpartition(_MARK)
    return bool(mark) and last.strip() == f"{text_sha256(above.strip())} -->"


def _use(place: str) -> str:
    pinned = 'Add `revision="<commit>"` to stay with the routers of one commit. ' if is_hub_id(place) else ""
    return (
        "```python\n"
        "import elastic\n\n"
        f"model, tokenizer = elastic.load({json.dumps(place)})\n"
        '(result,) = elastic.generate(model, tokenizer, "Name three oceans.")\n'
        "print(result.text, result.report)\n"
        "```\n\n"
        f"{pinned}`backbone=` says where the backbone is, if others load it by another name."
    )


def _modes(metadata: Mapping[str, Any]) -> str:
    sparse = ElasticConfig.from_dict(metadata["config"]).sparse
    return f"{sparse.route0} and {sparse.route1}"


def _facts(metadata: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the routers are, and what identifies them and their backbone."""
    yield "backbone", metadata["backbone"]
    yield from metadata["architecture"].items()
    yield "sha256 of the architecture", metadata.get("architecture_sha256")
    yield "sha256 of router.safetensors", metadata["weights_sha256"]
    yield from _flat(metadata["config"])
    yield "chat_template_kwargs", metadata["chat_template_kwargs"]
    yield from _flat(metadata.get("versions") or {})


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted name, in their order; empty objects as they are."""
    if isinstance(values, Mapping) and values:
        for name, value in values.items():
            yield from _flat(value, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix, values


def _table(rows: Iterator[tuple[str, Any]]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows if value is not None]
    return "\n".join(["| what | value |", "| --- | --- |", *lines]) if lines else "Nothing was recorded."


def _cell(value: Any) -> str:
    """A value as one cell of a table, in which it can be neither markup nor another cell."""
    text = " ".join((f"{value:.6g}" if isinstance(value, float) else str(value)).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
    text = html.escape(text, quote=False)
    return "".join(f"\\{letter}" if letter in r"\|`*[]" else letter for letter in text)
