"""What a scene can hold, how each thing looks, and the words that captions use for it.

Every list is ordered: a position in it is the integer stored in `Scenes`. Colours are linear RGB reflectances.
"""

from __future__ import annotations

import re

SHAPES = ("sphere", "cube", "cylinder", "cone")
COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "white")
SIZES = ("small", "large")
MATERIALS = ("matte", "metal")
RELATIONS = ("left", "right", "front", "behind")

COLOR_RGB = (
    (0.72, 0.030, 0.025),
    (0.055, 0.400, 0.070),
    (0.025, 0.095, 0.680),
    (0.860, 0.600, 0.025),
    (0.290, 0.045, 0.500),
    (0.900, 0.230, 0.015),
    (0.030, 0.560, 0.610),
    (0.860, 0.855, 0.830),
)

# Base radius of the small and the large size, and height = radius x factor for each shape. The ratio of the sizes is
# larger than the ratio of the farthest and nearest distance, so a small object never looks larger than a large one.
RADIUS = (0.42, 0.80)
HEIGHT = (2.0, 1.64, 2.0, 2.35)
FOOTPRINT = (1.0, 0.82, 0.86, 1.0)  # base radius (half side for the cube) = radius x factor

FLOORS = ("grey", "brown", "beige", "green", "blue", "pink", "dark")
FLOOR_RGB = (
    (0.38, 0.385, 0.39),
    (0.28, 0.150, 0.075),
    (0.56, 0.450, 0.300),
    (0.24, 0.360, 0.220),
    (0.20, 0.290, 0.420),
    (0.56, 0.340, 0.350),
    (0.085, 0.088, 0.100),
)
PATTERNS = ("plain", "checkered")

SKIES = ("blue", "grey", "orange", "pink")
SKY_HORIZON = ((0.60, 0.80, 1.00), (0.68, 0.70, 0.72), (1.00, 0.60, 0.26), (1.00, 0.60, 0.66))
SKY_ZENITH = ((0.05, 0.24, 0.80), (0.26, 0.28, 0.31), (0.60, 0.20, 0.16), (0.46, 0.20, 0.42))

WALLS = ("grey", "beige", "blue", "green", "pink", "yellow")
WALL_RGB = (
    (0.50, 0.51, 0.52),
    (0.66, 0.57, 0.43),
    (0.32, 0.46, 0.64),
    (0.36, 0.52, 0.38),
    (0.68, 0.45, 0.47),
    (0.74, 0.62, 0.28),
)

# The first word is the plain one and the likeliest.
SHAPE_WORDS = (("sphere", "ball"), ("cube", "box", "block"), ("cylinder",), ("cone",))
COLOR_WORDS = (
    ("red",),
    ("green",),
    ("blue",),
    ("yellow",),
    ("purple", "violet"),
    ("orange",),
    ("cyan", "turquoise"),
    ("white",),
)
SIZE_WORDS = (("small", "little", "tiny"), ("large", "big", "huge"))
MATERIAL_WORDS = (("matte", "rubber", "dull"), ("metal", "shiny", "metallic"))
FLOOR_WORDS = (
    ("grey", "gray"),
    ("brown", "wooden-brown"),
    ("beige", "sand-coloured"),
    ("green",),
    ("blue",),
    ("pink",),
    ("dark", "black"),
)
SKY_WORDS = (("blue", "clear blue"), ("grey", "gray", "cloudy"), ("orange", "sunset"), ("pink",))
WALL_WORDS = (("grey", "gray"), ("beige",), ("blue",), ("green",), ("pink",), ("yellow",))


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks of a caption, the units of the vocabulary."""
    return re.findall(r"[a-z]+(?:-[a-z]+)*|[0-9]+|[^\sa-z0-9]", text.lower())
