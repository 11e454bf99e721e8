"""Rendered scenes with captions, exact depth and object masks.

    scenes = sample(64, seed=1)
    pictures = render(scenes, device="cuda", compile=True)      # .image, .depth, .mask
    texts = captions(scenes, seed=1)

`python -m zoo.scenes --help` draws a contact sheet.
"""

from __future__ import annotations

from zoo.scenes.captioning import Caption, Named, caption, captions, describe, vocabulary
from zoo.scenes.lexicon import COLORS, MATERIALS, RELATIONS, SHAPES, SIZES
from zoo.scenes.renderer import Rendered, geometry_maps, render, stream
from zoo.scenes.scene import Scenes, sample

__all__ = [
    "COLORS",
    "MATERIALS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Caption",
    "Named",
    "Rendered",
    "Scenes",
    "caption",
    "captions",
    "describe",
    "geometry_maps",
    "render",
    "sample",
    "stream",
    "vocabulary",
]
