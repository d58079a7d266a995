"""Checkpoints for use (docs/design.md section 8): a folder with `router.safetensors` and `elastic.json`.

A few MB; never backbone weights, never a pickle. A folder is complete or absent: it is written beside its final place
and renamed. `elastic.json` holds the checksum of the tensors and its own, so that an altered checkpoint is refused.
"""

import importlib.metadata
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from elastic._version import __version__
from elastic.config import UNTOLD, ElasticConfig
from elastic.data.prompts import TEMPLATE, TEMPLATE_KWARGS, check_kwargs
from elastic.files import SEAL, file_sha256, is_foreign, member, new_folder, sealed, set_aside, unsealed
from elastic.model.attach import Model, attach, elastic_config, handle_of, routers
from elastic.model.loading import architecture, architecture_hash
from elastic.model.tensor_parallel import HeadShare
from elastic.protocols import CausalLM
from elastic.routing.kinds import build_router
from elastic.routing.router import Router, check_router

FORMAT = 1
WEIGHTS, METADATA, CARD = "router.safetensors", "elastic.json", "README.md"
MULTIPLIERS = "multipliers."  # prefix; which ones there are depends on the objective
_SHAPE = ("num_layers", "num_kv_heads", "head_dim")
_PLACES, _ALL = ("routed_layers", "decoder_layers"), "all"  # of backbones with sliding layers of their own
_WAY_OUT = "restore the checkpoint from a copy or train again"
_YOURS = f"; where a change is yours, take its {SEAL!r} out"


def is_trainable(name: str) -> bool:
    """Whether a state-dict key belongs to the routers (statistics included) or the multipliers.

    The one predicate of what is trained, saved and loaded; everything else is frozen backbone.
    """
    return ".self_attn.router." in name or name.split(".")[-2:-1] == ["multipliers"]


def router_state(model: CausalLM) -> dict[str, Tensor]:
    """Router tensors of an attached model by layer, such as `layers.0.task.0.weight`, on the CPU.

    Raises:
        ValueError: routers that were offloaded, or that another library has wrapped.
    """
    for layer, router in enumerate(routers(model)):
        if not isinstance(router, Router):
            raise ValueError(
                f"the router of layer {layer} was wrapped in a {type(router).__name__}, beside which its first values "
                "are kept; unwrap it first (merge_and_unload of peft)"
            )
        check_router(router, layer)
    return {
        f"layers.{layer}.{name}": value.detach().cpu().contiguous()
        for layer, router in enumerate(routers(model))
        for name, value in router.state_dict().items()
    }


def save_elastic(
    path: str | Path,
    model: CausalLM,
    backbone: str,
    multipliers: nn.Module | None = None,
    recipe: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint folder; one that is there stays until the new one is complete, its model card beyond that.

    Args:
        path: folder to write.
        model: an attached model.
        backbone: name to load the backbone by.
        multipliers: those of the objective, kept for the record.
        recipe: how the routers were trained (data, steps, seed); must fit into JSON.
        metrics: what was measured; must fit into JSON.
        chat_template_kwargs: what the chat template was told of the conversations in training, and is to be told in
            use; default `elastic.data.prompts.TEMPLATE_KWARGS`.

    Raises:
        ValueError: a path that holds something else than a checkpoint, or routers that are not finite fp32.
    """
    path = Path(path)
    if is_foreign(path, METADATA):
        raise ValueError(f"{path} exists but is not an Elastic Attention checkpoint; choose another folder")
    if (parts := handle_of(model).share.parts) > 1:
        raise ValueError(
            f"this process has the routers of some heads alone: the model is cut into {parts} parts by tensor "
            "parallelism; save from a model loaded without tp_plan"
        )
    config, state = elastic_config(model), router_state(model)
    shape = architecture(model)
    _check_state(state, _expected(shape, config), f"routers to be saved to {path}", "train again with lower rates")
    if multipliers is not None:
        state |= {f"{MULTIPLIERS}{name}": value.detach().cpu() for name, value in multipliers.state_dict().items()}
    with new_folder(path, sync=True) as scratch:
        safetensors.torch.save_file(state, scratch / WEIGHTS)
        metadata = {
            "format": FORMAT,
            "config": config.to_dict(),
            "backbone": backbone,
            TEMPLATE: dict(TEMPLATE_KWARGS if chat_template_kwargs is None else chat_template_kwargs),
            "architecture": shape,
            "architecture_sha256": architecture_hash(model),
            "weights_sha256": file_sha256(scratch / WEIGHTS),
            "versions": {
                "elastic-attention": __version__,  # also where the package runs uninstalled
                **{name: importlib.metadata.version(name) for name in ("torch", "transformers")},
            },
            "recipe": recipe or {},
            "metrics": metrics or {},
        }
        (scratch / METADATA).write_text(sealed(metadata), encoding="utf-8")
        if (path / CARD).is_file():
            shutil.copyfile(path / CARD, scratch / CARD)  # somebody may have written it
        shutil.copymode(scratch / METADATA, scratch / WEIGHTS)  # safetensors makes files that only their owner reads
    return path


def read_elastic(path: str | Path) -> dict[str, Any]:
    """Contents of `elastic.json`, without its own checksum, which earlier ones lack.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: damaged, changed after it was written, or written by a newer version.
    """
    path = Path(path)
    for name in (METADATA, WEIGHTS):
        if not (path / name).is_file():
            old = set_aside(path)
            hint = (
                f"a save was interrupted, rename {old} to get the previous checkpoint back"
                if not path.exists() and old.is_dir()
                else "`elastic fit` and `elastic demo` write one, `elastic pull` fetches one"
            )
            raise FileNotFoundError(f"no checkpoint at {path}: {name} is missing; {hint}")
    try:
        metadata = unsealed((path / METADATA).read_text(encoding="utf-8"))
        config, found = member(metadata, "config", dict), metadata.get("format")
        config.setdefault("router", {})
        config["router"] = {**UNTOLD, **member(config, "router", dict)}
        metadata[TEMPLATE] = check_kwargs(metadata.get(TEMPLATE, {}))  # earlier ones were told nothing
    except ValueError as error:
        raise ValueError(f"{path / METADATA} is damaged ({error}); {_WAY_OUT}{_YOURS}") from error
    if found != FORMAT:
        raise ValueError(f"{path} has format {found!r}, this version reads format {FORMAT}; update elastic-attention")
    try:
        ElasticConfig.from_dict(config)
        shape = member(metadata, "architecture", dict)
        _ = [member(shape, key, int) for key in _SHAPE]
        _ = [member(metadata, key, str) for key in ("backbone", "weights_sha256")]
        for key in ("recipe", "metrics"):
            metadata.setdefault(key, {})
            member(metadata, key, dict)
    except ValueError as error:
        raise ValueError(f"{path / METADATA} is damaged ({error}); {_WAY_OUT}") from error
    return metadata


def load_into(model: Model, path: str | Path) -> Model:
    """Attach routers from a checkpoint to a stock backbone, in place. A refused model stays as it was.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a damaged checkpoint, or one for another backbone (both values are named).
    """
    config, state = _checked(path, architecture(model))
    attach(model, config)
    _fill(routers(model), state, handle_of(model).share)
    return model


def read_routers(path: str | Path, shape: dict[str, Any]) -> tuple[ElasticConfig, list[Router]]:
    """Routers of a checkpoint without a model, in eval mode and in layer order, for engines that run a backbone of
    their own.

    Args:
        shape: of the backbone (`elastic.model.loading.architecture`).

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: a damaged checkpoint, or one for another backbone (both values are named).
    """
    config, state = _checked(path, shape)
    made = [
        build_router(shape["num_kv_heads"], shape["head_dim"], config.router, layer)
        for layer in range(shape["num_layers"])
    ]
    _fill(made, state)
    return config, [router.requires_grad_(False).eval() for router in made]


def _checked(path: str | Path, shape: dict[str, Any]) -> tuple[ElasticConfig, dict[str, Tensor]]:
    """Settings and router tensors of a checkpoint that fits a backbone of this shape."""
    metadata, state = read_both(Path(path))
    _check_backbone(shape, metadata, path)
    config = ElasticConfig.from_dict(metadata["config"])
    state = {name: value for name, value in state.items() if not name.startswith(MULTIPLIERS)}
    _check_state(state, _expected(metadata["architecture"], config), f"checkpoint {path}", _WAY_OUT)
    return config, state


def _fill(own: list[Router], state: dict[str, Tensor], share: HeadShare = HeadShare()) -> None:  # noqa: B008
    for layer, router in enumerate(own):
        prefix = f"layers.{layer}."
        of_layer = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        router.load_state_dict(share.state(of_layer))


def _check_backbone(mine: dict[str, Any], metadata: dict[str, Any], path: str | Path) -> None:
    theirs, name = metadata["architecture"], metadata["backbone"]
    for key in _SHAPE:
        if mine[key] != theirs[key]:
            raise ValueError(
                f"checkpoint {path} was trained on {name!r} with {key}={theirs[key]}, but this backbone has "
                f"{key}={mine[key]}; load the backbone it was trained on"
            )
    for key in _PLACES:
        if mine.get(key) != theirs.get(key):
            raise ValueError(
                f"checkpoint {path} was trained on {name!r} with {key}={theirs.get(key, _ALL)}, but this backbone has "
                f"{key}={mine.get(key, _ALL)}, so routers would sit in other layers; load the backbone it was trained "
                "on"
            )
    other = [key for key, value in mine.items() if value != theirs.get(key)]
    if other:
        told = ", ".join(f"{key} {theirs.get(key)} there, {mine[key]} here" for key in other)
        warnings.warn(f"checkpoint {path} fits, but was trained on another backbone, {name!r}: {told}", stacklevel=4)


def _expected(shape: dict[str, Any], config: ElasticConfig) -> dict[str, Tensor]:
    """The router tensors that a backbone of this shape needs, without data."""
    with torch.device("meta"):
        made = [
            build_router(shape["num_kv_heads"], shape["head_dim"], config.router, layer)
            for layer in range(shape["num_layers"])
        ]
    return {
        f"layers.{layer}.{name}": value
        for layer, router in enumerate(made)
        for name, value in router.state_dict().items()
    }


def read_both(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of one save, also while another replaces the folder between the two. Whether they fit each
    other is known once there is a backbone (`load_into`).

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a damaged or altered file.
    """
    while True:
        before = _identity(path)
        try:
            metadata = read_elastic(path)
            return metadata, _read_weights(path, metadata["weights_sha256"])
        except (ValueError, FileNotFoundError):
            if _identity(path) == before:
                raise


def _identity(path: Path) -> list[tuple[int, int] | None]:
    """What tells the files of one save from those of another, also of equal content."""

    def of(file: Path) -> tuple[int, int] | None:
        try:
            found = file.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    return [of(path / name) for name in (METADATA, WEIGHTS)]


def _read_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    file, found = path / WEIGHTS, file_sha256(path / WEIGHTS)
    if found != sha256:
        raise ValueError(f"{file} is damaged: sha256 {found}, expected {sha256}; {_WAY_OUT}")
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); {_WAY_OUT}") from error


def _check_state(found: dict[str, Tensor], expected: dict[str, Tensor], what: str, way_out: str) -> None:
    """Exactly the expected tensors, of their shapes and dtypes, all finite."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(f"{what}: missing tensors {_few(missing)}, unexpected tensors {_few(unexpected)}; {way_out}")
    for name, value in found.items():
        wanted = expected[name]
        if value.shape != wanted.shape or value.dtype != wanted.dtype:
            raise ValueError(
                f"{what}: tensor {name} is {value.dtype} {list(value.shape)}, expected {wanted.dtype} "
                f"{list(wanted.shape)}; {way_out}"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{what}: tensor {name} holds NaN or infinity, expected finite numbers; {way_out}")


def _few(names: list[str]) -> str:
    return (", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")) or "none"
