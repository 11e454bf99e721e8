"""How figures are put in words."""

from __future__ import annotations

import math

__all__ = ["PRECISIONS", "bytes_text", "decibels", "faster", "seconds_text", "smaller"]

PRECISIONS = {
    "bf16": "16-bit weights, as published",
    "int4": "4-bit weights, SVDQuant",
    "int4-w4a8": "4-bit weights, 8-bit numbers",
    "int4-w4a4": "4-bit weights, 4-bit numbers",
    "nvfp4": "4-bit floats, SVDQuant",
}


def seconds_text(seconds: float) -> tuple[str, str]:
    """Figure and unit of a duration: milliseconds below one second."""
    if seconds < 1:
        return f"{1000 * seconds:.0f}", "ms"
    return (f"{seconds:.2f}" if seconds < 10 else f"{seconds:.1f}"), "s"


def bytes_text(count: float) -> tuple[str, str]:
    """Figure and unit of a size in memory, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return (f"{count:.0f}" if count >= 100 or unit == "B" else f"{count:.1f}"), unit
        count /= 1024
    return f"{count:.2f}", "GiB"


def faster(reference: float, this: float) -> tuple[str, str]:
    """Words and tone ("better", "worse", "same") for `this` seconds beside `reference` seconds."""
    if this <= 0 or reference <= 0:
        return "", "same"
    ratio = reference / this
    if 0.98 < ratio < 1.02:
        return "same speed", "same"
    return (f"{ratio:.2f}× faster", "better") if ratio > 1 else (f"{1 / ratio:.2f}× slower", "worse")


def smaller(reference: float, this: float) -> tuple[str, str]:
    """Words and tone for `this` many bytes beside `reference` many."""
    if this <= 0 or reference <= 0:
        return "", "same"
    ratio = reference / this
    if 0.98 < ratio < 1.02:
        return "same size", "same"
    return (f"{ratio:.1f}× smaller", "better") if ratio > 1 else (f"{1 / ratio:.1f}× larger", "worse")


def decibels(value: float) -> str:
    """A PSNR; equal pictures have no finite one."""
    return "∞ dB" if math.isinf(value) else f"{value:.1f} dB"
