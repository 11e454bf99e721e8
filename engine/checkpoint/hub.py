"""Find a checkpoint on this machine or on the hub, with errors that say what to do next."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.errors import CheckpointError, EngineError, ModelError

__all__ = ["resolve", "subfolder"]

_FOLDER_FILES = ["*.safetensors", "*.json"]


def resolve(place: str | Path) -> Path:
    """Return the local path of a checkpoint: file, folder, or `owner/repo[/file.safetensors]` on the hub.

    A hub file is downloaded once and kept in the hub's cache. Of a repository with several checkpoints, give the file.
    Raises CheckpointError when a local path is not there, ModelError when the hub cannot give it.
    """
    path = Path(place).expanduser()
    if path.exists():
        return path
    name = str(place)
    parts = name.split("/")
    if path.is_absolute() or name.startswith(".") or len(parts) < 2 or not all(parts):
        raise CheckpointError(
            f"{name}: no such file or folder, nor a hub name (owner/repo[/file.safetensors]); check the path"
        )
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    from huggingface_hub import hf_hub_download, snapshot_download

    with _explained(repository, file):
        if file:
            return Path(hf_hub_download(repository, file))
        return _one_of(repository, Path(snapshot_download(repository, allow_patterns=_patterns(repository))))


def subfolder(repository: str, name: str) -> Path:
    """Return the local path of one folder of a hub repository, its .safetensors and .json files downloaded once.

    Raises ModelError when the hub cannot give it.
    """
    from huggingface_hub import snapshot_download

    with _explained(repository, name):
        return Path(snapshot_download(repository, allow_patterns=[f"{name}/{kind}" for kind in _FOLDER_FILES])) / name


def _patterns(repository: str) -> list[str]:
    """What to download of a repository without a file name: the only checkpoint, or the folder it is."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if HF_HUB_OFFLINE:
        return _FOLDER_FILES
    try:
        files = HfApi().list_repo_files(repository)
    except (HFValidationError, RepositoryNotFoundError):
        raise
    except Exception:  # of whichever HTTP library it uses: nobody answers, but what was downloaded before may do
        return _FOLDER_FILES
    singles = [name for name in files if name.startswith(("svdq-", "awq-")) and name.endswith(".safetensors")]
    if len(singles) > 1:
        raise ModelError(_choose(repository, singles))
    return singles or _FOLDER_FILES


def _one_of(repository: str, folder: Path) -> Path:
    singles = sorted(path for path in folder.glob("*.safetensors") if path.name.startswith(("svdq-", "awq-")))
    if len(singles) > 1:
        raise ModelError(_choose(repository, [path.name for path in singles]))
    return singles[0] if singles else folder


def _choose(repository: str, files: Sequence[str]) -> str:
    listed = ", ".join(f"{repository}/{name}" for name in sorted(files))
    return f"{repository} holds several checkpoints; name one of them: {listed}"


@contextlib.contextmanager
def _explained(repository: str, file: str) -> Iterator[None]:
    """Turn the ways a download can fail into one sentence."""
    place = f"{repository}/{file}" if file else repository
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ModelError(
            f"{repository} is gated: accept its licence on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{place}: not on this machine, and {repository} is no repository of the hub, or a private one; check the"
            " name, or log in with `hf auth login`"
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{repository}: not a name the hub allows ({_first_line(error)})") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(_unreachable(place, error)) from error
    except EntryNotFoundError as error:
        raise ModelError(f"{repository} is on the hub, but has no file {file!r}; check its file list") from error
    except EngineError:
        raise
    except Exception as error:  # connection errors are those of whichever HTTP library the hub's client uses
        raise ModelError(_unreachable(place, error)) from error


def _unreachable(place: str, error: BaseException) -> str:
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"{place}: not on this machine and the hub does not answer{offline}: {_first_line(error)}."
        " Connect once to download it, or give a local file or folder"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
