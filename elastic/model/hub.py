"""Checkpoints on the Hugging Face Hub: the files of one commit, and a commit of files.

Only files of a checkpoint are asked for, by their own names, whatever else a repository lists.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic.files import set_aside
from elastic.model.card import is_written_here
from elastic.model.checkpoint import CARD, METADATA, WEIGHTS, read_both
from elastic.model.loading import is_hub_id

_OF_EVERY_REPOSITORY = {CARD, ".gitattributes"}  # also of one that was just made on the hub's website
_COMMIT = re.compile("[0-9a-f]{40}")
_LONGEST = 300  # characters of the client's words in an error
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


class HubUnreachableError(OSError):
    """No answer of the hub."""


@dataclass(frozen=True)
class Shared:
    """Where a checkpoint is now.

    Attributes:
        place: folder, or owner/name on the hub.
        is_new: False where the same was there already.
        commit: hash on the hub, which `revision` of `elastic.load` takes.
        card_kept: somebody wrote or edited the model card there, so that stayed.
    """

    place: str
    is_new: bool
    commit: str | None = None
    card_kept: bool = False


def checkpoint_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: `name` itself, or, where nothing of that name is here and it has the form
    owner/name, its files on the hub (`fetch`).

    Raises:
        ValueError: a revision of a folder; a repository that holds no checkpoint, or an altered one.
        OSError: as `fetch`.
    """
    path = Path(name)
    if is_hub_id(str(name)) and not path.exists() and not set_aside(path).exists():
        try:
            return fetch(str(name), revision)
        except OSError as error:
            raise type(error)(f"no checkpoint {str(name)!r}: there is no such folder, and {error}") from error
    if revision is not None:
        raise ValueError(f"revision={revision!r} is of a repository on the hub, but {name} is a place on this machine")
    return path


def fetch(repository: str, revision: str | None = None) -> Path:
    """A folder of the hub's cache with a checkpoint as it is in one commit: its two files, checked, and the model card
    where there is one.

    Args:
        repository: owner/name.
        revision: branch, tag or commit hash; None: `main`. The hub is asked for the newest commit of a branch. Where it
            cannot be reached, the one in the cache is taken, with a warning; a whole commit hash in the cache needs no
            hub.

    Raises:
        FileNotFoundError: no such repository or revision.
        PermissionError: one that the user's token may not read.
        HubUnreachableError: no answer, and nothing in the cache.
        ValueError: a repository that holds no checkpoint, or an altered one.
    """
    folder = _cached(repository, revision) if _COMMIT.fullmatch(revision or "") else None
    try:
        folder = folder or _download(repository, revision)
    except HubUnreachableError as error:
        folder = _cached(repository, revision)
        if folder is None:
            raise HubUnreachableError(f"{error}, or bring a folder that `elastic pull` wrote elsewhere") from error
        warnings.warn(f"{error}. The routers are those of commit {folder.name}, from the cache", stacklevel=3)
    try:
        read_both(folder)
    except ValueError as error:
        raise ValueError(
            f"{repository} at commit {folder.name} is refused: {error}. Where its owner finds it whole, delete {folder}"
        ) from error
    return folder


def _download(repository: str, revision: str | None) -> Path:
    """The folder in the hub's cache of the newest commit of a revision."""
    from huggingface_hub import HfApi, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with _in_words(repository, revision):
        url = hf_hub_url(repository, METADATA, revision=revision)
        commit = HfApi().get_hf_file_metadata(url=url).commit_hash or ""
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"the answer names no commit, but {commit!r}; is HF_ENDPOINT a hub?")
        hf_hub_download(repository, METADATA, revision=revision)  # the cache remembers the revision's commit
        hf_hub_download(repository, METADATA, revision=commit)
        file = hf_hub_download(repository, WEIGHTS, revision=commit)
        with suppress(RemoteEntryNotFoundError):
            hf_hub_download(repository, CARD, revision=commit)
    return Path(file).parent


def publish(repository: str, files: Mapping[str, bytes], *, private: bool = False) -> Shared:
    """One commit with the files. A model card that `model_card` made is left out where somebody wrote or edited the one
    there. The repository is made where there is none; its other files stay, and so do earlier commits.

    Args:
        repository: owner/name.
        files: contents by name: those of a checkpoint, and its model card.
        private: make a repository that only its owner sees.

    Raises:
        PermissionError: no token, or one that may not write there.
        HubUnreachableError: no answer.
        ValueError: a repository that holds something else than a checkpoint, or a public one with `private`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise PermissionError(f"the hub accepts files only from users who are logged in; {_LOGIN}")
    api = HfApi()
    try:
        with _in_words(repository):
            found = api.model_info(repository)
        head, names, public = found.sha, {file.rfilename for file in found.siblings or ()}, not found.private
    except FileNotFoundError:
        head, names, public = None, set(), False
    if private and public:
        raise ValueError(f"{repository} is there already, for everybody to see; leave --private out, or rename it")
    if METADATA not in names and (others := sorted(names - _OF_EVERY_REPOSITORY)):
        raise ValueError(
            f"{repository} on the hub holds {', '.join(others[:3])}{', …' if len(others) > 3 else ''} and no Elastic "
            "Attention checkpoint; choose another name"
        )
    with _in_words(repository):
        made = is_written_here(files[CARD].decode(errors="replace"))
        kept = made and CARD in names and not is_written_here(_read_card(repository, head))
        adding = [CommitOperationAdd(name, data) for name, data in files.items() if not (kept and name == CARD)]
        if head is None:
            api.create_repo(repository, private=private or None)  # None: as the organisation has it
        told = "Routers of Elastic Attention"
        done = api.create_commit(repository, adding, commit_message=told, parent_commit=head)
    return Shared(repository, done.oid != head, done.oid, kept)


def _read_card(repository: str, commit: str | None) -> str:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repository, CARD, revision=commit)).read_text(encoding="utf-8", errors="replace")


def _cached(repository: str, revision: str | None) -> Path | None:
    """The folder of a revision in the hub's cache; None where a file is missing there."""
    from huggingface_hub import try_to_load_from_cache

    with _in_words(repository, revision):
        found = [try_to_load_from_cache(repository, name, revision=revision) for name in (METADATA, WEIGHTS)]
    files = [Path(file) for file in found if isinstance(file, str)]
    return files[0].parent if len(files) == len(found) else None


@contextmanager
def _in_words(repository: str, revision: str | None = None) -> Iterator[None]:
    """Inside, what the hub's client raises becomes an error that says what to do; errors of the disk stay."""
    from huggingface_hub.errors import HfHubHTTPError

    known: tuple[Any, ...] = (*HfHubHTTPError.__bases__, ValueError, RuntimeError)  # of its HTTP library, and OSError
    try:
        yield
    except known as raised:
        error = raised.__cause__ or raised if isinstance(raised, RuntimeError) else raised  # an upload in a thread
        if isinstance(error, HfHubHTTPError):
            raise _answer(error, repository, revision) from raised
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # of the disk
        if isinstance(error, ValueError):
            raise ValueError(f"{repository!r} at {revision or 'main'!r}: {_words(error)}") from raised
        raise HubUnreachableError(
            f"the hub cannot be reached for {repository} ({_words(error)}); try again later"
        ) from raised


def _answer(error: Exception, repository: str, revision: str | None) -> Exception:
    """What an answer of the hub that is an error means, most special first."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return PermissionError(f"{repository} is gated; ask for access on its page of the hub, then {_LOGIN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(
            f"the hub has no repository {repository} that you may see; check the name, or {_LOGIN} where it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"{repository} has no revision {revision or 'main'!r}; its page on the hub lists them")
    if isinstance(error, errors.EntryNotFoundError):
        return ValueError(
            f"{repository} at {revision or 'main'} is not an Elastic Attention checkpoint: it has no {METADATA} or no "
            f"{WEIGHTS}; check the name"
        )
    if status in (401, 403):
        return PermissionError(f"the hub does not let you do this with {repository} ({_words(error)}); {_LOGIN}")
    if status == 412:
        return OSError(f"somebody else changed {repository} at the same time; look at what is there, then try again")
    return OSError(f"the hub answered {status} for {repository} ({_words(error)}); try again later")


def _words(error: BaseException) -> str:
    """What an error says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
