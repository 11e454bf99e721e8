"""What figures were read on, and files that appear whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

__all__ = ["machine", "write_json", "write_text"]

_PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "peft", "bitsandbytes", "torchao", "torchmetrics", "clean-fid",
)  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """Device, processor, load, versions and date. `load_1min` above zero before a run means others were at work."""
    cuda = device.type == "cuda"
    found = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": _versions(),
    }
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        found |= {"cuda": torch.version.cuda, "device_gib": round(properties.total_memory / 2**30, 1)}
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    """The same for a value."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _versions() -> dict[str, str]:
    from engine import __version__

    found = {"nibble": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
