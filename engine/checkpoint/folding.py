"""Checkpoints whose attention outputs were smoothed where they are made: in the rows of V.

A writer may divide the rows of V by the smooth factor s of the output projection that follows. The projection then has
a smooth factor of ones, and s is found as its calibration value. What such a file computes is the same, but V and the
projection's input are s times smaller than in the dense model, which matters to whoever adds to their weights (a LoRA).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from engine.checkpoint.source import Source

__all__ = ["folded_smooth", "outputs", "smooth_in_values"]

# Leaf of an output projection -> leaves of the V projections that feed it. The streams of a FLUX double block attend to
# each other, so one factor is in both.
_VALUES = {
    "attn.to_out.0": ("attn.to_v", "attn.add_v_proj"),
    "attn.to_add_out": ("attn.to_v", "attn.add_v_proj"),
    "proj_out.attn": ("attn.to_v",),
    "attn1.to_out.0": ("attn1.to_v",),
    "attn2.to_out.0": ("attn2.to_v",),
}


def outputs(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Those of `names` that are attention output projections, with the V projections that feed each."""
    found = {}
    for name in names:
        for leaf, values in _VALUES.items():
            if name.endswith(f".{leaf}"):
                found[name] = tuple(name.removesuffix(leaf) + value for value in values)
    return found


def folded_smooth(smooth: Tensor, smooth_orig: Tensor) -> Tensor | None:
    """The factor (K) that the rows of V were divided by; None where the layer smooths its own input."""
    if not bool((smooth == 1).all()) or bool((smooth_orig == 1).all()):
        return None
    return smooth_orig


def smooth_in_values(files: Source, name: str) -> Tensor | None:
    """The factor that went into V for the output projection `name` of an open checkpoint, None for none."""
    if f"{name}.smooth_orig" not in files or not outputs([name]):
        return None
    return folded_smooth(files[f"{name}.smooth"], files[f"{name}.smooth_orig"])
