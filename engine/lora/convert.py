"""Convert a LoRA to nunchaku's runtime form: `python -m engine.lora.convert --quant-path ... --lora-path ...`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from engine.checkpoint.files import TensorFiles
from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.writer import FileWriter
from engine.errors import CheckpointError
from engine.lora.detect import LoraFormat, detect_format
from engine.lora.published import to_runtime
from engine.lora.weights import LoraWeights, read_lora

__all__ = ["convert_lora", "read_as"]

# What upstream's names for formats cover.
_MEANT: dict[str, tuple[LoraFormat, ...]] = {
    "diffusers": ("diffusers", "kohya_diffusers", "peft_bfl"),
    "comfyui": ("comfyui", "bfl"),
    "xlabs": ("xlabs",),
}


def convert_lora(
    quant_path: str | Path,
    lora_path: str | Path | LoraWeights,
    target: str | Path,
    *,
    form: str = "auto",
    strict: bool = True,
) -> list[str]:
    """Write the LoRA at `lora_path`, joined with the low-rank factors of the checkpoint `quant_path`, to `target`.

    `form` is "auto", "diffusers", "comfyui" or "xlabs". Returns the modules and unknown keys that match nothing,
    which are an error unless `strict` is off. Raises CheckpointError when a file cannot be read or does not fit the
    other.
    """
    lora = lora_path if isinstance(lora_path, LoraWeights) else read_as(lora_path, form)
    with closing(open_checkpoint(quant_path)) as source:
        tensors, unmatched = to_runtime(lora, source)
    named = "the LoRA" if isinstance(lora_path, LoraWeights) else lora_path
    if not tensors:
        raise CheckpointError(
            f"{named}: none of its modules is in the model: {_some(unmatched)}; it is for another model"
        )
    if unmatched and strict:
        raise CheckpointError(
            f"{named}: {len(unmatched)} of its modules match nothing in the model: {_some(unmatched)}"
        )
    with FileWriter(target, len(tensors)) as out:
        for name, tensor in tensors.items():
            out.add(name, tensor)
    return unmatched


def read_as(path: str | Path, form: str = "auto") -> LoraWeights:
    """Read the LoRA at `path`, in the format `form` as `convert_lora` names it; raises CheckpointError otherwise."""
    with TensorFiles(path) as files:
        found = detect_format(files)
    if form != "auto" and found not in _MEANT[form]:
        raise CheckpointError(f"{path}: its keys are those of {found}, not of {form}; use --lora-format auto")
    return read_lora(path)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


if __name__ == "__main__":
    from engine.commands.convert_lora import main

    raise SystemExit(main())
