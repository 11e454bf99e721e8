"""Layer shapes of the large models: the one list that the benchmarks and the tests of the ops share."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["FLUX", "FLUX_TOKENS", "SANA", "SANA_TOKENS", "TINY", "TINY_TOKENS", "Shape"]


class Shape(NamedTuple):
    """One quantized linear: N outputs over K inputs."""

    name: str
    n: int
    k: int


# FLUX.1 at width 3072. Tokens at 1024x1024: 4096 of the image and 512 of the text.
FLUX = (
    Shape("flux qkv", 9216, 3072),
    Shape("flux out", 3072, 3072),
    Shape("flux mlp up", 12288, 3072),
    Shape("flux mlp down", 3072, 12288),
)
FLUX_TOKENS = (512, 4096, 4608)

# SANA 1.6B at width 2240. Tokens at 1024x1024: 1024 a picture, two pictures with guidance.
SANA = (
    Shape("sana qkv", 6720, 2240),
    Shape("sana out", 2240, 2240),
    Shape("sana ff up", 11200, 2240),
    Shape("sana ff down", 2240, 5632),
)
SANA_TOKENS = (1024, 2048)

# The small FLUX of the zoo at width 384. Tokens at 256x256: 256 of the image and 64 of the text.
TINY = (
    Shape("tiny out", 384, 384),
    Shape("tiny qkv", 1152, 384),
    Shape("tiny mlp up", 1536, 384),
    Shape("tiny mlp down", 384, 1536),
)
TINY_TOKENS = (1, 256, 320)
