"""What the model checkers share: where weights may come from, and a plain sentence for each way it fails.

Only safetensors are read and no code of a repository is ever run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from safety.verdict import SafetyError, Verdict, worst

__all__ = ["escape_markers", "load", "pick_device", "windows", "worst_of"]

T = TypeVar("T")

# Handed to every `from_pretrained`.
OPTIONS: dict[str, Any] = {"trust_remote_code": False}
WEIGHTS: dict[str, Any] = {**OPTIONS, "use_safetensors": True, "dtype": "auto"}

WINDOW = 4000  # characters a model sees at once, far inside every model's context
OVERLAP = 400


def pick_device(device: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU. Raises SafetyError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise SafetyError(f"The safety checker cannot run on device {device!r}: {_first_line(error)}") from error
    return chosen


def load(source: str, open_model: Callable[[], T]) -> T:
    """Run `open_model`; whatever goes wrong becomes a SafetyError that names `source` and the way out."""
    folder = Path(source).expanduser()
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise SafetyError(f"{source} holds no .safetensors weights; other formats are not loaded, convert them first.")
    try:
        return open_model()
    except SafetyError:
        raise
    except Exception as error:
        raise SafetyError(_explain(source, error)) from error


def _explain(source: str, error: BaseException) -> str:
    causes = list(_chain(error))

    def any_of(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    if any_of(GatedRepoError):
        return (
            f"{source} is gated: accept its licence on the hub, then log in with `hf auth login` or set HF_TOKEN; "
            "or choose another safety checker."
        )
    if any_of(RepositoryNotFoundError):
        return f"The hub has no model {source}, or it is private: check the name, or log in with `hf auth login`."
    if any_of(OfflineModeIsEnabled, LocalEntryNotFoundError, HfHubHTTPError, ConnectionError):
        return (
            f"{source} is not on this machine and the hub cannot be reached: go online once, give a local folder, "
            "or choose the checker `words`."
        )
    return f"The safety model {source} cannot be opened: {_first_line(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it; transformers wraps the hub's errors in an OSError."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def escape_markers(text: str, tokenizer: Any) -> str:
    """Break up every control token of `tokenizer` in `text`, so that a prompt cannot end its own turn.

    Lone surrogates, which tokenizers refuse, become question marks.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    markers = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    for marker in sorted(markers, key=lambda marker: (-len(marker), marker)):
        if marker.strip() and len(marker) > 1:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text


def windows(text: str) -> list[str]:
    """Cut a long text into overlapping pieces, so that no part goes unread."""
    starts = range(0, max(len(text) - OVERLAP, 1), WINDOW - OVERLAP)
    return [text[start : start + WINDOW] for start in starts]


def worst_of(name: str, prompt: str, judge: Callable[[str], Verdict]) -> Verdict:
    """Judge each window of `prompt`; nothing to read is allowed without asking the model."""
    if not prompt.strip():
        return Verdict(True, None, 0.0, name, "The prompt is empty.")
    return worst([judge(piece) for piece in windows(prompt)])
