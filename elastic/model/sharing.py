"""Routers go to others and come from them: checkpoints to and from the Hugging Face Hub, or a folder that others read.

What is checked is what is shared: contents are read once, into memory. Nothing that is there is replaced: a folder with
other contents is refused, and a repository keeps its earlier commits.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic.files import check_place, is_foreign, new_file, new_folder, sealed, unsealed
from elastic.model.card import is_written_here, model_card
from elastic.model.checkpoint import CARD, METADATA, WEIGHTS, read_both, read_elastic
from elastic.model.hub import Shared, fetch, publish
from elastic.model.loading import SMOLLM2, TINY, is_hub_id


def push(
    checkpoint: str | Path,
    target: str,
    *,
    backbone: str | None = None,
    license_id: str | None = None,
    private: bool = False,
) -> Shared:
    """Publish a checkpoint with its model card: the `README.md` in its folder if somebody wrote that, else one made of
    its provenance.

    Args:
        checkpoint: its folder.
        target: owner/name on the hub, or a folder.
        backbone: what others load the backbone by, in place of what `elastic.json` says. Required where that is a
            folder of this machine and the target is the hub.
        license_id: of the routers, for the card, as the hub names it (apache-2.0).
        private: make a repository that only its owner sees.

    Raises:
        ValueError: a damaged checkpoint; a target that is both a hub id and a folder, or holds something else; a
            backbone that others do not have.
        OSError: no checkpoint, or a place that cannot be written (`elastic.model.hub.publish`).
    """
    files, metadata = _contents(Path(checkpoint))
    on_hub = _is_on_hub(target)
    if backbone is not None:
        metadata["backbone"] = backbone
        files[METADATA] = sealed({**unsealed(files[METADATA].decode()), "backbone": backbone}).encode()
    if on_hub and not _others_have(metadata["backbone"]):
        raise ValueError(
            f"{checkpoint} names its backbone {metadata['backbone']!r}, a place on this machine that others do not "
            "have; say what they load it by with --backbone owner/name"
        )
    if CARD not in files or is_written_here(files[CARD].decode(errors="replace")):
        files[CARD] = model_card(metadata, target, license_id).encode()
    elif license_id is not None:
        raise ValueError(f"--license is for a card that is made, but {checkpoint} has its own {CARD}; write it there")
    if on_hub:
        return publish(target, files, private=private)
    if private:
        raise ValueError(f"--private is of the hub, but {target} is a folder; set the permissions of the folder")
    return _put(files, Path(target))


def pull(source: str, out: str | Path | None = None, revision: str | None = None) -> Shared:
    """Bring a checkpoint and its model card into a folder.

    Args:
        source: owner/name on the hub, or a folder.
        out: folder to write; None: the last part of the source's name, in the current folder.
        revision: branch, tag or commit hash on the hub; None: `main`.

    Raises:
        ValueError: a source without a checkpoint, or with an altered one; an `out` that holds something else.
        OSError: no such source, or one that cannot be read (`elastic.model.hub.fetch`).
    """
    out = Path(Path(source).name if out is None else out)
    _check_free(out)
    if _is_on_hub(source):
        folder = fetch(source, revision)
        return replace(_put(_contents(folder)[0], out), commit=folder.name)
    if revision is not None:
        raise ValueError(f"--revision {revision} is of a repository on the hub, but {source} is a folder")
    return _put(_contents(Path(source))[0], out)


def _is_on_hub(name: str) -> bool:
    """Whether a place is of the hub, by its name.

    Raises:
        ValueError: a name of the hub that is also that of a folder here, or one that is neither.
    """
    if is_hub_id(name) and Path(name).exists():
        raise ValueError(
            f"{name} may be a repository on the hub, but is also a folder here; write ./{name} for the folder, or run "
            "the command elsewhere for the repository"
        )
    if not (is_hub_id(name) or name.startswith((".", "/")) or Path(name).is_dir()):
        way = "name a repository by these alone" if "://" in name else f"write ./{name} for a new folder"
        raise ValueError(f"{name} is neither owner/name on the hub nor a folder here; {way}")
    return is_hub_id(name)


def _others_have(backbone: str) -> bool:
    return backbone in (TINY, SMOLLM2) or is_hub_id(backbone)


def _contents(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a whole checkpoint by name, its model card among them if it has one; and what `read_elastic` says.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a damaged or altered file.
    """
    read_elastic(folder)
    files = {name: (folder / name).read_bytes() for name in (METADATA, WEIGHTS)}
    with tempfile.TemporaryDirectory() as copy:
        _write(files, Path(copy))
        try:
            metadata, _ = read_both(Path(copy))
        except ValueError as error:
            raise ValueError(str(error).replace(copy, str(folder))) from error
    if (folder / CARD).is_file():
        files[CARD] = (folder / CARD).read_bytes()
    return files, metadata


def _check_free(target: Path) -> None:
    check_place("the place", target, folder=True)
    if is_foreign(target, METADATA):
        raise ValueError(f"{target} exists but is not an Elastic Attention checkpoint; choose another folder")


def _put(files: dict[str, bytes], target: Path) -> Shared:
    """Write a folder, or find the same there.

    Raises:
        ValueError: a folder that holds something else.
    """
    _check_free(target)
    if not (target / METADATA).is_file():
        with new_folder(target, sync=True) as scratch:
            _write(files, scratch)
        return Shared(str(target), True)
    there = {name: (target / name).read_bytes() for name in (METADATA, WEIGHTS) if (target / name).is_file()}
    if any(there.get(name) != files[name] for name in (METADATA, WEIGHTS)):
        raise ValueError(f"{target} holds another checkpoint, which stays; delete it, or choose another folder")
    card = (target / CARD).read_bytes() if (target / CARD).is_file() else None
    if CARD not in files or card == files[CARD]:
        return Shared(str(target), False)
    kept = card is not None and not is_written_here(card.decode(errors="replace"))
    if not kept:
        with new_file(target / CARD) as scratch:
            scratch.write_bytes(files[CARD])
    return Shared(str(target), False, card_kept=kept)


def _write(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)
