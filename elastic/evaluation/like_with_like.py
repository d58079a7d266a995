"""Like with like: the backbone that all methods of an evaluation run on, and the sizes of those without a checkpoint.

Both are those of the checkpoints that methods name, unless the command line says otherwise; without checkpoints, sizes
are those that the calibrations among the methods were measured with.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from elastic.config import ElasticConfig, SparseConfig
from elastic.data.prompts import TEMPLATE, TEMPLATE_KWARGS
from elastic.model.checkpoint import read_elastic
from elastic.model.loading import SMOLLM2, backbone_architecture, backbone_id
from elastic.routing.calibration import Calibration, is_calibration, read_calibration
from elastic.routing.methods import Method

ALONE = SparseConfig(sink=64, window=256, block=64)  # sizes where no method names a checkpoint
SIZES = {  # what a mode depends on, among what `elastic eval` has flags for
    "full": (),
    "streaming": ("sink", "window", "block"),
    "xattention": ("block", "stride"),
    "moba": ("block",),
    "nsa": ("window", "block"),
    "infllm": ("sink", "window", "block"),
    "flexprefill": ("block",),
    "flashprefill": ("sink", "window", "block"),
}
VOCABULARY = "vocab_size"  # which a backbone may extend without becoming another one


@dataclass(frozen=True)
class Trained:
    """What a checkpoint says about the model that it is of, and how its routers run (all of its settings but those of
    the sparse pattern).
    """

    path: str
    backbone: str
    architecture: Mapping[str, Any]
    sparse: SparseConfig
    routers: Mapping[str, Any]
    template: Mapping[str, Any]


def trained(path: str) -> Trained:
    """Read from `elastic.json`.

    Raises:
        FileNotFoundError, ValueError: as `read_elastic`.
    """
    found = read_elastic(path)
    config = ElasticConfig.from_dict(found["config"])
    routers = {name: value for name, value in config.to_dict().items() if name != "sparse"}
    template = {**TEMPLATE_KWARGS, **found[TEMPLATE]}
    return Trained(path, found["backbone"], found["architecture"], config.sparse, routers, template)


def common_template(methods: Sequence[Method]) -> dict[str, Any]:
    """What the chat template is told for all methods: what it was told in the training of their checkpoints.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: checkpoints that were told different things.
    """
    named = _checkpoints(methods)
    other = next((one for one in named if one.template != named[0].template), None)
    if other is not None:
        raise ValueError(
            f"checkpoint {named[0].path} was trained with chat_template_kwargs {dict(named[0].template)}, {other.path} "
            f"with {dict(other.template)}, but all methods read the same prompts; evaluate them in two commands"
        )
    return dict(named[0].template if named else TEMPLATE_KWARGS)


def common_backbone(methods: Sequence[Method], asked: str | None) -> str:
    """The backbone that all methods run on.

    Args:
        asked: `--backbone`; None: that of the checkpoints among the methods, or SmolLM2 where there are none.

    Raises:
        FileNotFoundError: no such checkpoint or backbone.
        ValueError: checkpoints of several backbones, or of another architecture than the one that was asked for.
    """
    named = _checkpoints(methods)
    if asked is None:
        first = named[0] if named else None
        other = next((one for one in named if one.backbone != named[0].backbone), None)
        if first is None or other is None:
            return SMOLLM2 if first is None else first.backbone
        raise ValueError(
            f"checkpoint {first.path} is of backbone {first.backbone!r}, {other.path} of {other.backbone!r}, but all "
            "methods run on one backbone; evaluate them in two commands, or name one that fits both with --backbone"
        )
    for one in named:
        if backbone_id(asked) == one.backbone:
            continue
        mine = backbone_architecture(asked)
        if differing := [key for key in mine if key != VOCABULARY and mine[key] != one.architecture.get(key)]:
            here, there = (", ".join(f"{key}={of.get(key)}" for key in differing) for of in (mine, one.architecture))
            raise ValueError(
                f"--backbone {asked} has {here}, but checkpoint {one.path} is of backbone {one.backbone!r} with "
                f"{there}; leave --backbone out, or evaluate the checkpoint in a command of its own"
            )
    return asked


def common_sizes(methods: Sequence[Method], asked: Mapping[str, int | None]) -> SparseConfig:
    """What methods without a checkpoint run on: full and streaming heads, of the sizes that were asked for, else those
    of the checkpoints among the methods, else those of the calibrations among them, else those of `ALONE`.

    Args:
        asked: sink, window, block and stride in tokens, by name; None: not asked for.

    Raises:
        OSError, ValueError: no such checkpoint, or a calibration that cannot be read; sizes that cannot be, or
            checkpoints (calibrations) that disagree about one that a method takes from them.
    """
    named = _measured(methods)
    wanted = {size for method in methods if method.checkpoint is None for size in _sizes(method, ALONE)}
    sizes: dict[str, int] = {}
    disputed: dict[str, tuple[_Measured, _Measured]] = {}
    for size, value in asked.items():
        using = [one for method, one in named if size in _sizes(method, one.sparse)] or [one for _, one in named]
        found = {getattr(one.sparse, size): one for one in reversed(using)}  # of each value the first
        if value is None and size in wanted and len(found) > 1:
            first = using[0]
            disputed[size] = first, next(one for n, one in found.items() if n != getattr(first.sparse, size))
        sizes[size] = value if value is not None else getattr(using[0].sparse if using else ALONE, size)
    if disputed:
        first, other = next(iter(disputed.values()))
        here, there = (", ".join(f"{size} {getattr(one.sparse, size)}" for size in disputed) for one in (first, other))
        raise ValueError(
            f"{first.name} has {here}, {other.name} has {there}, so it is open what methods without a "
            f"checkpoint run on; give {' and '.join(f'--{size}' for size in disputed)}, or evaluate in two commands"
        )
    granules = {one.sparse.granule for _, one in named}
    return SparseConfig(
        sink=sizes["sink"],
        window=sizes["window"],
        block=sizes["block"],
        stride=sizes["stride"],
        granule=granules.pop() if len(granules) == 1 else ALONE.granule,
    )


class _Measured(NamedTuple):
    """What was trained, or measured, with these sizes."""

    name: str
    sparse: SparseConfig


def _measured(methods: Sequence[Method]) -> list[tuple[Method, _Measured]]:
    """Methods with a checkpoint; where none has one, those that follow a calibration."""
    of = [(m, _Measured(f"checkpoint {m.checkpoint}", trained(m.checkpoint).sparse)) for m in methods if m.checkpoint]
    return of or [(m, _Measured(f"calibration {m.file}", found.sparse)) for m, found in _calibrations(methods)]


def _calibrations(methods: Sequence[Method]) -> list[tuple[Method, Calibration]]:
    files = [(method, Path(method.file)) for method in methods if method.file is not None]
    return [(m, read_calibration(file)) for m, file in files if file.is_file() and is_calibration(file)]


def check_orders(methods: Sequence[Method], sparse: SparseConfig) -> None:
    """Refuse calibrations of other modes than those that heads of `static` methods choose between.

    Raises:
        OSError, ValueError: a file that cannot be read, or is damaged; `Calibration.check_sparse`.
    """
    for method, found in _calibrations(methods):
        found.check_sparse(method.sparse(sparse), str(method.file), method.msr is not None)


def uneven(methods: Sequence[Method], sparse: SparseConfig) -> list[str]:
    """What to say about each size in which methods differ; nothing where like is compared with like.

    Args:
        sparse: what the methods without a checkpoint run on.
    """
    found: dict[str, dict[int, list[str]]] = {}
    for method in methods:
        own = sparse if method.checkpoint is None else trained(method.checkpoint).sparse
        for size in _sizes(method, own):
            found.setdefault(size, {}).setdefault(getattr(own, size), []).append(method.name)
    told = []
    for size, by_value in found.items():
        if len(by_value) > 1:
            parts = [f"{value} with {' and '.join(names)}" for value, names in by_value.items()]
            told.append(f"{size} is {', '.join(parts)}")
    return told


def _checkpoints(methods: Sequence[Method]) -> list[Trained]:
    """Of the methods that name one, each once, in order."""
    return [trained(path) for path in dict.fromkeys(m.checkpoint for m in methods) if path is not None]


def _sizes(method: Method, own: SparseConfig) -> list[str]:
    """The sizes that matter to a method on a model configured with `own`: those of its modes."""
    if method.kind == "dense":
        return []
    sparse = method.sparse(own)
    return list(dict.fromkeys(size for mode in (sparse.route0, sparse.route1) for size in SIZES[mode]))
