"""What a quality report says of its checkpoint, its machine and its sources."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint.layouts import open_checkpoint
from engine.checkpoint.quantization import Quantization, read_quantization
from engine.errors import ArgumentError
from engine.quantize.records import LayerRecord

__all__ = ["bytes_of", "check_report_place", "device_name", "quantization_of", "source_of", "versions"]


def check_report_place(out: Path) -> None:
    """Raise ArgumentError when a report at `out` would replace something else."""
    if out.exists() and not (out / "report.json").is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ArgumentError(f"report: {out} is there and is no report; choose another folder")


def source_of(records: Sequence[LayerRecord]) -> str:
    """Where the figures of layers come from, in words."""
    if any(record.naive_error is not None for record in records):
        return "measured by the quantizer on its calibration rows"
    return "told by the quantizer without data, where every input counts alike"


def quantization_of(checkpoint: Path) -> Quantization:
    """What the checkpoint's metadata says."""
    files = open_checkpoint(checkpoint)
    try:
        return read_quantization(files)
    finally:
        files.close()


def bytes_of(checkpoint: Path) -> int:
    """The size of a checkpoint's files."""
    files = checkpoint.glob("*.safetensors") if checkpoint.is_dir() else [checkpoint]
    return sum(file.stat().st_size for file in files)


def device_name(device: Any) -> str:
    """A device as a reader knows it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"


def versions() -> dict[str, str]:
    """Versions of what made the figures."""
    import diffusers
    import torch

    from engine import __version__

    return {
        "nibble": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }
