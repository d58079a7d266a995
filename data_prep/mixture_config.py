"""What a mixture file says: sources with their weights, token budgets, context lengths, targets per task."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from elastic.console import hint
from elastic.data.prompts import TEMPLATE_KWARGS, check_kwargs
from elastic.data.shards import SPLITS
from elastic.data.tasks import TASKS
from elastic.files import read_yaml

from .foreign import FOREIGN, check_foreign
from .generators import GENERATORS, SHORTEST
from .overlap import WINDOW


@dataclass(frozen=True)
class Source:
    """One source of records.

    Attributes:
        weight: its share of the tokens, relative to the others'.
        path: record files, with `{split}` in the place of the split's name; None: a generator.
        generator: its name, where the source has another one: `needle_single-8192: {generator: needle_single, ...}`.
        context: shortest and longest generated context in tokens, where they differ from the mixture's.
        system: system prompt of a foreign kind (`foreign.SYSTEMS`); None: in turn. In a file, a list makes a source of
            each, named `<source>-none` and so on, with equal parts of the weight.
    """

    weight: float = 1.0
    path: str | None = None
    generator: str | None = None
    context: tuple[int, int] | None = None
    system: str | None = None


@dataclass(frozen=True)
class Mixture:
    """A mixture of sources, as YAML writes it down.

    Attributes:
        backbone: whose tokenizer and chat template to use.
        seq_length: tokens of a packed row.
        tokens: budget per split; room that is then left in rows is filled up by the generators among the sources.
        sources: by name; a name without `path` is a generator's.
        context: shortest and longest generated context, in tokens. Short ones fill the rows up.
        seed: seed of everything drawn.
        targets: wanted MSR per task, a number or [low, high]; written into `train.yaml` beside the data.
        text, code: folders that generators draw from, instead of what Python itself carries.
        part_tokens: tokens of one shard: the unit of work, of memory and of resuming.
        window: tokens at the end of a context that answers of robust tasks may share text with (overlap.py); that of
            the streaming heads to be trained.
        chat_template_kwargs: variables of the chat template.
    """

    backbone: str
    seq_length: int
    tokens: dict[str, int]
    sources: dict[str, Source]
    context: tuple[int, int]
    seed: int = 0
    targets: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    code: str | None = None
    part_tokens: int = 1_000_000
    window: int = WINDOW
    chat_template_kwargs: dict[str, Any] = field(default_factory=lambda: dict(TEMPLATE_KWARGS))

    def __post_init__(self) -> None:
        check_kwargs(self.chat_template_kwargs)
        if set(self.tokens) - set(SPLITS) or not self.tokens or min(self.tokens.values()) < self.seq_length:
            raise ValueError(
                f"tokens={self.tokens}; expected a budget of at least one row ({self.seq_length} tokens) for splits "
                f"out of {', '.join(SPLITS)}"
            )
        for context in (self.context, *(source.context for source in self.sources.values() if source.context)):
            if len(context) != 2 or not SHORTEST <= context[0] <= context[1] < self.seq_length:
                raise ValueError(
                    f"context={list(context)}; expected two lengths from {SHORTEST} to below the {self.seq_length} "
                    "tokens of a row"
                )
        if not self.sources:
            raise ValueError(f"no sources; name generators ({', '.join(GENERATORS)}) or record files")
        for name, source in self.sources.items():
            self._check_origin(name, source)
            if not isinstance(source.weight, int | float) or not 0 < source.weight < float("inf"):
                raise ValueError(f"source {name!r} has the weight {source.weight!r}; expected a number above 0")
        unknown = [task for task in self.targets if task not in TASKS]
        if unknown:
            raise ValueError(f"targets name {', '.join(unknown)}; known tasks are {', '.join(TASKS)}")
        if self.part_tokens < self.seq_length:
            raise ValueError(f"part_tokens={self.part_tokens} is below seq_length={self.seq_length}")
        if self.window < 0:
            raise ValueError(f"window={self.window} is negative; expected a length in tokens, 0 for none")

    def _check_origin(self, name: str, source: Source) -> None:
        """Refuse what is not record files, a generator, or a foreign kind in a mixture without a train split."""
        generator = source.generator or name
        if source.path is not None:
            if source.generator or source.context or source.system:
                raise ValueError(
                    f"source {name!r} has a path, so it takes no generator and no context, nor a system prompt; "
                    "leave them out"
                )
        elif generator in FOREIGN:
            for split in self.tokens:
                check_foreign(generator, split, source.system, source.context or self.context)
        elif generator not in GENERATORS:
            raise ValueError(
                f"source {name!r} has no path and is not a generator; generators are "
                f"{', '.join((*GENERATORS, *FOREIGN))}"
            )
        elif source.system is not None:
            raise ValueError(f"source {name!r} has a system prompt to choose; only foreign kinds do, so leave it out")

    def parts(self, split: str) -> int:
        """Number of shards of a split, all of about the same size."""
        return max(1, round(self.tokens[split] / self.part_tokens))

    @property
    def folders(self) -> tuple[Path | None, Path | None]:
        """Where generators draw text and code from."""
        return Path(self.text) if self.text else None, Path(self.code) if self.code else None

    def share(self, name: str) -> float:
        """A source's share of the tokens."""
        return self.sources[name].weight / sum(source.weight for source in self.sources.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return {**asdict(self), "context": list(self.context)}


def read_mixture(path: str | Path) -> Mixture:
    """Read a mixture file; paths in it are relative to the working directory.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, or keys or values that a mixture does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no mixture file at {path}")
    values = read_yaml(path)
    try:
        _check_keys("the mixture", values, Mixture)
        if isinstance(values.get("tokens"), dict):
            values["tokens"] = {split: _whole(f"tokens.{split}", of) for split, of in values["tokens"].items()}
        values |= {
            name: _whole(name, values[name]) for name in ("seq_length", "part_tokens", "window") if name in values
        }
        sources = dict(pair for key, of in values.get("sources", {}).items() for pair in _sources(key, of or {}))
        return Mixture(**{**values, "sources": sources, "context": _lengths(values.get("context", ()))})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _sources(name: str, settings: dict[str, Any]) -> Iterator[tuple[str, Source]]:
    """The source, or one for each of its system prompts."""
    systems = settings.get("system")
    if not isinstance(systems, list) or not systems:
        yield name, _source(name, settings)
        return
    weight = settings.get("weight", 1.0) / len(systems)
    for system in systems:
        yield f"{name}-{system}", _source(name, {**settings, "system": system, "weight": weight})


def _whole(name: str, value: Any) -> int:
    """A count of tokens; 1e6, which YAML takes for text, and 1.0e+6 count as well."""
    try:
        count = float(value)
    except (TypeError, ValueError):
        count = 0.5
    if isinstance(value, bool) or count != count // 1 or count in (float("inf"), float("-inf")):
        raise ValueError(f"{name}={value!r} is not a whole number of tokens; write it as 1_000_000 or 1e6")
    return int(count)


def _lengths(context: Any) -> tuple[Any, ...]:
    return tuple(_whole("context", length) for length in context)


def _check_keys(what: str, settings: dict[str, Any], of: Any) -> None:
    known = [f.name for f in fields(of)]
    if unknown := [key for key in settings if key not in known]:
        raise ValueError(f"{what} has no setting {unknown[0]!r}; {hint(str(unknown[0]), known, 'settings')}")


def _source(name: str, settings: dict[str, Any]) -> Source:
    _check_keys(f"source {name!r}", settings, Source)
    context = settings.get("context")
    return Source(**settings if context is None else {**settings, "context": _lengths(context)})
